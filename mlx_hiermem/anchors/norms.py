"""The norms of OpenLM, all six kinds of its ``model_norm`` (norms.py of mlfoundations/open_lm).

The ``lp`` kinds are computed in half precision in training and have the same formula; MLX computes
every norm in float32 inside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.nn as nn

#: (width, eps) -> a norm over the last axis.
NORMS: dict[str, Callable[..., nn.Module]] = {
    "gain_only_layer_norm": partial(nn.LayerNorm, bias=False),
    "gain_only_lp_layer_norm": partial(nn.LayerNorm, bias=False),
    "default_layer_norm": nn.LayerNorm,
    "lp_layer_norm": nn.LayerNorm,
    "no_wb_layer_norm": partial(nn.LayerNorm, affine=False),
    "rms_norm": nn.RMSNorm,
}

#: What of a norm lies in files, by kind.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "gain_only_layer_norm": ("weight",),
    "gain_only_lp_layer_norm": ("weight",),
    "default_layer_norm": ("weight", "bias"),
    "lp_layer_norm": ("weight", "bias"),
    "no_wb_layer_norm": (),
    "rms_norm": ("weight",),
}


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """A norm over vectors of ``width`` numbers; ``kind`` is a key of ``NORMS``."""
    return NORMS[kind](width, eps=eps)
