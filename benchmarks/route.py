"""Finding the path of a vector: what a larger tree costs, and what a flat one would.

``python -m benchmarks.route [--smoke] [--json FILE]``. Trees of 16 children per cluster and vectors
as wide as MiniLM's; each vector goes its own way, so that nothing of the tree is in the cache by
chance. The encoder is not part of it. Rows are ratios of times, for one vector at a time and
(``@batch``) for many:

- ``route.65536_vs_256``: a tree of 65,536 leaves (four levels) ÷ one of 256 (two): twice the
  comparisons;
- ``route.flat_vs_tree``: the nearest of all 65,536 leaves, by a matrix product ÷ the tree's path.
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_hiermem.backend import preload_blas

preload_blas()

import numpy as np  # noqa: E402  (after the BLAS)

from mlx_hiermem.routing.tree import ClusterTree  # noqa: E402

from .harness import Row, interleave, main, ratio  # noqa: E402

NAME = "route"

K, WIDTH = 16, 384
#: Vectors of a round, one at a time and at once.
ALONE, BATCH = 200, 1024
GOAL = "<= 2.2"


def measure(smoke: bool) -> list[Row]:
    """All rows."""
    random = np.random.default_rng(0)
    deep, shallow = (grow(levels, random) for levels in (4, 2))
    leaves = deep.centroids[-1]
    vectors = unit(random, BATCH)

    def one_by_one(route: Callable[[np.ndarray], object]) -> None:
        for vector in vectors[:ALONE]:
            route(vector[None])

    def flat(some: np.ndarray) -> np.ndarray:
        # The centroids have unit length, so the nearest has the largest product.
        return (some @ leaves.T).argmax(axis=1)

    ways = {"65536": deep.assign, "256": shallow.assign, "flat": flat}
    tasks = {name: lambda route=route: one_by_one(route) for name, route in ways.items()}
    tasks |= {f"{name}@batch": lambda route=route: route(vectors) for name, route in ways.items()}
    times = interleave(tasks, 2 if smoke else 30)
    rows = []
    for at, about in (("", f"{ALONE} vectors, one by one"), ("@batch", f"{BATCH} vectors at once")):
        about = f"{about}, width {WIDTH}, k {K}"
        rows += [
            ratio(f"route.65536_vs_256{at}", times, f"65536{at}", f"256{at}", GOAL, about),
            ratio(f"route.flat_vs_tree{at}", times, f"flat{at}", f"65536{at}", "", about),
        ]
    return rows


def unit(random: np.random.Generator, count: int) -> np.ndarray:
    """Vectors (count, WIDTH) float32 of unit length."""
    vectors = random.standard_normal((count, WIDTH), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def grow(levels: int, random: np.random.Generator) -> ClusterTree:
    """A tree whose centroids are anywhere: what a path costs does not depend on where they are."""
    return ClusterTree([unit(random, K**level) for level in range(1, levels + 1)])


if __name__ == "__main__":
    main(NAME, measure)
