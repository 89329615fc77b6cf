"""What an encoder is, and which one a memory's config names.

An encoder turns texts into the unit vectors that are routed. ``memory/config.json`` names it:

- ``{"type": "embeddings", "lowercase": true, "file": "encoder.safetensors"}``: the anchor's own
  token embeddings (``embeddings.py``); no second network;
- ``{"type": "bert", "model": folder or Hub repo, "revision": ..., "max_length": 256}``: a BERT
  sentence encoder (``bert.py``); the paper's is all-MiniLM-L6-v2, and so is the default.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError


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
