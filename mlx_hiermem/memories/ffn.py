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
import numpy as np

#: For each layer with memory M1, M2 and M3, each (B or 1, R, d).
Matrices = list[tuple[mx.array, mx.array, mx.array]]


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


def shaped(joined: mx.array, layers: int, width: int) -> mx.array:
    """A joined memory as a bank gives it, (..., numbers), as (..., L, 3, R, d); no copy."""
    return joined.reshape(*joined.shape[:-1], layers, 3, -1, width)


def matrices(memory: mx.array) -> Matrices:
    """A joined memory (B, L, 3, R, d) layer by layer: M1, M2 and M3 as (B, R, d)."""
    return [tuple(memory[:, layer, part] for part in range(3)) for layer in range(memory.shape[1])]


def split(matrices: Matrices, ranks: Sequence[int]) -> list[mx.array]:
    """From matrices, or their gradients, back to the blocks of each level.

    Args:
        matrices: as :func:`matrices` gives them.
        ranks: r_l of each level with memory; their sum is R.

    Returns:
        One array (B, s_l) per level.
    """
    blocks, start = [], 0
    for rank in ranks:
        # L * 3 times (B, R, d) -> (B, r_l * d), one behind the other: (B, L * 3 * r_l * d)
        rows = [
            matrix[:, start : start + rank].reshape(len(matrix), -1)
            for layer in matrices
            for matrix in layer
        ]
        blocks.append(mx.concatenate(rows, axis=1))
        start += rank
    return blocks


def init_block(layers: int, rank: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Start values of one block, (L * 3 * r * d,) float32: no effect on the anchor.

    M1 and M2 are truncated normal, cut at two deviations, M3 is zero (section 3 of the paper, which
    gives no deviation; ours is twice that of the fan-in, with which the loss fell faster at first).
    Drawn with NumPy: the same on every backend, and a thread that reads rows may do it.
    """
    block = np.zeros((layers, 3, rank, width), np.float32)
    for layer in block:
        gate_up = rng.standard_normal((2, rank, width), np.float32)
        while (beyond := np.flatnonzero(np.abs(gate_up) > 2)).size:
            gate_up.reshape(-1)[beyond] = rng.standard_normal(beyond.size, np.float32)
        layer[:2] = gate_up * np.float32(2 * width**-0.5)
    return block.reshape(-1)


def branch(
    x: mx.array,
    memory: tuple[mx.array, mx.array, mx.array],
    activation: Callable[[mx.array], mx.array] = nn.silu,
) -> mx.array:
    """What the memory adds to one layer's FFN output.

    Args:
        x: the FFN's input (B, T, d).
        memory: this layer's M1, M2 and M3, each (B or 1, R, d).
        activation: the anchor's gate activation.

    Returns:
        (B, T, d), in the dtype of ``x``.
    """
    m1, m2, m3 = memory
    if m1.shape[0] == 1:
        # One memory for the whole batch: plain matrices let the backend use one large product.
        m1, m2, m3 = m1[0], m2[0], m3[0]
    # (B, T, d) @ (B, d, R) -> (B, T, R)
    hidden = activation(x @ m1.swapaxes(-1, -2)) * (x @ m2.swapaxes(-1, -2))
    return hidden @ m3  # (B, T, R) @ (B, R, d) -> (B, T, d)
