"""FFN memories, the paper's default kind: rows that widen the gated FFN of each layer.

For a layer with x (B, T, d) the memory adds M3 (act(M1 x) * M2 x) to the anchor's FFN output, which
is the same as concatenating M1, M2 and M3 to the anchor's matrices (section 2 of the paper). The
activation is the anchor's own, whichever that is (SwiGLU, GeGLU, ...).

A block of rank r is, for each layer, M1, M2 and M3, each as r rows of width d.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..shapes import AnchorShape
from ._kind import Forward, Kind, Lookup, NoPlace, plus_sum_of_rows, times_rows, truncated_normal
from ._layers import GATED_FFN, check_sizes, part_of, sizes

#: M1 x and M2 x, (B, T, R) each -> act(M1 x) * M2 x, (B, T, R).
Activation = Callable[[mx.array, mx.array], mx.array]

#: What gate and up go from and to, over the inner units, when an FFN is tried.
ENDS = ((1, -1), (2, 1))


class FFN(Kind):
    """Section 2 of the paper; M1 and M2 are handed over as one array."""

    groups = (2, 1)
    matrices = ("w1", "w2", "w3")

    def row_widths(self, shape: AnchorShape) -> tuple[int, ...]:
        return (shape.hidden_size,) * 3

    def start(self, rank: int, shape: AnchorShape, rng: np.random.Generator) -> list[np.ndarray]:
        """M1 and M2 truncated normal, M3 zero (section 3 of the paper, which gives no deviation;
        ours is twice that of the fan-in, with which the loss fell faster at first)."""
        width = shape.hidden_size
        m1, m2 = truncated_normal(rng, (2, rank, width), 2 * width**-0.5)
        return [m1, m2, np.zeros((rank, width), np.float32)]

    def forwards(
        self, layer: nn.Module, shape: AnchorShape, lookup: Lookup
    ) -> Iterator[tuple[nn.Module, Forward]]:
        ffn = part_of(layer, "FFN", GATED_FFN)
        inner = sizes(ffn, "gate_proj")[1]
        check_sizes(ffn, "gate_proj", (shape.hidden_size, inner))
        check_sizes(ffn, "up_proj", (shape.hidden_size, inner))
        check_sizes(ffn, "down_proj", (inner, shape.hidden_size))
        activation = activation_of(ffn)

        def forward(base: Callable[..., mx.array], x: mx.array) -> mx.array:
            out, memory = base(x), lookup()
            if memory is None:
                return out
            m12, m3 = memory
            return with_branch(out, x, m12, m3, activation)

        yield ffn, forward


def with_branch(
    out: mx.array, x: mx.array, m12: mx.array, m3: mx.array, activation: Activation
) -> mx.array:
    """A layer's FFN output with what the memory adds.

    Args:
        out: the anchor's FFN output (B, T, d).
        x: the FFN's input (B, T, d).
        m12: this layer's M1 and M2, (B or 1, 2R, d).
        m3: its M3 (B or 1, R, d).
        activation: the anchor's.

    Returns:
        (B, T, d), in the dtype of ``out``.
    """
    # (B, T, d) -> (B, T, 2R), in two -> (B, T, R) -> (B, T, d)
    gate, up = mx.split(times_rows(x, m12), 2, axis=-1)
    return plus_sum_of_rows(out, activation(gate, up), m3)


def activation_of(ffn: nn.Module) -> Activation:
    """What an FFN does between its first two matrices and its last, as a function of its own.

    A copy of the FFN, which shares its other parts, runs the FFN's own code on the pair of both
    products, with stubs in place of the three matrices: ``gate_proj`` hands on the first,
    ``up_proj`` the second, ``down_proj`` what it is given. So no architecture has to be known by
    name.

    Raises:
        NoPlace: what it does mixes the inner dimension, so that it cannot be widened.
    """
    stub = copy.copy(ffn)
    stub["gate_proj"] = lambda pair: pair[0]
    stub["up_proj"] = lambda pair: pair[1]
    stub["down_proj"] = lambda inner: inner
    run = type(ffn).__call__

    def activation(gate: mx.array, up: mx.array) -> mx.array:
        return run(stub, (gate, up))

    mixes = NoPlace(
        f"has an FFN ({type(ffn).__name__}) that does more between its matrices than to multiply "
        "up by an activation of gate, so it cannot be widened"
    )
    width = 4
    # The first, which is changed, is above 0: below it, a ReLU would not change.
    gate, up = (mx.array(np.linspace(*ends, width, dtype=np.float32))[None, None] for ends in ENDS)
    other = 0.25 * (mx.arange(width) == 0)
    try:
        out = activation(gate, up)
        changed = [activation(gate + other, up) != out, activation(gate, up + other) != out]
        mx.eval(out, changed)
    except Exception as error:  # code of any architecture, which may want anything
        raise mixes from error
    first = [True] + [False] * (width - 1)
    if out.shape != (1, 1, width) or any(one.reshape(-1).tolist() != first for one in changed):
        raise mixes
    return activation


KIND = FFN()
