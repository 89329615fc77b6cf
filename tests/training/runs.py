"""What the tests of ``train`` share: a place with models and a corpus, and running the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_hiermem import cli
from mlx_hiermem.anchors import openlm
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.corpus.build import build_corpus
from mlx_hiermem.corpus.config import CorpusConfig
from mlx_hiermem.corpus.runners import LocalRunner
from tests.corpus.corpora import make_documents, make_tiny_bert, write_jsonl
from tests.tiny import make_tiny_model

K, LENGTH, RANKS = 3, 32, (4, 2)


def make_place(place: Path) -> Path:
    """A folder of what runs start from, in about a second.

    ``model``: tiny anchor, tokenizer and bank; ``anchor``: the same without the bank; ``llama``: an
    anchor of mlx-lm's; ``fresh.json`` for ``--anchor``; ``corpus``: clustered with the tree of
    ``model``, whose encoder is its embeddings; ``bert`` and ``corpus-bert``: with a random BERT.
    """
    make_tiny_model(place / "model", ranks=RANKS, branching=K)
    shutil.copytree(place / "model", place / "anchor", ignore=shutil.ignore_patterns("memory"))
    make_tiny_llama(place / "llama", place / "anchor")
    args = openlm.ModelArgs(
        hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2,
        head_dim=8, vocab_size=257, max_position_embeddings=256,
    )  # fmt: skip
    (place / "fresh.json").write_text(json.dumps(asdict(args)))
    make_tiny_bert(place / "bert")
    write_jsonl(place / "some.jsonl", make_documents(160))
    make_corpus(place, "corpus", tree=place / "model" / "memory")
    make_corpus(place, "corpus-bert", encoder=str(place / "bert"))
    return place


def make_tiny_llama(folder: Path, tokenizer: Path) -> Path:
    """A random anchor of mlx-lm's own, with the tokenizer of another folder."""
    folder.mkdir()
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    config = {
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "vocab_size": 257, "tie_word_embeddings": False, "eos_token_id": 256,
        "max_position_embeddings": 256,
    }  # fmt: skip
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_corpus(place: Path, name: str, **options) -> Path:
    """A corpus of ``some.jsonl`` in ``place``/``name``."""
    options = {
        "data": (str(place / "some.jsonl"),), "model": str(place / "anchor"),
        "encoder": "embeddings", "sequence_length": LENGTH, "window": 2 * LENGTH,
        "branching": K, "levels": len(RANKS), "validation": 0.1,
    } | options  # fmt: skip
    build_corpus(place / name, CorpusConfig(**options), LocalRunner())
    return place / name


def arguments(place: Path, run: Path | str, **options: Any) -> list[str]:
    """The arguments of a short run with memories on ``anchor``; options as flags, None: none."""
    options = {
        "data": place / "corpus", "run": run, "model": place / "anchor", "ranks": "4,2",
        "regime": "frozen", "iters": 6, "batch_size": 4, "learning_rate": 0.01,
        "save_every": 3, "val_batches": 0,
    } | options  # fmt: skip
    found = ["train"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(flag)
        elif value is not None:
            found += [flag, str(value)]
    return found


def train(place: Path, run: Path | str, **options: Any) -> int:
    """Run the command in this process; returns its exit code."""
    return cli.main(arguments(place, run, **options))


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of each line of the log that is a training step."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def validations(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and losses of each validation in the log."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["validation"]) for line in lines if "validation" in line]


def bank(model: Path) -> dict[tuple[int, int | None], Any]:
    """(level, cluster) -> block of a model folder's bank; cluster None is the generic memory's."""
    reader = BlockReader(model / "memory")
    found = {
        (level, cluster): reader.block(level, cluster)
        for level in reader.config.memory_levels
        for cluster in (None, *range(reader.config.clusters(level)))
    }
    reader.close()
    return found


def weights(model: Path) -> dict[str, np.ndarray]:
    """The anchor's weights of a model folder."""
    found: dict[str, np.ndarray] = {}
    for path in model.glob("model*.safetensors"):
        loaded = mx.load(str(path))
        found |= {name: np.array(value.astype(mx.float32)) for name, value in loaded.items()}
    return found
