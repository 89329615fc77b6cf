"""The cluster tree: from a vector to its cluster path.

Level l has k^l clusters (k = branching), each with a centroid. Ids count from 0 within their
level, and the children of cluster i are k*i ... k*i + k-1, so parent(i) = i // k. Routing is
greedy: at each level the nearest of the k children, O(p*k) comparisons for p levels and never
O(k^p) (the paper, section 2 and Appendix C).

Notable: a vector gets the same ids and the same distances, to the bit, alone or in any batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, InputError
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


class ClusterTree:
    """Centroids of a k-ary tree of clusters.

    Args:
        centroids: one float32 array per level; level l is (k^l, c). Children of cluster i of
            the level above are rows k*i to k*i + k-1.
        encoder: what made the vectors that the tree was grown from, as ``Encoder.to_config``
            gives it; kept with the tree because a tree means nothing to another encoder.

    Attributes:
        centroids: the arrays, in order of level.
        encoder: as given, or ``None``.

    Raises:
        FormatError: the arrays do not make a tree.
    """

    def __init__(
        self, centroids: Sequence[np.ndarray], encoder: Mapping[str, Any] | None = None
    ) -> None:
        self.centroids = tuple(np.ascontiguousarray(level, np.float32) for level in centroids)
        self.encoder = encoder
        if not self.centroids or self.centroids[0].ndim != 2:
            raise FormatError("cluster tree: level1 is missing or is not a matrix (k, width)")
        k, width = self.centroids[0].shape
        if k < 2 or width < 1:
            raise FormatError(
                f"cluster tree: level1 has shape {(k, width)}; expected at least 2 clusters "
                "and 1 column"
            )
        for level, array in enumerate(self.centroids, 1):
            if array.shape != (k**level, width):
                raise FormatError(
                    f"cluster tree: level{level} has shape {array.shape}; expected "
                    f"{(k**level, width)} for branching {k}"
                )
            if not np.isfinite(array).all():
                raise FormatError(f"cluster tree: level{level} holds a value that is not finite")

    @property
    def branching(self) -> int:
        """k, children of each cluster."""
        return self.centroids[0].shape[0]

    @property
    def levels(self) -> int:
        """p, depth of the tree."""
        return len(self.centroids)

    @property
    def width(self) -> int:
        """c, numbers in a vector."""
        return self.centroids[0].shape[1]

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
        ids = np.empty((len(vectors), self.levels), np.int64)
        distances = np.empty((len(vectors), self.levels), np.float32)
        k = self.branching
        step = max(1, _SLICE // (k * self.width))
        for start in range(0, len(vectors), step):
            part = vectors[start : start + step]
            rows = np.arange(len(part))
            node = np.zeros(len(part), np.int64)
            for level, centroids in enumerate(self.centroids):
                # (k^l, c) -> (k^(l-1), k, c)[node] -> (n, k, c): the children of each row's node
                offset = centroids.reshape(-1, k, self.width)[node]
                # The difference itself, not |x|^2 - 2xy + |y|^2: that form loses digits on near
                # ties, and a matrix product's rounding depends on how many rows it has.
                with np.errstate(over="ignore"):
                    offset -= part[:, None, :]
                    np.square(offset, out=offset)
                    far = offset.sum(axis=-1)
                nearest = far.argmin(axis=1)
                node = node * k + nearest
                ids[start : start + step, level] = node
                distances[start : start + step, level] = np.sqrt(far[rows, nearest])
        if not np.isfinite(distances).all():
            raise InputError(
                "vectors to route: values are so large that distances overflow; give vectors "
                "of unit length"
            )
        return ids, distances

    def save(self, path: str | Path) -> None:
        """Write ``tree.safetensors``: tensors ``level1`` (k, c), ``level2`` (k^2, c), ..."""
        metadata = {"branching": str(self.branching), "levels": str(self.levels)}
        if self.encoder is not None:
            metadata["encoder"] = json.dumps(self.encoder, sort_keys=True)
        tensors = {f"level{level}": array for level, array in enumerate(self.centroids, 1)}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> ClusterTree:
        """Read ``tree.safetensors``.

        Raises:
            FormatError: the file is missing or damaged, or its tensors are not a tree; the text
                names the file and the tensor.
        """
        tensors, metadata = read_tensors(path)
        names = [f"level{level}" for level in range(1, len(tensors) + 1)]
        if not names or set(names) != set(tensors):
            found = ", ".join(sorted(tensors)) or "none"
            raise FormatError(f"{path}: tensors are {found}; expected level1, level2, ...")
        encoder = metadata.get("encoder")
        try:
            tree = cls([tensors[name] for name in names], encoder and json.loads(encoder))
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: metadata encoder is not valid JSON ({error})") from None
        for key, size in (("branching", tree.branching), ("levels", tree.levels)):
            if metadata.get(key) != str(size):
                raise FormatError(
                    f"{path}: metadata {key} is {metadata.get(key)!r} but its tensors make {size}; "
                    "get the file again"
                )
        return tree


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
