"""Small parts and splits of made-up documents, for the tests of what is packed on disk."""

from __future__ import annotations

import numpy as np

from mlx_hiermem.corpus.part import Part, write_part
from mlx_hiermem.corpus.writer import Placed, write_split

#: Tokens of a sequence and of a window, and the end-of-text token.
LENGTH, WINDOW, END = 8, 16, 0


def make_part(documents, dtype=np.uint16):
    """A part of documents (lists of token ids from 1 on), cut into windows of WINDOW tokens."""
    texts = [np.asarray([*document, END], dtype) for document in documents]
    windows = [
        (number, text[start : start + WINDOW])
        for number, text in enumerate(texts)
        for start in range(0, len(text), WINDOW)
    ]
    lengths = [len(window) for _, window in windows]
    return Part(
        tokens=np.concatenate([np.empty(0, dtype), *texts]),
        starts=np.append(0, np.cumsum(lengths)).astype(np.int64),
        documents=np.asarray([number for number, _ in windows], np.int64),
        rows_window=np.arange(len(windows)),
        vectors=np.zeros((len(windows), 2), np.float32),
    )


def place(folder, parts, leaves=5, seed=0):
    """Write parts; each of their windows goes under a random leaf."""
    rng = np.random.default_rng(seed)
    placed = []
    for number, part in enumerate(parts):
        write_part(folder / f"{number}.part", part)
        windows = np.arange(part.windows)
        chosen = rng.integers(0, leaves, part.windows)
        placed.append(Placed(folder / f"{number}.part", windows, chosen))
    return placed


def write(folder, placed, **options):
    options = {
        "length": LENGTH, "end_of_text": END, "vocab_size": 1000, "seed": 0, "shard_bytes": 64
    } | options  # fmt: skip
    return write_split(folder, placed, **options)


def read(folder, info):
    """(tokens (N, T), leaves (N,)) of all shards of a split."""
    tokens = [np.load(folder / shard.tokens, allow_pickle=False) for shard in info.shards]
    leaves = [np.load(folder / shard.leaves, allow_pickle=False) for shard in info.shards]
    return np.concatenate(tokens), np.concatenate(leaves)


def many(count=200, seed=0, high=900):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, high, rng.integers(1, 40)).tolist() for _ in range(count)]
