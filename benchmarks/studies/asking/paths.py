"""Cluster paths beside the routed one: the next nearest, and random ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_hiermem.routing.tree import ClusterTree

#: No cluster: a question has fewer wrong ones than others.
NO_CLUSTER = -1


def children(tree: ClusterTree, vectors: np.ndarray, parents: np.ndarray, level: int) -> np.ndarray:
    """L2 distances from vectors (N, c) to the children, at ``level``, of parents (N,): (N, count).

    The root has ``tree.roots`` children, all others k.
    """
    count = child_count(tree, level)
    offset = tree.centroids[level - 1].reshape(-1, count, tree.width)[parents]
    return np.sqrt(np.square(offset - vectors[:, None]).sum(-1))


def child_count(tree: ClusterTree, level: int) -> int:
    """How many children, at ``level``, a parent has: k; the root's are all of level 1."""
    return tree.roots if level == 1 else tree.branching


def complete(
    tree: ClusterTree, vectors: np.ndarray, level: int, clusters: np.ndarray
) -> np.ndarray:
    """Paths (N, p) int64 through given clusters (N,) of a level, and greedily down from there.

    Args:
        vectors: (N, c), of what is routed.
    """
    k, p = tree.branching, tree.levels
    paths = np.empty((len(clusters), p), np.int64)
    for above in range(1, level + 1):
        paths[:, above - 1] = clusters // k ** (level - above)
    for below in range(level + 1, p + 1):
        parents = paths[:, below - 2]
        nearest = children(tree, vectors, parents, below).argmin(1)
        paths[:, below - 1] = k * parents + nearest
    return paths


def wrong_clusters(
    tree: ClusterTree,
    vectors: np.ndarray,
    paths: np.ndarray,
    level: int,
    trained: Sequence[Sequence[int]],
) -> np.ndarray:
    """The wrong clusters beside a path's cluster of one level, the nearest first.

    A wrong one has the same parent as the path's, and no leaf below it in which the fact was
    trained.

    Args:
        vectors: (N, c).
        paths: (N, p), right ones.
        level: where the path goes wrong.
        trained: per question the leaves in which its fact was trained.

    Returns:
        (N, children - 1) int64; ``NO_CLUSTER`` at the end of a row that has fewer.
    """
    k, p = tree.branching, tree.levels
    parents = paths[:, level - 2] if level > 1 else np.zeros(len(paths), np.int64)
    order = children(tree, vectors, parents, level).argsort(1, kind="stable")
    found = np.full((len(paths), order.shape[1] - 1), NO_CLUSTER)
    for row, path, parent, near, leaves in zip(found, paths, parents, order, trained, strict=True):
        known = {leaf // k ** (p - level) for leaf in leaves} | {int(path[level - 1])}
        wrong = [k * parent + child for child in near.tolist() if k * parent + child not in known]
        row[: len(wrong)] = wrong
    return found


def random_below(
    rng: np.random.Generator, tree: ClusterTree, level: int, clusters: np.ndarray
) -> np.ndarray:
    """Paths (N, p) through given clusters of a level, with a random leaf below each."""
    k, p = tree.branching, tree.levels
    below = k ** (p - level)
    leaves = clusters * below + rng.integers(below, size=len(clusters))
    return leaves[:, None] // k ** np.arange(p)[::-1]


def second_paths(tree: ClusterTree, vectors: np.ndarray, paths: np.ndarray) -> np.ndarray:
    """The nearest other leaf's path that a beam of two finds, (N, p) int64.

    The beam holds, at each level, the routed cluster and the nearest of the other children of both.

    Args:
        vectors: (N, c).
        paths: (N, p), as the vectors are routed.
    """
    k, p = tree.branching, tree.levels
    beam = np.zeros((len(paths), 1), np.int64)  # the root
    for level in range(1, p + 1):
        below = np.arange(child_count(tree, level))
        clusters = (k * beam[:, :, None] + below).reshape(len(paths), -1)
        far = np.concatenate(
            [children(tree, vectors, parents, level) for parents in beam.T], axis=1
        )
        own = paths[:, level - 1]
        far[clusters == own[:, None]] = np.inf
        other = clusters[np.arange(len(paths)), far.argmin(1)]
        beam = np.stack([own, other], axis=1)
    return beam[:, 1:] // k ** np.arange(p)[::-1]
