"""From named arrays to the levels of a tree: the forms that recursive k-means is saved in.

- by level: ``level1`` (k, c), ``level2`` (k^2, c) or (k, k, c), ...
- by node: ``root`` (k, c), and for each cluster above the last level the centroids of its children,
  named by its path: ``0``, ``1``, ``0.3`` or ``0_3``;
- one array of all levels, one behind the other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import numpy as np

from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown

_SUFFIX = r"(?:[._](?:centroids|cluster_centers_?|weight))?"
_LEVEL = re.compile(rf"level[-_. ]?(\d{{1,2}}){_SUFFIX}", re.ASCII | re.IGNORECASE)
_POSITION = re.compile(r"arr_(\d{1,2})", re.ASCII)  # np.savez(path, level1, level2)
_NODE = re.compile(
    rf"(?:node[-_. ]?)?(root|\d{{1,9}}(?:[-_.]\d{{1,9}})*){_SUFFIX}", re.ASCII | re.IGNORECASE
)
_EXPECTED = (
    "expected level1, level2, ... or, by node, root, 0, 1, ..., 0.0, 0.1, ... (docs/convert.md)"
)


def levels_of(
    arrays: Mapping[str, np.ndarray], where: str, branching: int | None, levels: int | None
) -> list[np.ndarray]:
    """The centroids of level 1, 2, ..., (k^l, c) each where the arrays are as they should be.

    Args:
        arrays: by name; one array of any other name holds all levels.
        branching, levels: k and p, where they are known; only used to cut such an array.

    Raises:
        FormatError: names or shapes are of no form, or something is missing or there twice.
    """
    if not arrays:
        raise FormatError(f"{where}: holds no arrays; {_EXPECTED}")
    for pattern, read in ((_LEVEL, _by_level), (_POSITION, _by_position), (_NODE, _by_node)):
        found = {name: match[1] for name in arrays if (match := pattern.fullmatch(name))}
        if not found:
            continue
        if len(arrays) == 1 and pattern is not _LEVEL and [*found.values()] != ["root"]:
            continue  # arr_0, or the name of a file: nothing is said
        if surplus := [name for name in arrays if name not in found]:
            raise FormatError(
                f"{where}: has {shown(surplus[0])} beside a tree; {_EXPECTED}, and nothing else"
            )
        return read(found, arrays, where)
    if len(arrays) > 1:
        names = ", ".join(sorted(arrays))
        raise FormatError(f"{where}: its arrays are {shown(names)}; {_EXPECTED}")
    return _cut(next(iter(arrays.values())), where, branching, levels)


def _by_level(
    names: Mapping[str, str], arrays: Mapping[str, np.ndarray], where: str, first: int = 1
) -> list[np.ndarray]:
    found: dict[int, np.ndarray] = {}
    for name, number in names.items():
        level = int(number) - first + 1
        if level in found:
            raise FormatError(f"{where}: {shown(name)}: level {level} is there twice; leave one")
        found[level] = arrays[name]
    if 0 in found:
        raise FormatError(f"{where}: has level0; levels count from 1: the k clusters are level1")
    missing = [level for level in range(1, max(found) + 1) if level not in found]
    if missing:
        raise FormatError(
            f"{where}: level{missing[0]} is missing; routing goes down level by level and needs "
            "the centroids of every one"
        )
    k = _branching(found[1], where)
    return [_level(found[level], level, k, where) for level in sorted(found)]


def _by_position(
    names: Mapping[str, str], arrays: Mapping[str, np.ndarray], where: str
) -> list[np.ndarray]:
    return _by_level(names, arrays, where, first=0)


def _branching(level1: np.ndarray, where: str) -> int:
    if level1.ndim == 3 and level1.shape[0] == 1:
        return level1.shape[1]
    if level1.ndim != 2:
        raise FormatError(f"{where}: level1 has shape {level1.shape}; expected (k, width)")
    return level1.shape[0]


def _level(array: np.ndarray, level: int, k: int, where: str) -> np.ndarray:
    """(k^l, c), from that or from (k^(l-1), k, c) or (k, ..., k, c)."""
    shapes = ((k**level,), (k ** (level - 1), k), (k,) * level)
    if array.ndim < 2 or array.shape[:-1] not in shapes:
        raise FormatError(
            f"{where}: level{level} has shape {shown(array.shape)}; expected "
            f"{(*shapes[0], 'width')} or {(*shapes[1], 'width')}, because level1 has {k} clusters"
        )
    return array.reshape(-1, array.shape[-1])


def _by_node(
    names: Mapping[str, str], arrays: Mapping[str, np.ndarray], where: str
) -> list[np.ndarray]:
    nodes: dict[tuple[int, ...], np.ndarray] = {}
    for name, said in names.items():
        path = () if said.lower() == "root" else tuple(map(int, re.split("[-_.]", said)))
        if path in nodes:
            raise FormatError(f"{where}: node {_said(path)} is there twice; leave one out")
        nodes[path] = arrays[name]
    root = nodes.get(())
    if root is None:
        raise FormatError(f"{where}: the node root is missing, whose centroids are level 1")
    if root.ndim != 2 or root.shape[0] < 2:
        raise FormatError(f"{where}: the node root has shape {root.shape}; expected (k, width)")
    k = root.shape[0]
    for path, array in nodes.items():
        if any(child >= k for child in path):
            raise FormatError(
                f"{where}: there is a node {_said(path)}, but each has {k} children: 0 to {k - 1}"
            )
        if array.shape != root.shape:
            raise FormatError(
                f"{where}: the node {_said(path)} has shape {array.shape}; expected {root.shape}, "
                "as the root has"
            )
    depth = max(map(len, nodes))
    levels = []
    for above in range(depth + 1):
        paths = list(itertools.islice(itertools.product(range(k), repeat=above), len(nodes) + 1))
        missing = next((path for path in paths if path not in nodes), None)
        if missing is not None:
            raise FormatError(
                f"{where}: the node {_said(missing)} is missing; a tree has the centroids of the "
                f"{k} children of every cluster, down to the same level"
            )
        levels.append(np.concatenate([nodes[path] for path in paths]))
    return levels


def _said(path: tuple[int, ...]) -> str:
    return ".".join(map(str, path)) or "root"


def _cut(
    array: np.ndarray, where: str, branching: int | None, levels: int | None
) -> list[np.ndarray]:
    """One array of all levels, one behind the other."""
    if array.ndim != 2:
        raise FormatError(
            f"{where}: one array of shape {shown(array.shape)}; expected (clusters of all levels, "
            "width)"
        )
    rows = len(array)
    trees = [(k, p) for k, p in _trees(rows) if branching in (None, k) and levels in (None, p)]
    leaves = [(k, p) for k, p in _powers(rows) if branching in (None, k) and levels in (None, p)]
    if not trees:
        asked = f"branching {branching or 'unknown'} and {levels or 'unknown'} levels"
        if leaves:
            raise FormatError(
                f"{where}: {rows} rows are the leaves only of a tree of {asked}; routing goes down "
                "level by level: the centroids of the levels above are needed too"
            )
        raise FormatError(
            f"{where}: {rows} rows are not all levels of a tree of {asked} (k + k^2 + ... + k^p)"
        )
    if len(trees) > 1 or leaves:
        told = ", ".join(f"branching {k} with {p} levels" for k, p in trees)
        also = f", or the leaves only of branching {leaves[0][0]}" if leaves else ""
        raise FormatError(
            f"{where}: {rows} rows may be {told}{also}; name the arrays level1, level2, ..., or "
            "write branching and ranks into memory_config.json"
        )
    k, p = trees[0]
    ends = np.cumsum([k**level for level in range(1, p + 1)])[:-1]
    return np.split(array, ends)


def _trees(rows: int) -> list[tuple[int, int]]:
    """All (k, p) with k + k^2 + ... + k^p = rows."""
    found = [(rows, 1)] if rows > 1 else []
    for k in range(2, int(rows**0.5) + 1):
        total, p = k, 1
        while total < rows:
            p += 1
            total += k**p
        if total == rows:
            found.append((k, p))
    return found


def _powers(rows: int) -> list[tuple[int, int]]:
    """All (k, p) with k^p = rows and more than one level."""
    found = []
    for p in range(2, rows.bit_length() + 1):
        k = round(rows ** (1 / p))
        if k > 1 and k**p == rows:
            found.append((k, p))
    return found
