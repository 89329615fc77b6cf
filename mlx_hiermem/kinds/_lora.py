"""What the LoRA kinds share: W x + alpha B A x on some of a layer's matrices, with alpha = 2.

A block of rank r is, for each layer and each matrix W from ``in`` to ``out`` numbers, A as r rows
of width ``in`` and B as r rows of width ``out`` (that is, transposed): section 3 of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..shapes import AnchorShape
from ._kind import Forward, Kind, Lookup, plus_sum_of_rows, times_rows
from ._layers import check_sizes, part_of

#: What B A x is multiplied with (section 3 of the paper).
ALPHA = 2.0

#: What an anchor's matrix is called in the names of its A and B.
_SHORT = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o",
    "gate_proj": "w1", "up_proj": "w2", "down_proj": "w3",
}  # fmt: skip


class LoRA(Kind):
    """LoRA on some matrices of one part of a layer.

    Args:
        part: what the part is called in messages.
        names: of all linear layers that tell the part.
        widths: for each matrix that is adapted its name, and from which width to which it goes.
    """

    def __init__(
        self,
        part: str,
        names: tuple[str, ...],
        widths: Callable[[AnchorShape], dict[str, tuple[int, int]]],
    ) -> None:
        self.part, self.names, self.widths = part, names, widths

    @property
    def groups(self) -> tuple[int, ...]:
        return (1,) * len(self.matrices)

    @property
    def matrices(self) -> tuple[str, ...]:
        any_shape = AnchorShape(1, 1, 1, 1, 1)
        names = (_SHORT[name] for name in self.widths(any_shape))
        return tuple(f"{name}_{part}" for name in names for part in "ab")

    def row_widths(self, shape: AnchorShape) -> tuple[int, ...]:
        return tuple(width for pair in self.widths(shape).values() for width in pair)

    def start(self, rank: int, shape: AnchorShape, rng: np.random.Generator) -> list[np.ndarray]:
        """A uniform within 1/sqrt(in), which is LoRA's own Kaiming uniform; B zero."""
        matrices = []
        for width, out in self.widths(shape).values():
            a = rng.uniform(-(width**-0.5), width**-0.5, (rank, width)).astype(np.float32)
            matrices += [a, np.zeros((rank, out), np.float32)]
        return matrices

    def forwards(
        self, layer: nn.Module, shape: AnchorShape, lookup: Lookup
    ) -> Iterator[tuple[nn.Module, Forward]]:
        part = part_of(layer, self.part, self.names)
        for at, (name, widths) in enumerate(self.widths(shape).items()):
            check_sizes(part, name, widths)
            yield part[name], partial(_adapted, at=2 * at, lookup=lookup)


def _adapted(base: Callable[..., mx.array], x: mx.array, *, at: int, lookup: Lookup) -> mx.array:
    out, memory = base(x), lookup()
    if memory is None:
        return out
    a, b = memory[at : at + 2]  # (B or 1, R, in), (B or 1, R, out)
    return plus_sum_of_rows(out, ALPHA * times_rows(x, a), b)
