"""The cluster tree: from a vector to its cluster path.

Level l has k^l clusters (k = branching), each with a centroid. Ids count from 0 within their
level, and the children of cluster i are k*i ... k*i + k-1, so parent(i) = i // k. Routing is
greedy: at each level the nearest of the k children, O(p*k) comparisons for p levels and never
O(k^p) (the paper, section 2 and Appendix C).

Memories that were added to a bank (docs/adding.md) are trees of their own beside it, whose clusters
are numbered on behind those of the tree. A vector is routed greedily in each, and goes where its
leaf is nearest; to the tree itself where that is as near, or where the leaf of the added memory is
farther than its radius: than nearly all that it was made for. So what is far from an added memory
goes where it went without it.

Notable: a vector gets the same ids and the same distances, to the bit, alone or in any batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, InputError
from ..files import safetensors_pieces
from ..shapes import shown
from .files import read_tensors, write_tensors

#: Numbers that one slice of ``assign`` holds at a time: bounds memory, and stays in cache.
_SLICE = 1 << 20


@dataclass(frozen=True)
class ClusterPath:
    """One cluster per level, each a child of the one before.

    Attributes:
        ids: (i1, ..., ip), each counted from 0 within its level.
        distances: L2 distance from the vector to the centroid of each of them.
    """

    ids: tuple[int, ...]
    distances: tuple[float, ...]


@dataclass(frozen=True)
class AddedTree:
    """The centroids of an added memory.

    Attributes:
        levels: one float32 array per level, (roots * k^(l-1), c).
        radius: the L2 distance from a leaf beyond which it is not entered.
    """

    levels: Sequence[np.ndarray]
    radius: float = math.inf


class ClusterTree:
    """Centroids of a k-ary tree of clusters.

    Args:
        centroids: one float32 array per level; level l is (k^l, c). Children of cluster i of
            the level above are rows k*i to k*i + k-1.
        encoder: what made the vectors that the tree was grown from, as ``Encoder.to_config``
            gives it; kept with the tree because a tree means nothing to another encoder.
        added: the added memories, in their order.

    Attributes:
        centroids: the arrays, in order of level, those of the added memories behind the tree's.
        encoder: as given, or ``None``.
        roots: clusters of level 1: k, and those of the added memories.

    Raises:
        FormatError: the arrays do not make a tree.
    """

    def __init__(
        self,
        centroids: Sequence[np.ndarray],
        encoder: Mapping[str, Any] | None = None,
        added: Sequence[AddedTree] = (),
    ) -> None:
        self._base = tuple(np.ascontiguousarray(level, np.float32) for level in centroids)
        self.encoder = encoder
        if not self._base or self._base[0].ndim != 2:
            raise FormatError("cluster tree: level1 is missing or is not a matrix (k, width)")
        k, width = self._base[0].shape
        if k < 2 or width < 1:
            raise FormatError(
                f"cluster tree: level1 has shape {(k, width)}; expected at least 2 clusters "
                "and 1 column"
            )
        _check_levels(self._base, k, k, width)
        parts = [self._base]
        for one in added:
            part = tuple(np.ascontiguousarray(level, np.float32) for level in one.levels)
            if len(part) != len(self._base) or part[0].ndim != 2 or not len(part[0]):
                raise FormatError(
                    f"cluster tree: an added memory has {len(part)} levels, the tree has "
                    f"{len(self._base)}; they do not belong together"
                )
            _check_levels(part, len(part[0]), k, width)
            if not one.radius > 0:
                raise FormatError(f"cluster tree: the radius is {one.radius}; expected more than 0")
            parts.append(part)
        self._parts = tuple(parts)
        self._radii = tuple(one.radius for one in added)
        self.roots = sum(len(part[0]) for part in parts)
        self.centroids = self._base
        if added:
            self.centroids = tuple(map(np.concatenate, zip(*parts, strict=True)))

    @property
    def branching(self) -> int:
        """k, children of each cluster."""
        return self._base[0].shape[0]

    @property
    def levels(self) -> int:
        """p, depth of the tree."""
        return len(self._base)

    @property
    def width(self) -> int:
        """c, numbers in a vector."""
        return self._base[0].shape[1]

    def with_added(self, added: Sequence[AddedTree]) -> ClusterTree:
        """This tree with more added memories, behind those that it has."""
        now = map(AddedTree, self._parts[1:], self._radii)
        return ClusterTree(self._base, self.encoder, [*now, *added])

    def route(self, vectors: np.ndarray) -> list[ClusterPath]:
        """The path of each vector.

        Args:
            vectors: (n, c), or (c,) for one. Unit length, as an encoder returns them: the tree
                was grown from unit vectors.

        Returns:
            n paths, one for a single vector.

        Raises:
            InputError: wrong width, or a value that is not finite.
        """
        vectors = np.asarray(vectors)
        ids, distances = self.assign(vectors[None] if vectors.ndim == 1 else vectors)
        return [
            ClusterPath(tuple(path), tuple(far))
            for path, far in zip(ids.tolist(), distances.tolist(), strict=True)
        ]

    def assign(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Route many vectors at once: the arrays behind :meth:`route`.

        Of children at equal distance the first is taken.

        Args:
            vectors: (n, c).

        Returns:
            ids (n, p) int64 and L2 distances (n, p) float32.

        Raises:
            InputError: wrong width, or a value that is not finite.
        """
        vectors = check_vectors(vectors, self.width)
        ids, distances = self._descend(self._base, vectors)
        first = self.branching
        for part, radius in zip(self._parts[1:], self._radii, strict=True):
            others, far = self._descend(part, vectors)
            nearer = (far[:, -1] < distances[:, -1]) & (far[:, -1] <= radius)
            # Clusters of level l are numbered on from first * k^(l-1).
            start = first * self.branching ** np.arange(self.levels)
            ids[nearer] = others[nearer] + start
            distances[nearer] = far[nearer]
            first += len(part[0])
        if not np.isfinite(distances).all():
            raise InputError(
                "vectors to route: values are so large that distances overflow; give vectors "
                "of unit length"
            )
        return ids, distances

    def _descend(
        self, part: Sequence[np.ndarray], vectors: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Greedily from level to level of one part; ids count from its first cluster."""
        ids = np.empty((len(vectors), self.levels), np.int64)
        distances = np.empty((len(vectors), self.levels), np.float32)
        k, roots = self.branching, len(part[0])
        step = max(1, _SLICE // (max(k, roots) * self.width))
        for start in range(0, len(vectors), step):
            mine = vectors[start : start + step]
            rows = np.arange(len(mine))
            node = np.zeros(len(mine), np.int64)
            for level, centroids in enumerate(part):
                children = k if level else roots
                # (k^l, c) -> (k^(l-1), k, c)[node] -> (n, k, c): the children of each row's node
                offset = centroids.reshape(-1, children, self.width)[node]
                # The difference itself, not |x|^2 - 2xy + |y|^2: that form loses digits on near
                # ties, and a matrix product's rounding depends on how many rows it has.
                with np.errstate(over="ignore"):
                    offset -= mine[:, None, :]
                    np.square(offset, out=offset)
                    far = offset.sum(axis=-1)
                nearest = far.argmin(axis=1)
                node = node * children + nearest
                ids[start : start + step, level] = node
                distances[start : start + step, level] = np.sqrt(far[rows, nearest])
        return ids, distances

    def save(self, path: str | Path) -> None:
        """Write ``tree.safetensors``: tensors ``level1`` (k, c), ``level2`` (k^2, c), ...

        Added memories are not in it: each has a file of its own (:meth:`added_bytes`).
        """
        write_tensors(path, _tensors(self._base), self._metadata())

    def added_bytes(self, number: int) -> bytes:
        """The file with the centroids of the added memory of that number, from 0."""
        part = self._parts[1 + number]
        metadata = {"format": "mlx", **self._metadata(), "roots": str(len(part[0]))}
        metadata["radius"] = repr(float(self._radii[number]))
        return b"".join(safetensors_pieces(_tensors(part), metadata))

    def _metadata(self) -> dict[str, str]:
        metadata = {"branching": str(self.branching), "levels": str(self.levels)}
        if self.encoder is not None:
            metadata["encoder"] = json.dumps(self.encoder, sort_keys=True)
        return metadata

    @classmethod
    def load(cls, path: str | Path) -> ClusterTree:
        """Read ``tree.safetensors``.

        Raises:
            FormatError: the file is missing or damaged, or its tensors are not a tree; the text
                names the file and the tensor.
        """
        levels, metadata = _read_levels(path)
        encoder = metadata.get("encoder")
        try:
            tree = cls(levels, None if encoder is None else json.loads(encoder))
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: metadata encoder is not valid JSON ({error})") from None
        _check_metadata(path, metadata, {"branching": tree.branching, "levels": tree.levels})
        return tree

    def load_added(self, path: str | Path, roots: int) -> ClusterTree:
        """This tree with the added memory whose centroids are in ``path``.

        Args:
            roots: clusters of level 1 that it has to have.

        Raises:
            FormatError: the file is missing or damaged, or is of another tree.
        """
        levels, metadata = _read_levels(path)
        sizes = {"branching": self.branching, "levels": self.levels, "roots": roots}
        _check_metadata(path, metadata, sizes)
        if metadata.get("encoder") != self._metadata().get("encoder"):
            raise FormatError(
                f"{path}: is for another encoder than the tree beside it; get both again"
            )
        if len(levels[0]) != roots:
            raise FormatError(f"{path}: has {len(levels[0])} clusters at level1, expected {roots}")
        try:
            radius = float(metadata.get("radius", ""))
        except ValueError:
            radius = math.nan
        try:
            return self.with_added([AddedTree(levels, radius)])
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None


def _check_levels(levels: Sequence[np.ndarray], roots: int, k: int, width: int) -> None:
    """Raise FormatError unless level l is (roots * k^(l-1), width), and finite."""
    for level, array in enumerate(levels, 1):
        expected = (roots * k ** (level - 1), width)
        if array.shape != expected:
            raise FormatError(
                f"cluster tree: level{level} has shape {array.shape}; expected {expected} for "
                f"branching {k}"
            )
        if not np.isfinite(array).all():
            raise FormatError(f"cluster tree: level{level} holds a value that is not finite")


def _tensors(levels: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"level{level}": array for level, array in enumerate(levels, 1)}


def _read_levels(path: str | Path) -> tuple[list[np.ndarray], dict[str, str]]:
    """The tensors level1, level2, ... of a file, in their order, and its metadata."""
    tensors, metadata = read_tensors(path)
    names = [f"level{level}" for level in range(1, len(tensors) + 1)]
    if not names or set(names) != set(tensors):
        found = ", ".join(sorted(tensors)) or "none"
        raise FormatError(f"{path}: tensors are {found}; expected level1, level2, ...")
    return [tensors[name] for name in names], metadata


def _check_metadata(
    path: str | Path, metadata: Mapping[str, str], sizes: Mapping[str, int]
) -> None:
    for key, size in sizes.items():
        if metadata.get(key) != str(size):
            raise FormatError(
                f"{path}: metadata {key} is {shown(metadata.get(key))} but its tensors make "
                f"{size}; get the file again"
            )


def check_vectors(vectors: np.ndarray, width: int | None = None) -> np.ndarray:
    """``vectors`` as float32 (n, c), or an InputError that says what is wrong with them."""
    try:
        vectors = np.asarray(vectors, np.float32)
    except (TypeError, ValueError):
        raise InputError("vectors: expected numbers in a matrix (n, width)") from None
    if vectors.ndim != 2 or (width is not None and vectors.shape[1] != width):
        expected = "width" if width is None else width
        raise InputError(
            f"vectors: shape is {vectors.shape}; expected (n, {expected}); is this the encoder "
            "that the tree was grown with?"
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise InputError(f"vectors: row {int(finite.argmin())} holds a value that is not finite")
    return vectors
