"""Kind: what every kind of memory says of itself, and how it reaches a layer of the anchor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..shapes import AnchorShape

#: One layer's part of a memory: for each group of matrices (B or 1, count * R, width).
Matrices = tuple[mx.array, ...]
#: Gives a layer its part of the memory of the call in progress; None: memory is off.
Lookup = Callable[[], Matrices | None]
#: What a module does instead: called with what it did so far, and its arguments.
Forward = Callable[..., mx.array]


class Kind(ABC):
    """One kind of memory.

    A block of rank r is, for each layer with memory, the matrices (r, width) of ``row_widths``, one
    behind the other. The blocks of a path are joined along r, R rows in all.

    Attributes:
        groups: how many consecutive matrices of one width are handed over as one array; their sum
            is the number of matrices.
        matrices: their names, in the order of a block; PyTorch banks have them in their keys.
    """

    @property
    @abstractmethod
    def groups(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def matrices(self) -> tuple[str, ...]: ...

    @abstractmethod
    def row_widths(self, shape: AnchorShape) -> tuple[int, ...]:
        """Widths of the rows that one unit of rank adds to one layer."""

    @abstractmethod
    def start(self, rank: int, shape: AnchorShape, rng: np.random.Generator) -> list[np.ndarray]:
        """Start values of one layer's matrices, (rank, width) float32 each: without effect.

        Drawn with NumPy: the same on every backend, and a thread that reads rows may do it.
        """

    @abstractmethod
    def forwards(
        self, layer: nn.Module, shape: AnchorShape, lookup: Lookup
    ) -> Iterator[tuple[nn.Module, Forward]]:
        """Which modules of a layer do something else with a memory, and what.

        Must not change the layer. While ``lookup()`` is None, each does what it did, bit for bit.

        Raises:
            NoPlace: the layer has no place for this kind of memory.
        """


class NoPlace(Exception):
    """A layer is not built as a kind of memory needs it; says why, in words that follow a name."""


def replace_call(module: nn.Module, forward: Forward) -> None:
    """Let ``module`` answer with ``forward(what it did, ...)``.

    Its class changes, not its place: names, weights, saving and quantising stay as they were.
    """
    base: Any = type(module)  # any class: known when it runs only

    class WithMemory(base):
        anchor_class = base

        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            return forward(super().__call__, *args, **kwargs)

    WithMemory.__name__ = WithMemory.__qualname__ = base.__name__
    module.__class__ = WithMemory


def restore_call(module: nn.Module) -> None:
    """Take :func:`replace_call` back; does nothing to other modules."""
    module.__class__ = getattr(type(module), "anchor_class", type(module))


def times_rows(x: mx.array, rows: mx.array) -> mx.array:
    """Each token's products with rows: (B, T, w), (B or 1, n, w) -> (B, T, n)."""
    if rows.shape[0] < x.shape[0]:
        # One memory for a batch: a plain matrix lets the backend use one large product.
        rows = rows.squeeze(0)
    return x @ rows.swapaxes(-1, -2)


def plus_sum_of_rows(out: mx.array, weights: mx.array, rows: mx.array) -> mx.array:
    """``out`` and each token's weighted sum of rows: (B, T, w), (B, T, n), (B or 1, n, w)."""
    if rows.shape[0] < weights.shape[0]:
        rows = rows.squeeze(0)
    if weights.dtype == rows.dtype == out.dtype:
        return mx.addmm(out, weights, rows)  # one step instead of two: they count in decoding
    return out + (weights @ rows).astype(out.dtype)


def truncated_normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Normal numbers, float32, without those beyond two deviations (before the cut)."""
    numbers = rng.standard_normal(shape, np.float32)
    while (beyond := np.flatnonzero(np.abs(numbers) > 2)).size:
        numbers.reshape(-1)[beyond] = rng.standard_normal(beyond.size, np.float32)
    return numbers * np.float32(std)
