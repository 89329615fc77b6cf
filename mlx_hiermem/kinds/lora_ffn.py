"""LoRA-FFN memories: LoRA on the three matrices of the FFN (section 3 of the paper)."""

from __future__ import annotations

from ..shapes import AnchorShape
from ._layers import GATED_FFN
from ._lora import LoRA


def _widths(shape: AnchorShape) -> dict[str, tuple[int, int]]:
    width, inner = shape.hidden_size, shape.intermediate_size
    return {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}


KIND = LoRA("FFN", GATED_FFN, _widths)
