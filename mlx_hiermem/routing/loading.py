"""The encoder that a bank was made with, from the entry of its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .encoder import Encoder


def load_encoder(
    config: Mapping[str, Any], *, folder: str | Path, anchor: Any = None, tokenizer: Any = None
) -> Encoder:
    """The encoder that ``config`` names.

    Args:
        config: the entry ``encoder`` of ``memory/config.json``.
        folder: the memory folder; file names in ``config`` are relative to it.
        anchor: the model whose token embeddings the type "embeddings" takes.
        tokenizer: the anchor's tokenizer, for the same type.

    Raises:
        ConfigError: unknown type or key, a value of the wrong type, or no anchor where one is
            needed.
        FormatError: a file is missing or damaged.
    """
    kind = config.get("type") if isinstance(config, Mapping) else None
    if kind == "embeddings":
        from .embeddings import EmbeddingEncoder, embedding_table

        values = _check_config(config, {"lowercase": bool, "file": str})
        if anchor is None or tokenizer is None:
            raise ConfigError(
                "encoder: type embeddings needs the anchor and its tokenizer; load the whole model"
            )
        return EmbeddingEncoder.load(folder, embedding_table(anchor), tokenizer, **values)
    if kind == "bert":
        from .bert import BertEncoder

        values = _check_config(config, {"model": str, "revision": str, "max_length": int})
        return BertEncoder.load(folder=folder, **values)
    raise ConfigError(f"encoder: type is {kind!r}; known are embeddings, bert")


def _check_config(config: Mapping[str, Any], known: Mapping[str, type]) -> dict[str, Any]:
    """The values of ``config`` besides its type; unknown keys and wrong types are refused.

    A null value counts as not given.
    """
    values = {key: value for key, value in config.items() if key != "type"}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            f"encoder: unknown key {', '.join(unknown)} for type {config['type']}; known keys are "
            f"{', '.join(known)}"
        )
    values = {key: value for key, value in values.items() if value is not None}
    for key, value in values.items():
        if type(value) is not known[key]:
            raise ConfigError(
                f"encoder: {key} is {value!r}; expected a value of type {known[key].__name__}"
            )
    return values
