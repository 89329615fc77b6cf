"""The bank in training: float32 rows per level, and AdamW on just the rows of a batch.

The cost of a step follows the rows that it touches, never the size of the bank. Each row keeps its
own step count, so bias correction is right for rows that are visited rarely (lazy Adam), and a row
that is not visited does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..config import MemoryConfig


@dataclass
class LevelRows:
    """The blocks of one level and their optimizer state; row i belongs to cluster i.

    Attributes:
        values, first, second: (k^l, s_l) float32: blocks, and Adam's first and second moments.
        steps: (k^l,) int64: how often each row was updated.
    """

    values: np.ndarray
    first: np.ndarray
    second: np.ndarray
    steps: np.ndarray

    @classmethod
    def fresh(cls, clusters: int, init_block: Callable[[], mx.array]) -> LevelRows:
        """Rows at their start values; the moments cost no memory until they are touched."""
        values = np.stack([np.array(init_block()) for _ in range(clusters)])
        return cls(
            values,
            np.zeros(values.shape, np.float32),
            np.zeros(values.shape, np.float32),
            np.zeros(clusters, np.int64),
        )


class BankRows:
    """All levels' rows. ``gather`` a batch's rows, differentiate them, ``update`` them.

    Args:
        config: the memory config; levels of rank 0 have no rows.
        init_block: level -> start values (s_l,) of one block.
    """

    def __init__(self, config: MemoryConfig, init_block: Callable[[int], mx.array]):
        self.config = config
        self.levels = {
            level: LevelRows.fresh(config.clusters(level), lambda level=level: init_block(level))
            for level in config.memory_levels
        }

    def gather(
        self, leaves: np.ndarray
    ) -> tuple[dict[int, np.ndarray], list[mx.array], list[mx.array]]:
        """Each distinct row of a batch once.

        Args:
            leaves: (B,) cluster ids at the deepest level.

        Returns:
            ids: level -> (U_l,) distinct cluster ids.
            rows: per level with memory, (U_l, s_l) float32.
            places: per level with memory, (B,) int32: which of the rows each sequence uses.
        """
        ids, rows, places = {}, [], []
        for level, level_rows in self.levels.items():
            clusters = leaves // self.config.branching ** (self.config.levels - level)
            ids[level], inverse = np.unique(clusters, return_inverse=True)
            rows.append(mx.array(level_rows.values[ids[level]]))
            places.append(mx.array(inverse.astype(np.int32)))
        return ids, rows, places

    def update(
        self,
        ids: dict[int, np.ndarray],
        rows: list[mx.array],
        gradients: list[mx.array],
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        """AdamW on the gathered rows, written back in place.

        Args:
            ids, rows: as ``gather`` gave them.
            gradients: like ``rows``; a row used by several sequences carries their sum.
        """
        b1, b2 = betas
        for (level, chosen), row, gradient in zip(ids.items(), rows, gradients, strict=True):
            state = self.levels[level]
            state.steps[chosen] += 1
            steps = mx.array(state.steps[chosen].astype(np.float32))[:, None]
            first = b1 * mx.array(state.first[chosen]) + (1 - b1) * gradient
            second = b2 * mx.array(state.second[chosen]) + (1 - b2) * gradient.square()
            # The bias correction of each row follows that row's own number of steps.
            direction = (first / (1 - b1**steps)) / (mx.sqrt(second / (1 - b2**steps)) + eps)
            row = row * (1 - learning_rate * weight_decay) - learning_rate * direction
            mx.eval(row, first, second)
            state.values[chosen] = np.array(row, copy=False)
            state.first[chosen] = np.array(first, copy=False)
            state.second[chosen] = np.array(second, copy=False)
