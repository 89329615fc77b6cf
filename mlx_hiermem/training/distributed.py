"""Data-parallel training: what the processes of ``mlx.launch`` exchange in a step.

Every process holds the whole model and the files of the whole bank, computes its share of the
batch, and applies the same update. So what travels is gradients: those of the anchor, and those of
the rows that the batch fetched; never the bank (docs/distributed.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from .rows import Key


class Processes:
    """The processes of a run; one, and nothing to exchange, unless ``mlx.launch`` started more.

    Args:
        group: a group of ``mx.distributed``; the one of this run by default.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = mx.distributed.init() if group is None else group
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()

    def sum(self, tree: Any) -> Any:
        """The sum over all processes of every array in ``tree``."""
        if self.size == 1:
            return tree
        summed = tree_map(lambda array: mx.distributed.all_sum(array, group=self._group), tree)
        mx.eval(summed)
        return summed

    def sum_rows(self, gradients: dict[Key, np.ndarray], keys: Sequence[Key], sizes: dict) -> dict:
        """The sum over all processes of row gradients.

        Args:
            gradients: (s_l,) float32 of the rows that this process's sequences used.
            keys: the rows that any process's sequences used, in one order everywhere.
            sizes: level -> s_l.
        """
        if self.size == 1:
            return gradients
        summed = {}
        for key in keys:
            mine = gradients.pop(key, None)
            row = mx.zeros(sizes[key[0]]) if mine is None else mx.array(mine)
            summed[key] = np.array(self.sum(row), copy=False)
        return summed

    def all(self, value: int) -> list[int]:
        """``value`` of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        return mx.distributed.all_gather(mx.array([value]), group=self._group).tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        self.all(0)
