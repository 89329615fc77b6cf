"""Checks of what names a block: levels, clusters and cluster paths.

Levels count from 1; clusters count from 0 within their level, and the parent of cluster i is
cluster i // k of the level above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import MemoryConfig
from ..errors import PathError


def integer(value: Any) -> int | None:
    """``value`` as an int; None if it is none. NumPy integers are, truth values are not."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        return None
    try:
        return value.__index__()
    except TypeError:  # an array of several numbers
        return None


def check_level(config: MemoryConfig, level: Any) -> int:
    """``level`` as an int; PathError if the bank has no memory there."""
    number = integer(level)
    if number not in config.memory_levels:
        raise PathError(
            f"level {str(level)[:40]!r} has no memory; levels with memory are "
            f"{', '.join(map(str, config.memory_levels))}"
        )
    return number


def check_cluster(config: MemoryConfig, level: int, cluster: Any) -> int:
    """``cluster`` as an int; PathError if ``level`` has no such cluster."""
    number = integer(cluster)
    clusters = config.clusters(level)
    if number is None or not 0 <= number < clusters:
        raise PathError(
            f"cluster {str(cluster)[:40]!r} of level {level} does not exist; its clusters are "
            f"0 to {clusters - 1}"
        )
    return number


def check_block(config: MemoryConfig, pair: Any) -> tuple[int, int]:
    """``pair`` as the (level, cluster) of a block; PathError if the bank has no such block."""
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise PathError(f"block {str(pair)[:40]!r}: expected a pair (level, cluster)")
    level, cluster = check_level(config, pair[0]), pair[1]
    return level, check_cluster(config, level, cluster)


def check_path(config: MemoryConfig, path: Sequence[int]) -> list[int]:
    """``path`` as ints; PathError if it is not a path of the tree, from level 1 to the leaf."""
    shown = str(path)[:80]
    if isinstance(path, str | bytes) or not hasattr(path, "__len__"):
        raise PathError(f"cluster path {shown!r}: expected {config.levels} cluster ids")
    if len(path) != config.levels:
        raise PathError(
            f"cluster path {shown}: has {len(path)} ids, expected {config.levels}, one per level"
        )
    ids = [check_cluster(config, level, cluster) for level, cluster in enumerate(path, 1)]
    for level in range(2, config.levels + 1):
        parent, child = ids[level - 2], ids[level - 1]
        if child // config.branching != parent:
            first = parent * config.branching
            raise PathError(
                f"cluster path {shown}: cluster {child} of level {level} is not a child of "
                f"cluster {parent} of level {level - 1}; its children are {first} to "
                f"{first + config.branching - 1}"
            )
    return ids
