"""Part and Group: where the matrices of blocks lie in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..sources import SourceTensor
from ..sources.tensor import Buffer


@dataclass(frozen=True)
class Part:
    """One matrix, in one or more layers, of consecutive clusters or of the generic memory.

    Attributes:
        tensor: where it lies.
        layers: positions among the layers with memory.
        matrix: position among the kind's matrices.
        clustered: its first axis counts clusters.
        transposed: its last two axes are (w, r).
        rank: (first, count) of the rows that are wanted, of a generic memory of all levels; None:
            all.
    """

    tensor: SourceTensor
    layers: tuple[int, ...]
    matrix: int
    clustered: bool
    transposed: bool
    rank: tuple[int, int] | None = None

    def read(self, first: int = 0, count: int = 1, buffer: Buffer | None = None) -> np.ndarray:
        """Clusters ``first`` to ``first + count`` of it: (count, layers, r, w), storage array."""
        rows = count if self.clustered else None  # None: all there are
        array = self.tensor.read(first if self.clustered else 0, rows, buffer)
        array = array.reshape(count, len(self.layers), *array.shape[-2:])
        if self.transposed:
            array = array.swapaxes(-1, -2)
        if self.rank is not None:
            start, ranks = self.rank
            array = array[:, :, start : start + ranks]
        return array


@dataclass(frozen=True)
class Group:
    """Clusters ``first`` to ``first + count`` of a level, and the parts that make them up."""

    first: int
    count: int
    parts: Sequence[Part]
