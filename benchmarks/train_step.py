"""A training step with memories against the anchor's own, and what a larger bank costs.

``python -m benchmarks.train_step [--smoke] [--json FILE]``. Rows:

- ``train.frozen_vs_anchor``, ``train.cotrain_vs_anchor``: step with memories ÷ the anchor's step,
  the same tokens;
- ``train.bank100x_vs_bank1x``: step with a bank 100 times as large ÷ step with the bank;
- ``train.rss_vs_floor``: peak memory with a bank 10 times the budget ÷ (peak of the same step
  without a bank + the budget);
- ``train.anchor_tokens_per_second``, ``train.cotrain_tokens_per_second``, and the share of the
  machine's own matrix product that the anchor's step reaches;
- ``cluster.throughput_vs_encoder``: documents per second of ``cluster`` ÷ of its encoder alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hiermem.backend import backend_name, keep_freed_memory
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.memories import attach
from mlx_hiermem.training.config import TrainConfig
from mlx_hiermem.training.rows import BankRows
from mlx_hiermem.training.trainer import Trainer

from .harness import Row, Times, in_fresh_process, interleave, main, ratio
from .made_up import (
    Sizes,
    flops_per_token,
    make_anchor,
    make_config,
    make_corpus,
    make_documents,
    sizes,
    write_bert,
    write_documents,
    write_tokenizer,
)

#: Of all rows in memory: less than the rows of level 1 take, so that rows are read and written.
BUDGET = 512 << 20

NAME = "train_step"


def measure(smoke: bool) -> list[Row]:
    """All rows."""
    if backend_name() == "cpu":
        keep_freed_memory()  # as the command does
    return [*step_rows(smoke), memory_row(smoke), cluster_row(smoke)]


# ---- time of a step --------------------------------------------------------------------


def step_rows(smoke: bool) -> list[Row]:
    """The rows about time: all steps in turns, in one process."""
    size = sizes(smoke)
    with tempfile.TemporaryDirectory() as folder, _trainers(size, Path(folder)) as trainers:
        tasks = {name: trainer.step for name, trainer in trainers.items()}
        times = interleave(tasks, size.rounds, warmup=2)
        anchor = trainers["anchor"]
        share = flops_per_token(anchor.anchor, size.length)
        small, large = (_parameters(size, ranks) for ranks in (size.ranks, size.ranks_100x))
    tokens = size.batch_size * size.length
    about = f"{size.batch_size} sequences of {size.length} tokens, {size.dtype}"
    return [
        ratio("train.frozen_vs_anchor", times, "frozen", "anchor", "<= 1.7", about),
        ratio("train.cotrain_vs_anchor", times, "cotrain", "anchor", "<= 1.7", about),
        ratio(
            "train.bank100x_vs_bank1x", times, "bank100x", "frozen", "<= 1.1",
            f"{large:.3g} parameters against {small:.3g}, budget {BUDGET >> 20} MiB",
        ),
        _speed("anchor", times, tokens, about),
        _speed("cotrain", times, tokens, about),
        _share_of_matmul(times["anchor"], share * tokens, size, smoke),
    ]  # fmt: skip


@contextmanager
def _trainers(size: Sizes, folder: Path) -> Iterator[dict[str, Trainer]]:
    """A trainer for each kind of step; banks are in files under ``folder``."""
    trainers = {"anchor": make_trainer(size, "anchor")}
    for name, regime, ranks in (
        ("frozen", "frozen", size.ranks),
        ("cotrain", "cotrain", size.ranks),
        ("bank100x", "frozen", size.ranks_100x),
    ):
        trainers[name] = make_trainer(size, regime, ranks, folder / name, BUDGET)
    try:
        yield trainers
    finally:
        for trainer in trainers.values():
            if trainer.rows is not None:
                trainer.rows.close()


def make_trainer(
    size: Sizes,
    regime: str,
    ranks: tuple[int, ...] = (),
    folder: Path | None = None,
    budget: int | None = None,
) -> Trainer:
    """A trainer of a regime; with memories its bank is in files, or fixed where none are given."""
    config = TrainConfig(regime, iters=1_000_000, batch_size=size.batch_size, dtype=size.dtype)
    anchor = make_anchor(size)
    if regime == "anchor":
        return Trainer(anchor, make_corpus(size, len(size.ranks)), config)
    memory = make_config(size, ranks)
    model = attach(anchor, memory)

    def start(level: int, cluster: int) -> np.ndarray:
        return model.init_block(level, cluster, config.seed)

    if folder is None:
        rows: Any = FixedRows(memory, anchor, size.batch_size, start)
    else:
        rows = BankRows(memory, start, folder, budget, anchor)
    return Trainer(model, make_corpus(size, len(ranks)), config, rows)


def _parameters(size: Sizes, ranks: tuple[int, ...]) -> int:
    return make_config(size, ranks).bank_size(size.anchor)


def _speed(name: str, times: dict[str, Times], tokens: int, about: str) -> Row:
    return Row(f"train.{name}_tokens_per_second", tokens / times[name].median, "", about)


def _share_of_matmul(step: Times, flops: int, size: Sizes, smoke: bool) -> Row:
    """The step's operations per second ÷ those of one large matrix product on this machine."""
    width = 256 if smoke else 4096 if backend_name() == "cpu" else 16384
    matrix = mx.random.normal((width, width)).astype(getattr(mx, size.dtype))
    product = interleave({"matmul": lambda: mx.eval(matrix @ matrix)}, 5)["matmul"]
    best = 2 * width**3 / min(product.seconds)
    found = flops / step.median
    detail = (
        f"{found / 1e12:.3g} TFLOP/s of a {size.dtype} matrix product's {best / 1e12:.3g}, which "
        "includes attention and the head but not the optimizer"
    )
    return Row("train.anchor_share_of_matmul", found / best, "", detail)


# ---- memory of a step ------------------------------------------------------------------


class FixedRows:
    """In place of a bank: the rows of one batch as constants. Everything else of a step stays.

    A step with this in it is what the step with a bank is compared to.
    """

    def __init__(self, config: MemoryConfig, anchor: Any, batch: int, start: Any) -> None:
        self.levels = config.memory_levels
        self.sizes = {level: config.block_size(level, anchor) for level in self.levels}
        # One row after the other, so that no more than the batch is ever there.
        self._blocks = [np.empty((batch, self.sizes[level]), np.float32) for level in self.levels]
        for level, block in zip(self.levels, self._blocks, strict=True):
            for number in range(batch):
                block[number] = start(level, number)

    def ids(self, leaves: np.ndarray, use_generic: np.ndarray) -> np.ndarray:
        return np.tile(np.arange(len(leaves))[:, None], len(self.levels))

    def keys(self, ids: np.ndarray) -> list[tuple[int, int]]:
        return [(level, number) for level in self.levels for number in range(len(ids))]

    def gather(self, ids: np.ndarray) -> list[np.ndarray]:
        return self._blocks

    def prefetch(self, ids: np.ndarray) -> None:
        pass

    def update(self, *args: Any) -> None:
        pass

    def close(self) -> None:
        pass


def memory_row(smoke: bool) -> Row:
    """Peak memory with a bank that is 10 times the budget."""
    size = sizes(smoke)
    budget = 4 * _parameters(size, size.ranks) // 10
    floor = in_fresh_process(take_steps, smoke=smoke)
    bank = in_fresh_process(take_steps, smoke=smoke, budget=budget)
    allowed = floor.peak + budget
    detail = (
        f"peak {bank.peak / 1e6:,.0f} MB with a bank of {40 * budget / 4e6:,.0f} MB (values alone; "
        f"three times that with its optimizer state) ÷ ({floor.peak / 1e6:,.0f} MB without a bank "
        f"+ budget {budget / 1e6:,.0f} MB); co-trained, {bank.result['steps']} steps, rows in "
        f"memory {bank.result['rows'] / 1e6:,.0f} MB"
    )
    return Row("train.rss_vs_floor", bank.peak / allowed, "<= 1.2", detail)


def take_steps(smoke: bool, budget: int | None = None) -> dict[str, int]:
    """Co-train until the budget is full, and some steps more; without a budget a few steps."""
    if backend_name() == "cpu":
        keep_freed_memory()
    size = sizes(smoke)
    with tempfile.TemporaryDirectory() as folder:
        files = None if budget is None else Path(folder)
        trainer = make_trainer(size, "cotrain", size.ranks, files, budget)
        steps = 3 if smoke else 12
        for _ in range(steps):
            trainer.step()
        rows = 0 if budget is None else trainer.rows.bytes
        trainer.rows.close()
    return {"steps": steps, "rows": rows}


# ---- cluster ---------------------------------------------------------------------------


def cluster_row(smoke: bool) -> Row:
    """Documents per second of ``cluster`` with a tree given ÷ of the encoder alone."""
    from mlx_hiermem.corpus.build import build_corpus
    from mlx_hiermem.corpus.config import CorpusConfig
    from mlx_hiermem.routing import load_encoder
    from mlx_hiermem.routing.tree import ClusterTree

    count, words, layers, width = (40, 20, 1, 32) if smoke else (200, 600, 6, 384)
    if not smoke and backend_name() != "cpu":
        count = 20_000
    texts = make_documents(count, words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(folder / "documents.jsonl", texts)
        write_tokenizer(folder / "tokenizer", texts[:200], 8192)
        write_bert(folder / "encoder", texts[:200], layers, width)
        # A BERT from a folder is found from where the tree is, as cluster leaves it.
        encoder = {"type": "bert", "model": "encoder", "max_length": 256}
        alone = load_encoder(encoder, folder=folder)
        rng = np.random.default_rng(0)
        levels = 2 if smoke else 4
        centroids = [rng.standard_normal((16**level, width)) for level in range(1, levels + 1)]
        ClusterTree(centroids, encoder).save(folder / "tree.safetensors")
        config = CorpusConfig(
            data=(str(folder / "documents.jsonl"),),
            tokenizer=folder / "tokenizer",
            tree=folder,
            validation=0.0,
        )
        made = iter(range(1000))
        tasks = {
            "encoder": lambda: alone.encode(texts),
            "cluster": lambda: build_corpus(folder / f"corpus-{next(made)}", config),
        }
        times = interleave(tasks, 1 if smoke else 3)
    rates = {name: count / found.median for name, found in times.items()}
    about = (
        f"{count} documents of about {words} words, a BERT of {layers} layers of {width}, 256 "
        f"tokens; {rates['cluster']:.1f} ÷ {rates['encoder']:.1f} documents/s, reading, "
        "tokenising, routing, packing and writing included"
    )
    return ratio("cluster.throughput_vs_encoder", times, "encoder", "cluster", ">= 0.9", about)


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure))
