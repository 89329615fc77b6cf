"""Blocks out of a checkpoint: read chunk by chunk, put in the order of a stored block, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mlx_hiermem import kinds
from mlx_hiermem.bank.dtypes import STORAGE, all_finite, from_storage, to_storage
from mlx_hiermem.errors import FormatError

from ..sources.tensor import Buffer
from .parts import Part
from .plan import BankPlan

#: A chunk is about this many bytes, or one block.
CHUNK_BYTES = 1 << 22


class BlockRows:
    """The blocks of a plan, as storage arrays of the config's dtype."""

    def __init__(self, plan: BankPlan) -> None:
        self.plan = plan
        config = plan.config
        self._layers = len(config.memory_layers())
        widths = kinds.find(config.kind).row_widths(config.anchor_shape())
        # Where each matrix begins in a layer's part of a block, for a rank of 1.
        self._starts = [sum(widths[:i]) for i in range(len(widths))]
        self._widths = widths

    def level(self, level: int, first: int, count: int) -> Iterator[np.ndarray]:
        """Blocks ``first`` to ``first + count`` of a level, in chunks (n, s_l).

        A chunk is overwritten when the next one is made.

        Raises:
            FormatError: a number is NaN or infinite (also: after the conversion of the dtype), or a
                file cannot be read.
        """
        config = self.plan.config
        size = config.block_size(level)
        step = max(1, CHUNK_BYTES // (size * STORAGE[config.dtype].itemsize))
        groups = [
            group
            for group in self.plan.levels[level]
            if group.first < first + count and first < group.first + group.count
        ]
        at, chunk, parts = 0, Buffer(), Buffer()
        for start in range(first, first + count, step):
            end = min(start + step, first + count)
            out = chunk.take((end - start, size), STORAGE[config.dtype])
            while at < len(groups) and groups[at].first < end:
                group = groups[at]
                low, high = max(start, group.first), min(end, group.first + group.count)
                rows = out[low - start : high - start]
                self._fill(rows, group.parts, level, low - group.first, parts)
                if group.first + group.count > end:
                    break
                at += 1
            yield out

    def generic(self) -> np.ndarray:
        """The generic memory, (fetch size,): the block of each level, one behind the other."""
        config, blocks = self.plan.config, []
        for level in config.memory_levels:
            block = np.zeros((1, config.block_size(level)), STORAGE[config.dtype])
            if self.plan.generic is not None:
                self._fill(block, self.plan.generic[level], level, 0, Buffer())
            blocks.append(block[0])
        return np.concatenate(blocks)

    def matrices(self, level: int, cluster: int | None) -> list[list[np.ndarray]]:
        """One block as the source has it, for a reference that knows nothing of ours.

        Args:
            cluster: None: the generic memory's block.

        Returns:
            For each layer with memory its matrices, (r, w) float32 each.
        """
        if cluster is None:
            parts, first = (self.plan.generic or {}).get(level, ()), 0
        else:
            group = next(
                one
                for one in self.plan.levels[level]
                if one.first <= cluster < one.first + one.count
            )
            parts, first = group.parts, cluster - group.first
        rank = self.plan.config.ranks[level - 1]
        found = [
            [np.zeros((rank, width), np.float32) for width in self._widths]
            for _ in range(self._layers)
        ]
        for part in parts:
            array = from_storage(part.read(first, 1)[0], part.tensor.dtype)
            for layer, matrix in zip(part.layers, array, strict=True):
                found[layer][part.matrix] = matrix
        return found

    def _fill(
        self, out: np.ndarray, parts: Sequence[Part], level: int, first: int, buffer: Buffer
    ) -> None:
        """Read clusters of a group, ``first`` counted within it, into blocks (n, s_l)."""
        config = self.plan.config
        rank = config.ranks[level - 1]
        # (n, s_l) -> (n, L, numbers of a layer)
        layers = out.reshape(len(out), self._layers, -1)
        for part in parts:
            array = part.read(first, len(out), buffer)
            check_finite(array, part.tensor.dtype, part.tensor.where)
            if part.tensor.dtype != config.dtype:
                array = to_storage(from_storage(array, part.tensor.dtype), config.dtype)
                check_finite(array, config.dtype, f"{part.tensor.where}, as {config.dtype}")
            begin = rank * self._starts[part.matrix]
            end = begin + rank * self._widths[part.matrix]
            # (n, layers, r, w) -> (n, layers, r * w)
            where = _slice(part.layers)
            layers[:, where, begin:end] = array.reshape(len(out), len(part.layers), -1)


def _slice(layers: tuple[int, ...]) -> slice | list[int]:
    """Consecutive positions as a slice, which copies in larger pieces."""
    first, last = layers[0], layers[-1]
    return slice(first, last + 1) if last - first + 1 == len(layers) else list(layers)


def check_finite(array: np.ndarray, dtype: str, where: str) -> None:
    """Raise FormatError where a storage array has a NaN or an infinite number."""
    if not all_finite(array, dtype):
        raise FormatError(
            f"{where}: holds NaN or infinite numbers; expected finite ones: was the training "
            "healthy, or is the dtype too narrow?"
        )
