"""Torch forwards that a converted model is compared with: they know nothing of MLX.

A reference has one method, ``logits(tokens, memory)``: tokens (T,) integers to (T, V) float32. A
memory is, for each layer that has one, its matrices (R, w) in the order of docs/format.md, the rows
of level 1 first; None: no memory. torch is imported when one is made, not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

from mlx_hiermem.errors import ConfigError

#: For each layer that has a memory its matrices (R, w).
Memory = Mapping[int, Sequence[np.ndarray]]


def import_torch() -> ModuleType:
    """The module torch.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise ConfigError(
            "comparing with the original needs PyTorch, which is not installed; install it with "
            "pip install 'mlx-hiermem[convert]'"
        ) from None
    return torch
