"""What the fetch benchmark reads: banks of the paper's 160M anchor, of random numbers, in real
files.

The hierarchical bank is the paper's, (256, 64, 16, 0) on k = 16: 4.6 billion numbers, 9.2 GB in
bfloat16. The flat bank has one level whose blocks are as large as one fetched memory of the other;
of its 256 blocks only as many are written as are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from mlx_hiermem.anchors import openlm
from mlx_hiermem.bank.dtypes import to_storage
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.config import AnchorShape, MemoryConfig
from mlx_hiermem.routing.loading import load_encoder
from mlx_hiermem.routing.tree import ClusterTree

from .made_up import make_documents, write_bert, write_tokenizer

#: The paper's 160M anchor (table of sizes), and one for a smoke run.
ANCHOR_160M = openlm.ModelArgs(512, 35, 2048, 12, 32, vocab_size=50_432, tie_word_embeddings=True)
SMOKE = openlm.ModelArgs(32, 2, 64, 2, 16, vocab_size=512, tie_word_embeddings=True)

RANKS, BRANCHING = (256, 64, 16, 0), 16


def make_config(
    anchor: openlm.ModelArgs, ranks: tuple[int, ...], branching: int, **more: object
) -> MemoryConfig:
    """A memory config in bfloat16."""
    shape = vars(AnchorShape.of(anchor))
    return MemoryConfig(
        ranks=ranks, branching=branching, base_anchor={"name": "made up", "shape": shape}, **more
    )


def flat_config(config: MemoryConfig, anchor: openlm.ModelArgs, blocks: int) -> MemoryConfig:
    """One level of blocks as large as a whole fetch of ``config``."""
    return make_config(anchor, (sum(config.ranks),), blocks)


def write_random_bank(folder: Path, config: MemoryConfig, description: str) -> None:
    """Write a bank of random numbers as small as those of a trained one (deviation 0.02)."""
    rng = np.random.default_rng(0)
    # Rows are cut out of one pool at odd places: as costly to read as fresh numbers, faster to
    # make.
    pool = to_storage(
        rng.standard_normal(max(1 << 24, 2 * config.fetch_size()), np.float32) * np.float32(0.02),
        config.dtype,
    )
    total = config.bank_size() * 2
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=description, leave=False, disable=None
    ) as bar:

        def rows(level: int) -> Iterator[np.ndarray]:
            size = config.block_size(level)
            for cluster in range(config.clusters(level)):
                start = cluster * 7919 % (len(pool) - size)
                yield pool[start : start + size][None]
                bar.update(2 * size)

        levels = {level: rows(level) for level in config.memory_levels}
        write_bank(folder, config, levels, pool[: config.fetch_size()])


def path_to(config: MemoryConfig, leaf: int) -> tuple[int, ...]:
    """The path from the root to a leaf."""
    k, p = config.branching, config.levels
    return tuple(leaf // k ** (p - level) for level in range(1, p + 1))


def write_model(
    folder: Path, anchor: openlm.ModelArgs, encoder: dict, levels: int, branching: int
) -> None:
    """Write a model folder but for its bank: a random anchor, a tokenizer, a BERT that routes (of
    MiniLM's size), a random tree."""
    mx.random.seed(0)
    model = openlm.Model(anchor)
    openlm.init_weights(model)
    model.set_dtype(mx.bfloat16)
    folder.mkdir(parents=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    config = {**asdict(anchor), "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    texts = make_documents(200, 100)
    made = folder / "made"
    write_tokenizer(made, texts, min(8192, anchor.vocab_size))
    for path in made.iterdir():
        path.rename(folder / path.name)
    made.rmdir()
    memory = folder / "memory"
    width = encoder.pop("width")
    write_bert(memory / "encoder", texts, encoder.pop("layers"), width)
    # Vectors of a random BERT lie close together: the tree's centroids are spread as they are, so
    # that different texts have different paths.
    vectors = load_encoder(encoder, folder=memory).encode(make_documents(64, 20, seed=1))
    mean, deviation = vectors.mean(axis=0), vectors.std(axis=0)
    rng = np.random.default_rng(0)
    centroids = [
        mean + deviation * rng.standard_normal((branching**level, width), np.float32)
        for level in range(1, levels + 1)
    ]
    ClusterTree(centroids, encoder).save(memory / "tree.safetensors")
