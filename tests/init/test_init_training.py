"""What follows ``init``: clustering, training, answers; and asking a bank without a tree."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mlx_hiermem
from mlx_hiermem import MemoryConfig, cli
from mlx_hiermem.apps.demo.worker import Ask, ModelThread
from mlx_hiermem.evaluation.facts import QUESTIONS_FILE
from mlx_hiermem.making import make_model
from mlx_hiermem.memories import start_block
from tests.init.fresh import SMALL, init, logits
from tests.training.runs import bank

# ---- from a fresh bank to a trained one ------------------------------------------------


def command(*arguments: object) -> int:
    return cli.main([str(one) for one in arguments])


def train(model: Path, corpus: Path, run: Path, *more: object) -> int:
    return command(
        "train", "--model", model, "--data", corpus, "--run", run, "--regime", "frozen", "--iters",
        6, "--batch-size", 8, "--learning-rate", 0.01, "--val-batches", 0, *more,
    )  # fmt: skip


def test_init_cluster_train_generate(place, tmp_path, capsys):
    out, corpus, run = (tmp_path / name for name in ("fresh", "corpus", "run"))
    given = ("--kind", "kv", "--layers", "late", "--bank-dtype", "float32")
    assert init(place / "llama", out, *SMALL, *given) == 0
    assert command(
        "cluster", "--model", out, "--data", place / "some.jsonl", "--encoder", "embeddings",
        "--branching", 3, "--levels", 2, "--sequence-length", 32, "--out", corpus,
    ) == 0  # fmt: skip
    assert train(out, corpus, run) == 0
    capsys.readouterr()
    ask = ["generate", "--model", run / "model", "--prompt", "some words", "--max-tokens", 3]
    assert command(*ask, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory"] == "fetched" and len(told["path"]) == 2
    assert told["generation_tokens"] == 3

    # It is what init said, and it has learned from start values.
    fresh_config = MemoryConfig.load(out / "memory" / "config.json")
    trained = MemoryConfig.load(run / "model" / "memory" / "config.json")
    assert trained == replace(
        fresh_config, encoder=trained.encoder, base_anchor=trained.base_anchor
    )
    assert trained.base_anchor["shape"] == fresh_config.base_anchor["shape"]
    blocks = bank(run / "model")
    assert all(block.any() for block in blocks.values())
    unchanged = [key for key in blocks if np.array_equal(blocks[key], start(trained, *key))]
    assert len(unchanged) < len(blocks) / 2
    lm = mlx_hiermem.load(run / "model")
    assert not np.array_equal(logits(lm, "fetched"), logits(lm, "none"))


def start(config: MemoryConfig, level: int, cluster: int | None) -> np.ndarray:
    return start_block(config, level, -1 if cluster is None else cluster, 0)


def test_training_from_zeros_is_training_from_nothing(place, tmp_path):
    """The same bank as from an anchor without one, also where the zeros have a tree."""
    assert train(place / "anchor", place / "corpus", tmp_path / "none", "--ranks", "4,2") == 0
    plain = make_model(place / "anchor", tmp_path / "plain", (4, 2), branching=3)
    routed = make_model(place / "anchor", tmp_path / "routed", (4, 2), tree=place / "corpus")
    expected = bank(tmp_path / "none" / "model")
    assert any(block[: block.size // 3].any() for block in expected.values())
    for made in (plain, routed):
        run = tmp_path / f"run-{made.folder.name}"
        assert train(made.folder, place / "corpus", run) == 0
        found = bank(run / "model")
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_what_is_given_to_train_has_to_be_the_bank_s(place, tmp_path, capsys):
    made = make_model(place / "anchor", tmp_path / "out", (4, 2), branching=3)
    for given, says in (
        (["--ranks", "4,3"], r"ranks is \(4, 2\), this run's \(4, 3\); give the same"),
        (["--kind", "kv"], r"kind is ffn, this run's kv; give the same"),
        (["--memory-layers", "late"], r"layers is None, this run's \(1,\); give the same"),
    ):
        assert train(made.folder, place / "corpus", tmp_path / "run", *given) == 2
        assert re.search(says, last_line(capsys))
    given = ["--ranks", "1,1", "--kind", "kv", "--bank-dtype", "float16", "--fresh-memory"]
    assert train(made.folder, place / "corpus", tmp_path / "run", *given) == 0
    config = MemoryConfig.load(tmp_path / "run" / "model" / "memory" / "config.json")
    assert (config.ranks, config.kind, config.dtype) == ((1, 1), "kv", "float16")


def test_a_corpus_of_another_shape(place, tmp_path, capsys):
    made = make_model(place / "anchor", tmp_path / "out", (4, 2, 1))
    assert train(made.folder, place / "corpus", tmp_path / "run") == 2
    assert re.search(
        "is for a tree of branching 16 and 3 levels, that of .* has 3 and 2; cluster with "
        "--branching 16 --levels 3, or give --fresh-memory",
        last_line(capsys),
    )


def last_line(capsys) -> str:
    """What the error says; the settings are printed before it."""
    return capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]


# ---- a bank without a tree -------------------------------------------------------------


ASKS = {
    "generate": ["generate", "--model", "{bare}", "--prompt", "a b"],
    "inspect": ["bank", "inspect", "--model", "{bare}", "--text", "{place}/some.jsonl"],
    "perplexity": [
        "evaluate", "--model", "{bare}", "--task", "perplexity", "--text", "{place}/some.jsonl",
        "--limit", "2",
    ],
    "facts": ["evaluate", "--model", "{asked}", "--bank", "{bare}/memory", "--task", "facts"],
    "routing": ["evaluate", "--model", "{asked}", "--bank", "{bare}/memory", "--task", "routing"],
}  # fmt: skip


@pytest.mark.parametrize("name", ASKS)
def test_what_needs_a_tree_says_so(place, bare, tmp_path, capsys, name):
    asked = shutil.copytree(place / "model", tmp_path / "asked")
    (asked / "evaluation").mkdir()
    question = {
        "prompt": "a b is", "continuation": " c.", "answer": "c", "family": "f", "count": 1,
        "bucket": 0, "leaves": [1],
    }  # fmt: skip
    lines = [{"buckets": ["all"]}, question]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (asked / QUESTIONS_FILE).write_bytes(gzip.compress(text.encode()))
    arguments = [one.format(bare=bare, place=place, asked=asked) for one in ASKS[name]]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(
        r"mlx_hiermem: error: [^\n]*bare/memory: this bank has no tree, so no text can be routed; "
        r"make a corpus with `mlx_hiermem cluster` and train on it, or ask with [^\n]+\n",
        captured.err,
    )


def test_what_needs_no_tree_works(bare, capsys):
    base = ["generate", "--model", str(bare), "--prompt", "a b", "--max-tokens", "3", "--json"]
    answers = set()
    for more in (["--memory", "none"], ["--memory", "generic"], ["--path", "1,4"]):
        assert cli.main([*base, *more]) == 0
        answers.add(json.loads(capsys.readouterr().out)["text"])
    assert len(answers) == 1
    assert cli.main(["bank", "inspect", "--model", str(bare)]) == 0


def test_chat_goes_on(bare, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b\n/memory none\na b\n"))
    assert cli.main(["chat", "--model", str(bare), "--max-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert "error: " in captured.err and "this bank has no tree" in captured.err
    assert "[memory none; " in captured.err


def test_the_demo_s_worker_goes_on(bare):
    thread = ModelThread(lambda: mlx_hiermem.load(bare))
    thread.start()
    try:
        end = thread.submit(Ask("a b", max_tokens=2)).take(timeout=60)[-1]
        assert end.reason == "error" and "this bank has no tree" in end.error
    finally:
        thread.close()
