"""``find_radius`` compares a slice of the texts at a time: the same number, in little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from mlx_hiermem.corpus import private
from mlx_hiermem.corpus.private import WITHIN, find_radius, grow_subtree


def make_vectors(count: int, width: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def radius_at_once(vectors: np.ndarray, roots: int, branching: int, levels: int) -> float:
    """The same with all texts in one array, written out."""
    order = np.random.default_rng([0, 1]).permutation(len(vectors))
    far = []
    for known, asked in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        centroids, _ = grow_subtree(vectors[known], roots, branching, levels)
        node, fan = np.zeros(len(asked), np.int64), roots
        for level in centroids:
            children = level.reshape(-1, fan, level.shape[1])[node]
            distances = np.linalg.norm(children - vectors[asked][:, None], axis=2)
            node, fan = node * fan + distances.argmin(axis=1), branching
        far.append(distances.min(axis=1))
    return float(np.quantile(np.concatenate(far), WITHIN))


@pytest.mark.parametrize(("roots", "branching", "levels"), [(1, 4, 2), (3, 2, 3), (5, 3, 1)])
@pytest.mark.parametrize("rows", [0, 1, 7, 64])
def test_slices_change_nothing(monkeypatch, roots, branching, levels, rows):
    vectors = make_vectors(301, 20)
    expected = radius_at_once(vectors, roots, branching, levels)
    monkeypatch.setattr(private, "_NUMBERS", rows * max(roots, branching) * 20)
    assert find_radius(vectors, roots, branching, levels) == expected


def test_memory_does_not_follow_the_number_of_texts(monkeypatch):
    """All at once would be 4,000 x 16 x 64 numbers, 16 MB, a few times over."""
    vectors = make_vectors(8000, 64)
    order = np.arange(16)
    centroids = [vectors[:1], vectors[order]]
    monkeypatch.setattr(private, "grow_subtree", lambda *_: (centroids, None))
    monkeypatch.setattr(private, "_NUMBERS", 1 << 16)
    tracemalloc.start()
    try:
        find_radius(vectors, 1, 16, 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_a_slice_of_a_usual_tree_is_some_thousand_texts():
    assert 1000 < private._NUMBERS // (16 * 384) < 10_000
