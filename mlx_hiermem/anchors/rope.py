"""What transformers 5 writes into a ``config.json``, in the words that mlx-lm's models read.

transformers 5 puts all of the rotary embedding into ``rope_parameters``, where earlier versions,
most of the Hub, and most of mlx-lm's models have ``rope_theta`` and ``rope_scaling``. A model that
does not know the new key takes its default base without a word, and computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from ..errors import ConfigError

#: What the older versions have in place of ``rope_parameters``.
OLDER = {
    "rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq",
    "sliding_window_pattern",
}  # fmt: skip


def older_keys(config: Mapping[str, Any], arguments: type | None = None) -> dict[str, Any]:
    """Keys to add to a ``config.json`` for a model of mlx-lm.

    Args:
        config: the ``config.json``.
        arguments: the model's class of arguments; without it, it is taken to know all older keys.

    Returns:
        Keys that the model takes and the config lacks; empty where it knows the new ones.

    Raises:
        ConfigError: ``rope_parameters`` is not made as transformers makes it.
    """
    given = config.get("rope_parameters")
    takes = {field.name for field in fields(arguments)} if is_dataclass(arguments) else set()
    takes = OLDER if arguments is None else takes
    if not given or "rope_parameters" in takes or "rope_theta" not in takes:
        return {}
    try:
        found = _from_layer_types(config, given) if "full_attention" in given else _plain(given)
    except (TypeError, KeyError, AttributeError, ValueError):
        raise ConfigError(
            f"config.json: rope_parameters is {str(given)[:120]}; expected an object with "
            "rope_theta and rope_type, or one such for each type of layer"
        ) from None
    return {key: value for key, value in found.items() if key in takes and config.get(key) is None}


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_theta": float(given["rope_theta"])}
    if "partial_rotary_factor" in given:
        found["partial_rotary_factor"] = given["partial_rotary_factor"]
    if given.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in given.items() if key != "rope_theta"}
    return found


def _from_layer_types(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model whose layers are local and global in turns, as Gemma 3's."""
    found = _plain(given["full_attention"])
    if "sliding_attention" in given:
        found["rope_local_base_freq"] = float(given["sliding_attention"]["rope_theta"])
    types = config.get("layer_types") or []
    if "full_attention" in types:
        found["sliding_window_pattern"] = types.index("full_attention") + 1
    return found
