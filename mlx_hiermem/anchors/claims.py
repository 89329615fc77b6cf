"""What the files of an anchor claim, before anything is made of it.

A config from elsewhere must not make us build what its weights do not have: mlx-lm makes one
module for each layer and expert that it names, however many.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ConfigError, FormatError, one_line
from ..shapes import MAX_LAYERS, shown

#: The keys of a config that say how often something is made.
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers")
#: What is in a list or text may have one entry for each layer, or for each frequency of a head.
_LONGEST = 1024
_OTHERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_loops")


def count_tensors(folder: Path) -> int | None:
    """Tensors in the weights of a folder, whose headers are read and checked.

    Returns:
        How many, or None where no file of weights is there, which mlx-lm says itself.

    Raises:
        FormatError: a file is damaged.
    """
    count = 0
    paths = sorted(folder.glob("model*.safetensors"))
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                count += len(file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            reason = one_line(error, 120)
            raise FormatError(
                f"{path}: not a readable safetensors file ({reason}); fetch it again"
            ) from None
    return count if paths else None


def check_counts(config: Mapping[str, Any], tensors: int) -> None:
    """Raise ConfigError where a config names more layers or experts than there can be.

    Args:
        tensors: in the weights, of which each layer has one at least.
    """
    inner = config.get("text_config")
    for table in (config, inner if isinstance(inner, Mapping) else {}):
        for keys, most in ((_LAYERS, min(tensors, MAX_LAYERS)), (_OTHERS, MAX_LAYERS)):
            for key in keys:
                value = table.get(key)
                if isinstance(value, (int, float)) and not value <= most:
                    raise ConfigError(
                        f"{key} is {shown(value)}, but the weights have {tensors} tensors; fetch "
                        "the model again"
                    )
        for key, value in table.items():
            if isinstance(value, (str, list)) and len(value) > max(tensors, _LONGEST):
                raise ConfigError(
                    f"{shown(key)} has {len(value)} entries, but the weights have {tensors} "
                    "tensors; fetch the model again"
                )
