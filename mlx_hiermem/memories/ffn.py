"""FFN memories, the paper's default kind: rows that widen the SwiGLU of each layer.

For a layer with x (B, T, d) the memory adds M3 (act(M1 x) * M2 x) to the anchor's FFN output, which
is the same as concatenating M1, M2 and M3 to the anchor's matrices (section 2 of the paper).

A block of rank r is (L, 3, r, d): for each of the L layers with memory M1, M2 and M3, each as r
rows of width d. The blocks of all levels are joined along r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn


def join(blocks: Sequence[mx.array], layers: int, width: int) -> mx.array:
    """Put the blocks of one or more levels together.

    Args:
        blocks: one array (..., s_l) per level; all with the same leading axes.
        layers: L, layers with memory.
        width: d, the anchor's hidden size.

    Returns:
        (..., L, 3, R, d) with R the sum of the levels' ranks.
    """
    # (..., s_l) -> (..., L, 3, r_l, d)
    return mx.concatenate(
        [block.reshape(*block.shape[:-1], layers, 3, -1, width) for block in blocks], axis=-2
    )


def init_block(layers: int, rank: int, width: int) -> mx.array:
    """Start values of one block, (L * 3 * r * d,) float32: no effect on the anchor.

    M1 and M2 are truncated normal, M3 is zero (section 3 of the paper, which gives no deviation;
    ours is twice that of the fan-in, with which the loss fell faster at first).
    """
    deviation = 2 * width**-0.5
    gate_up = mx.random.truncated_normal(-2.0, 2.0, (layers, 2, rank, width)) * deviation
    return mx.concatenate([gate_up, mx.zeros((layers, 1, rank, width))], axis=1).reshape(-1)


def branch(
    x: mx.array, memory: mx.array, activation: Callable[[mx.array], mx.array] = nn.silu
) -> mx.array:
    """What the memory adds to one layer's FFN output.

    Args:
        x: the FFN's input (B, T, d).
        memory: (B or 1, 3, R, d), this layer's part of the joined memory.
        activation: the anchor's gate activation.

    Returns:
        (B, T, d), in the dtype of ``x``.
    """
    m1, m2, m3 = memory[:, 0], memory[:, 1], memory[:, 2]
    if memory.shape[0] == 1:
        # One memory for the whole batch: plain matrices let the backend use one large product.
        m1, m2, m3 = m1[0], m2[0], m3[0]
    # (B, T, d) @ (B, d, R) -> (B, T, R)
    hidden = activation(x @ m1.swapaxes(-1, -2)) * (x @ m2.swapaxes(-1, -2))
    return hidden @ m3  # (B, T, R) @ (B, R, d) -> (B, T, d)
