"""Data-parallel training: what the processes of ``mlx.launch`` exchange in a step.

Every process holds the whole model and the files of the whole bank, computes its share of the
batch, and applies the same update. So what travels is gradients: those of the anchor, and those of
the rows that the batch fetched; never the bank (docs/distributed.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from ..errors import TrainingError
from .rows import Key

#: Numbers that travel at a time: few calls, and little more memory than without them.
_MOST = 1 << 24


class Processes:
    """The processes of a run; one, and nothing to exchange, unless ``mlx.launch`` started more.

    Args:
        group: a group of ``mx.distributed``; the one of this run by default.

    Raises:
        TrainingError: another process is gone (from the methods).

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = mx.distributed.init() if group is None else group
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()

    def sum(self, tree: Any) -> Any:
        """The sum over all processes of every float32 array in ``tree``."""
        if self.size == 1:
            return tree
        arrays = dict(tree_flatten(tree))
        summed: dict[str, mx.array] = {}
        for names in _groups({name: array.size for name, array in arrays.items()}):
            parts = [arrays[name].reshape(-1).astype(mx.float32) for name in names]
            total = self._sum(mx.concatenate(parts))
            start = 0
            for name in names:
                array = arrays[name]
                part = total[start : start + array.size]
                summed[name] = part.reshape(array.shape).astype(array.dtype)
                start += array.size
        mx.eval(summed)
        return tree_map_with_path(lambda name, _: summed[name], tree)

    def sum_rows(
        self, gradients: dict[Key, np.ndarray], keys: Sequence[Key], sizes: Mapping[int, int]
    ) -> dict[Key, np.ndarray]:
        """The sum over all processes of row gradients.

        Args:
            gradients: (s_l,) float32 of the rows that this process's sequences used; emptied.
            keys: the rows that any process's sequences used, in one order everywhere.
            sizes: level -> s_l.
        """
        if self.size == 1:
            return gradients
        summed: dict[Key, np.ndarray] = {}
        for group in _groups({key: sizes[key[0]] for key in keys}):
            buffer = np.zeros(sum(sizes[level] for level, _ in group), np.float32)
            start = 0
            for key in group:
                if key in gradients:
                    buffer[start : start + sizes[key[0]]] = gradients.pop(key)
                start += sizes[key[0]]
            total, start = np.array(self._sum(mx.array(buffer))), 0
            for key in group:
                summed[key] = total[start : start + sizes[key[0]]]
                start += sizes[key[0]]
        return summed

    def _sum(self, array: mx.array) -> mx.array:
        return self._done(mx.distributed.all_sum(array, group=self._group))

    def all(self, value: int) -> list[int]:
        """``value`` of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        return self._done(mx.distributed.all_gather(mx.array([value]), group=self._group)).tolist()

    def _done(self, result: mx.array) -> mx.array:
        try:
            mx.eval(result)
        except RuntimeError as error:
            raise TrainingError(
                f"process {self.rank} of {self.size}: the exchange with the others failed "
                f"({' '.join(str(error).split())}); start all of them again with --resume"
            ) from None
        return result

    def wait(self) -> None:
        """Until all processes are here."""
        self.all(0)


def _groups(sizes: Mapping[Any, int]) -> Iterator[list[Any]]:
    """Names in their order, in groups of at most ``_MOST`` numbers, or one name alone."""
    group: list[Any] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > _MOST:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group
