"""The sizes and kinds of an OpenLM anchor.

Apart from the network, because importing mlx-lm takes seconds, which a conversion can do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.nn as nn

from ..errors import ConfigError
from ..shapes import MAX_SIZE, shown
from .norms import NORMS, make_norm
from .rotary import FREQUENCY_DTYPES, INTERLEAVED


@dataclass
class ModelArgs:
    """Sizes of an OpenLM anchor, as they stand in ``config.json``.

    The defaults are those of the paper's set-up; ``max_position_embeddings`` is the longest
    context that the anchor takes, prompt and answer together, in tokens. ``norm_type`` and
    ``positional_embedding_type`` have OpenLM's own names; ``rope_inv_freq_dtype`` is what inverse
    frequencies are rounded to (rotary.py says why).

    Raises:
        ConfigError: one of the kinds is unknown, or is ``head_rotary``.
    """

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    head_dim: int
    vocab_size: int = 50432
    model_type: str = "openlm"
    norm_eps: float = 1e-5
    rope_theta: float = 100_000.0
    qk_norm: bool = True
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    norm_type: str = "gain_only_layer_norm"
    post_embed_norm: bool = False
    positional_embedding_type: str = "rotary"
    rope_inv_freq_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_kinds(vars(self))

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> ModelArgs:
        """From a ``config.json``; keys that are not known are left out, as mlx-lm's models do."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in params.items() if key in known})

    def norm(self, width: int) -> nn.Module:
        """A norm of this anchor's kind over vectors of ``width`` numbers."""
        return make_norm(self.norm_type, width, self.norm_eps)


#: The rotary embedding of OpenLM that is refused.
HEAD_ROTARY = "head_rotary"


def check_kinds(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where a kind that a ``config.json`` names is none of ours."""
    if config.get("positional_embedding_type") == HEAD_ROTARY:
        raise ConfigError(
            "positional_embedding_type is 'head_rotary', an old bug of OpenLM that rotates along "
            "the heads instead of along the positions (open_lm_1b_old has it); models that were "
            "trained with it are not supported"
        )
    for name, known in (
        ("norm_type", tuple(NORMS)),
        ("positional_embedding_type", tuple(INTERLEAVED)),
        ("rope_inv_freq_dtype", FREQUENCY_DTYPES),
    ):
        value = config.get(name, known[0])
        if not isinstance(value, str) or value not in known:
            raise ConfigError(f"{name} is {shown(value)}; known are {', '.join(known)}")


#: Numbers of these types and what they are to be; MLX takes float32.
_FLOATS, _FLAGS = ("norm_eps", "rope_theta"), ("qk_norm", "tie_word_embeddings", "post_embed_norm")


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where a ``config.json`` has no number, or no flag, where one belongs.

    ``AnchorShape.of`` looks at the sizes that are not here.
    """
    for name in _FLOATS:
        value = config.get(name, 1.0)
        if type(value) not in (int, float) or not 0 <= value < 1e30:
            raise ConfigError(f"{name} is {shown(value)}; expected a number from 0 on")
    for name in _FLAGS:
        if not isinstance(config.get(name, False), bool):
            raise ConfigError(f"{name} is {shown(config[name])}; expected true or false")
    size = config.get("vocab_size", 1)
    if type(size) is not int or not 0 < size < MAX_SIZE:
        raise ConfigError(f"vocab_size is {shown(size)}; expected a positive integer")


#: The paper's anchors: 163,510,016, 411,665,408 and 1,439,893,504 parameters.
PRESETS: dict[str, ModelArgs] = {
    "160M": ModelArgs(512, 35, 2048, 12, 32, tie_word_embeddings=True),
    "410M": ModelArgs(1024, 24, 2816, 16, 64),
    "1.4B": ModelArgs(2048, 24, 5632, 16, 128),
}
