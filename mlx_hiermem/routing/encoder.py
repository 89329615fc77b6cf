"""What an encoder is, and which one a memory's config names.

An encoder turns texts into the unit vectors that are routed. ``memory/config.json`` names it:

- ``{"type": "embeddings", "lowercase": true, "file": "encoder.safetensors"}``: the anchor's own
  token embeddings (``embeddings.py``); no second network;
- ``{"type": "bert", "model": folder or Hub repo, "revision": ..., "max_length": 256}``: a BERT
  sentence encoder (``bert.py``); the paper's is all-MiniLM-L6-v2, and so is the default.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError


class Encoder(ABC):
    """Texts to unit vectors."""

    @property
    @abstractmethod
    def width(self) -> int:
        """c, numbers in a vector."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, c) float32, each row of unit length.

        Raises:
            InputError: ``texts`` is not a list of strings.
        """

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """The entry ``encoder`` of ``memory/config.json`` that loads this encoder."""


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

        values = check_config(config, {"lowercase": bool, "file": str})
        if anchor is None or tokenizer is None:
            raise ConfigError(
                "encoder: type embeddings needs the anchor and its tokenizer; load the whole model"
            )
        return EmbeddingEncoder.load(folder, embedding_table(anchor), tokenizer, **values)
    if kind == "bert":
        from .bert import BertEncoder

        values = check_config(config, {"model": str, "revision": str, "max_length": int})
        return BertEncoder.load(folder=folder, **values)
    raise ConfigError(f"encoder: type is {kind!r}; known are embeddings, bert")


def check_config(config: Mapping[str, Any], known: Mapping[str, type]) -> dict[str, Any]:
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


def check_texts(texts: Sequence[str]) -> list[str]:
    """``texts`` as a list of strings, or an InputError."""
    if isinstance(texts, str):
        raise InputError("texts to encode: found one string; expected a list of strings")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"texts to encode: entry {position} is a {type(text).__name__}; expected a string"
            )
    return texts
