"""AnchorShape: the sizes of an anchor that the size of a memory depends on.

Nothing in here imports MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError

#: Most layers of an anchor, and what all its sizes and the ranks stay below. Far more than there
#: is; a config from elsewhere must not make us count to whatever it names.
MAX_LAYERS, MAX_SIZE = 10_000, 2**31


def shown(value: Any) -> str:
    """``value`` for an error text: on one line, and short whatever it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class AnchorShape:
    """The sizes of an anchor, named as in a ``config.json``.

    ``head_dim`` is a field of its own: in the paper's 160M anchor it is not ``hidden_size /
    num_attention_heads``. ``num_key_value_heads`` is ``num_attention_heads`` unless heads share
    their keys and values (GQA).
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    head_dim: int
    num_key_value_heads: int = 0

    def __post_init__(self) -> None:
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)

    @property
    def attention_width(self) -> int:
        """Width of all heads' queries together: heads x head size."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Width of all keys, and of all values, of one token."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def of(cls, anchor: AnchorShape | Mapping[str, Any] | Any) -> AnchorShape:
        """Read the shape from a ``config.json`` mapping, model arguments, or a model.

        Raises:
            ConfigError: a size is missing or is not a positive integer.
        """
        if isinstance(anchor, cls):
            return anchor
        # Of a model that sees as well, the language model: its arguments have the defaults.
        source = arguments_of(getattr(anchor, "language_model", anchor))
        if _get(source, "hidden_size") is None and _get(source, "text_config") is not None:
            source = _get(source, "text_config")  # of a model that sees as well
        sizes = {f.name: _get(source, f.name) for f in fields(cls)}
        width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        if sizes["head_dim"] is None and type(width) is type(heads) is int and heads:
            sizes["head_dim"] = width // heads
        if sizes["num_key_value_heads"] is None:
            sizes["num_key_value_heads"] = heads
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(
                    f"the anchor's config: {name} is {shown(size)}; expected a positive integer"
                )
            most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE - 1
            if size > most:
                raise ConfigError(
                    f"the anchor's config: {name} is {shown(size)}; expected at most {most}"
                )
        return cls(**sizes)


def arguments_of(model: Any) -> Any:
    """The arguments that a model of mlx-lm was made with; anything else is given back."""
    for name in ("args", "config"):
        if (found := getattr(model, name, None)) is not None:
            return found
    return model


def _get(source: Any, name: str) -> Any:
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
