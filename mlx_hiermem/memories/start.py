"""Start values of a bank's blocks, each from a random stream of its own.

A block's start depends on the seed, its level and its cluster alone. So a bank far larger than
memory needs no pass that initialises it, and independent jobs start from the same bank.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import kinds
from ..config import MemoryConfig

#: In place of a cluster: the generic memory's block of a level.
GENERIC = -1


def start_block(
    config: MemoryConfig, level: int, cluster: int, seed: int = 0, anchor: Any = None
) -> np.ndarray:
    """Start values of the block of ``cluster`` at ``level``, (s_l,) float32: without effect.

    Args:
        cluster: id within its level, or ``GENERIC``.
        seed: of the bank, >= 0.
        anchor: where the config names no base anchor: its model, arguments or ``config.json``.
    """
    shape = config.anchor_shape(anchor)
    rng = np.random.default_rng([seed, level, cluster + 1])
    kind, rank = kinds.find(config.kind), config.ranks[level - 1]
    matrices = [kind.start(rank, shape, rng) for _ in config.memory_layers(shape)]
    return np.concatenate([matrix.reshape(-1) for layer in matrices for matrix in layer])
