"""Growing finds what was planted, keeps clusters balanced, and does not depend on chunking."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hiermem.errors import InputError
from mlx_hiermem.routing.grow import _plus_plus, _rebalance, grow, occupancy


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def planted(n: int, seed: int = 0, k: int = 4, width: int = 16, spread: float = 0.05):
    """(n, width) vectors in k groups of k subgroups each, and each one's subgroup (n,)."""
    rng = np.random.default_rng(seed)
    axes = np.eye(width)
    leaf = rng.integers(k * k, size=n)
    centres = axes[:k].repeat(k, 0) + 0.4 * np.tile(axes[k : 2 * k], (k, 1))
    return unit(centres[leaf] + spread * rng.normal(size=(n, width)) / width**0.5), leaf


def cut(x: np.ndarray, size: int):
    return lambda: (x[i : i + size] for i in range(0, len(x), size))


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a.centroids, b.centroids, strict=True))


def test_planted_clusters_are_found_at_both_levels():
    x, leaf = planted(4000)
    tree = grow(cut(x, 500), 4, 2, steps=10, samples_per_step=400)
    ids, _ = tree.assign(x)
    for level, truth in ((0, leaf // 4), (1, leaf)):
        pairs = np.unique(np.stack([ids[:, level], truth]), axis=1)
        assert pairs.shape[1] == len(np.unique(truth)), "each group is one cluster"
        assert len(np.unique(pairs[0])) == pairs.shape[1]
    # Centroids are means of unit vectors, near those of the groups.
    means = np.stack([x[ids[:, 1] == i].mean(0) for i in range(16)])
    np.testing.assert_allclose(tree.centroids[1], means, atol=0.03)


def test_same_seed_same_bits_other_seed_other_tree():
    x, _ = planted(1000, spread=3.0)
    options = dict(branching=4, levels=2, steps=5, samples_per_step=200)
    assert same(grow(cut(x, 100), seed=3, **options), grow(cut(x, 100), seed=3, **options))
    assert not same(grow(cut(x, 100), seed=3, **options), grow(cut(x, 100), seed=4, **options))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 700), st.sampled_from([1, 1 << 13, 1 << 14, 1 << 30]), st.integers(1, 300))
def test_chunks_and_buffers_do_not_change_the_tree(size, buffer_bytes, n):
    x, _ = planted(n, spread=3.0)
    options = dict(branching=3, levels=3, steps=4, samples_per_step=50, seed=1)
    expected = grow(lambda: [x], **options)
    assert same(grow(cut(x, size), buffer_bytes=buffer_bytes, **options), expected)


def test_vectors_are_normalised_first():
    x, _ = planted(500)
    scale = np.random.default_rng(1).uniform(0.1, 10, (500, 1)).astype(np.float32)
    options = dict(branching=4, levels=2, steps=5, samples_per_step=100)
    a, b = grow(lambda: [x], **options), grow(lambda: [x * scale], **options)
    for level in range(2):
        np.testing.assert_allclose(a.centroids[level], b.centroids[level], atol=1e-5)


def skewed(n: int = 6000):
    """Two thirds of all vectors in one tight heap, too small to win centroids by its spread."""
    rng = np.random.default_rng(0)
    heap = np.eye(12)[0] + 0.02 * rng.normal(size=(2 * n // 3, 12))
    rest = rng.normal(size=(n - len(heap), 12))
    return rng.permutation(unit(np.concatenate([heap, rest])))


def test_the_balance_rule_limits_the_largest_cluster():
    x = skewed()
    options = dict(branching=8, levels=1, steps=20, samples_per_step=600)
    share = {}
    for balance in (None, 1.5):
        (counts,) = occupancy(grow(cut(x, 500), balance=balance, **options), cut(x, 500))
        assert counts.sum() == len(x)
        share[balance] = counts.max() / counts.sum()
    assert share[None] > 0.6
    assert share[1.5] < 0.3


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(2, 16), st.floats(1.01, 4), st.integers(0, 2**32))
def test_after_the_balance_rule_no_cluster_is_too_large(n, k, balance, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(rng.integers(1, k + 1), size=n)
    before = labels.copy()
    _rebalance(labels, k, balance, rng)
    sizes, old = np.bincount(labels, minlength=k), np.bincount(before, minlength=k)
    # Sizes that differ by one cannot be evened out further.
    assert sizes.max() <= balance * n / k or sizes.max() - sizes.min() <= 1
    if old.max() <= balance * n / k:
        np.testing.assert_array_equal(labels, before)


def test_the_balance_rule_splits_evenly_with_the_smallest():
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    _rebalance(labels, 3, 1.5, np.random.default_rng(0))
    assert np.bincount(labels).tolist() == [35, 30, 35]
    assert (labels[60:90] == 1).all() and (labels[90:] == 2).all()
    # At random: not the first or the last ones.
    moved = np.flatnonzero(labels[:60] == 2)
    assert moved.max() - moved.min() > 25


def test_plus_plus_starts_from_distinct_far_rows():
    x = np.eye(8, dtype=np.float32)[np.arange(800) % 8]
    start = _plus_plus(x, 8, np.random.default_rng(0))
    assert len(np.unique(start, axis=0)) == 8


def test_fewer_distinct_vectors_than_children():
    x = np.eye(3, dtype=np.float32)[np.arange(30) % 3]
    options = dict(branching=4, levels=3, steps=3, samples_per_step=7)
    tree = grow(lambda: [x], **options)
    assert [c.shape for c in tree.centroids] == [(4, 3), (16, 3), (64, 3)]
    assert same(tree, grow(lambda: [x], **options))
    ids, distances = tree.assign(np.eye(3, dtype=np.float32))
    assert len(np.unique(ids[:, 0])) == 3
    np.testing.assert_allclose(distances[:, 0], 0, atol=1e-6)


def test_one_vector_is_enough():
    x = np.array([[3.0, 4.0]], np.float32)
    tree = grow(lambda: [x], 2, 2)
    np.testing.assert_allclose(tree.centroids[1], np.tile([[0.6, 0.8]], (4, 1)), atol=1e-6)


def readings(x: np.ndarray, size: int):
    """A stream that counts how often it is opened and how many vectors are taken from it."""
    seen = {"opened": 0, "vectors": 0}

    def chunks():
        seen["opened"] += 1
        for i in range(0, len(x), size):
            seen["vectors"] += len(x[i : i + size])
            yield x[i : i + size]

    return chunks, seen


def test_a_long_stream_is_read_no_further_than_its_steps_need():
    x, _ = planted(5000)
    chunks, seen = readings(x, 100)
    grow(chunks, 4, 1, steps=5, samples_per_step=200)
    # Once for the width (one chunk), once for five steps of 200 new examples.
    assert seen == {"opened": 2, "vectors": 100 + 1000}


def test_a_short_stream_is_opened_again_and_a_tiny_one_serves_every_step():
    x, _ = planted(300)
    chunks, seen = readings(x, 300)
    grow(chunks, 4, 1, steps=5, samples_per_step=200)
    assert seen["opened"] == 1 + 4  # 1,000 examples are four readings of 300
    chunks, seen = readings(x, 300)
    grow(chunks, 4, 1, steps=5, samples_per_step=301)
    assert seen["opened"] == 1 + 1


def test_a_level_that_wants_more_than_the_buffers_hold_takes_more_readings():
    x, _ = planted(300)
    one_node = 301 * x.shape[1] * 4
    for nodes, passes in ((1, 4), (2, 2), (3, 2), (4, 1)):
        chunks, seen = readings(x, 300)
        grow(chunks, 4, 2, steps=5, samples_per_step=301, buffer_bytes=nodes * one_node)
        assert seen["opened"] == 1 + 1 + passes


def test_progress_reaches_the_end_of_each_level():
    x, _ = planted(300)
    calls = []
    grow(lambda: [x], 3, 2, steps=4, samples_per_step=50, progress=lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert {(level, total) for level, _, total in calls} == {(1, 4), (2, 12)}
    assert (1, 4, 4) in calls and (2, 12, 12) in calls


@pytest.mark.parametrize(
    "chunks, says",
    [
        (lambda: [], "no vectors"),
        (lambda: [np.empty((0, 4))], "no vectors"),
        (lambda: [np.ones((2, 4)), np.ones((2, 3))], r"\(2, 3\).*\(n, 4\)"),
        (lambda: [np.array([[1, 0], [np.nan, 0]])], "row 1 .* not finite"),
        (lambda: [np.array([[1, 0], [0, 0]])], "row 1 .* is zero"),
        (lambda: [np.ones(4)], r"shape is \(1,\)"),
    ],
)
def test_a_bad_stream_is_refused(chunks, says):
    with pytest.raises(InputError, match=says):
        grow(chunks, 2, 1, samples_per_step=2)


@pytest.mark.parametrize("size", [40, 100])
def test_an_iterator_that_is_used_up_is_refused(size):
    left = cut(planted(100)[0], size)()
    with pytest.raises(InputError, match="same arrays each time"):
        grow(lambda: left, 2, 1, samples_per_step=50)


@pytest.mark.parametrize(
    "options",
    [{"branching": 1}, {"levels": 0}, {"steps": 0}, {"samples_per_step": 0}, {"balance": 1.0}],
)
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        grow(lambda: [np.eye(4)], **options)
