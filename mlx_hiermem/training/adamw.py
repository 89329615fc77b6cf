"""AdamW on one row at a time, in place.

MLX's optimizers hold state of the full shape of a parameter and update all of it. A bank's state is
larger than memory, and a step touches a few rows of it, which live in host memory and go to files;
so their update is written here, with NumPy, in pieces that stay in the processor's cache.
"""

from __future__ import annotations

import numpy as np

#: Numbers that are worked on at a time: the pieces of row, state and scratch fit in a core's cache.
_PIECE = 1 << 15


def adamw(
    row: np.ndarray,
    gradient: np.ndarray,
    step: int,
    learning_rate: float,
    weight_decay: float,
    scale: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> None:
    """One update, in place, with decoupled decay (Loshchilov and Hutter 2019).

    Args:
        row: (3, s) float32: values, first and second moments.
        gradient: (s,) float32.
        step: how often this row was updated, this update included (from 1); its own count keeps the
            bias correction right for a row that is visited rarely.
        scale: the gradient is multiplied by this first (clipping).
        betas, eps: the paper's betas.
    """
    b1, b2 = betas
    # Python floats would be rounded once more in each product; the factors are rounded here.
    rate = np.float32(learning_rate / (1 - b1**step))
    second_correction = np.float32((1 - b2**step) ** -0.5)
    keep = np.float32(1 - learning_rate * weight_decay)
    scratch = np.empty((2, min(_PIECE, row.shape[1])), np.float32)
    for start in range(0, row.shape[1], _PIECE):
        values, first, second = row[:, start : start + _PIECE]
        grad, other = scratch[:, : len(values)]
        np.multiply(gradient[start : start + _PIECE], np.float32(scale), out=grad)
        np.multiply(grad, np.float32(1 - b1), out=other)
        first *= np.float32(b1)
        first += other
        np.multiply(grad, grad, out=grad)
        grad *= np.float32(1 - b2)
        second *= np.float32(b2)
        second += grad
        np.sqrt(second, out=other)
        other *= second_correction
        other += np.float32(eps)
        np.divide(first, other, out=other)
        other *= rate
        values *= keep
        values -= other
