"""The rotary embeddings of OpenLM: half-split, interleaved, none, and with rounded frequencies.

OpenLM's ``rotary`` rounds its inverse frequencies to the dtype of the keys (line 74 of its
rotary.py). An anchor that was trained in bfloat16 has therefore seen other angles: at position
2,047 and with heads of 64 numbers they are off by up to 0.9 rad. ``rounded`` does the same.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

#: Kinds, and whether they pair neighbours (interleaved) or the halves of a head.
INTERLEAVED: dict[str, bool | None] = {"rotary": False, "llama_rotary": True, "none": None}
#: Dtypes that inverse frequencies are rounded to.
FREQUENCY_DTYPES = ("float32", "bfloat16")


class NoRotary(nn.Module):
    """No positional embedding at all."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return x


class RoundedRoPE(nn.Module):
    """Rotary embedding whose inverse frequencies are rounded to bfloat16.

    Args:
        dims: numbers of a head.
        traditional: pair neighbours.
        base: of the frequencies, before they are rounded.
    """

    def __init__(self, dims: int, traditional: bool, base: float) -> None:
        super().__init__()
        self.dims, self.traditional = dims, traditional
        # In NumPy, so that no backend's power function decides which way one is rounded.
        frequencies = mx.array(float(base) ** -(np.arange(0, dims, 2) / dims), mx.float32)
        rounded = frequencies.astype(mx.bfloat16).astype(mx.float32)
        self._periods = 1 / rounded  # what MLX calls freqs; hidden: it is no parameter

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=None, scale=1.0, offset=offset,
            freqs=self._periods,
        )  # fmt: skip


def make_rotary(kind: str, dims: int, base: float, rounded: bool) -> nn.Module:
    """The rotary embedding of heads of ``dims`` numbers, (..., T, dims) -> the same.

    Args:
        kind: a key of ``INTERLEAVED``.
        base: of the frequencies.
        rounded: round inverse frequencies to bfloat16.
    """
    interleaved = INTERLEAVED[kind]
    if interleaved is None:
        return NoRotary()
    if rounded:
        return RoundedRoPE(dims, interleaved, base)
    return nn.RoPE(dims, traditional=interleaved, base=base)
