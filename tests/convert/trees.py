"""Random cluster trees for tests, in the forms that k-means is saved in."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from mlx_hiermem.convert.trees import read_tree
from mlx_hiermem.errors import FormatError
from mlx_hiermem.routing.tree import ClusterTree


def tree_of(branching: int = 3, levels: int = 2, width: int = 4, seed: int = 0) -> list[np.ndarray]:
    """Random centroids: (k^l, c) float32 for each level."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((branching**level, width), np.float32) for level in range(1, levels + 1)
    ]


def nodes_of(tree: list[np.ndarray], between: str = ".") -> dict[str, np.ndarray]:
    """The same by node, each (k, c)."""
    k = len(tree[0])
    found = {"root": tree[0]}
    for above, level in enumerate(tree[1:], 1):
        for row, path in enumerate(itertools.product(range(k), repeat=above)):
            found[between.join(map(str, path))] = level[row * k : (row + 1) * k]
    return found


def named(tree: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"level{level}": array for level, array in enumerate(tree, 1)}


def same(found: ClusterTree, tree: list[np.ndarray]) -> bool:
    return len(found.centroids) == len(tree) and all(
        np.array_equal(one, other) for one, other in zip(found.centroids, tree, strict=True)
    )


def refused(
    path: Path, *parts: str, branching: int | None = None, levels: int | None = None
) -> None:
    """The tree is refused with one line, which names the file and says the parts."""
    with pytest.raises(FormatError) as caught:
        read_tree(path, branching, levels)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 400 + len(str(path))
    for part in parts:
        assert part in text
