"""LoRA-VO memories: LoRA on the value and the output projection (section 3 of the paper)."""

from __future__ import annotations

from ..shapes import AnchorShape
from ._layers import ATTENTION
from ._lora import LoRA


def _widths(shape: AnchorShape) -> dict[str, tuple[int, int]]:
    return {
        "v_proj": (shape.hidden_size, shape.key_value_width),
        "o_proj": (shape.attention_width, shape.hidden_size),
    }


KIND = LoRA("attention", ATTENTION, _widths)
