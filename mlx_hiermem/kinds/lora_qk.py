"""LoRA-QK memories: LoRA on the query and the key projection (section 3 of the paper)."""

from __future__ import annotations

from ..shapes import AnchorShape
from ._layers import ATTENTION
from ._lora import LoRA


def _widths(shape: AnchorShape) -> dict[str, tuple[int, int]]:
    return {
        "q_proj": (shape.hidden_size, shape.attention_width),
        "k_proj": (shape.hidden_size, shape.key_value_width),
    }


KIND = LoRA("attention", ATTENTION, _widths)
