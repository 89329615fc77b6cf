"""Ways to route the atlas's corpus: which tree, which encoder, and what of a document is routed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from apps.atlas.corpus import Document
from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.routing.bert import BertEncoder
from mlx_hiermem.routing.embeddings import EmbeddingEncoder, embedding_table
from mlx_hiermem.routing.encoder import Encoder

#: Encoders: the atlas's own (weighted token embeddings without their common components); the plain
#: mean of the same embeddings; the mean of the anchor's last hidden states; token vectors that were
#: trained to bring wordings together (``trained_encoder.py``). "bert:MODEL" is a BERT besides.
ENCODERS = ("sif", "mean", "hidden", "trained")
BERT = "bert:"
LONGEST = 64  # tokens of a text that a BERT reads; the atlas's are of one sentence

#: What of a document is routed: its own prompt, the answer left out; its whole text, as the paper
#: does; or, for all documents of a fact together, the whole text of the first of them.
VIEWS = ("prompt", "text", "once")


@dataclass(frozen=True)
class Way:
    """How a corpus is routed; the defaults are the atlas's.

    Attributes:
        branching, levels: k and p of the tree.
        encoder: one of ``ENCODERS``, or ``BERT`` and a folder or repo.
        views: one of ``VIEWS``.
    """

    branching: int = 16
    levels: int = 2
    encoder: str = "sif"
    views: str = "prompt"

    @property
    def name(self) -> str:
        """Of its files."""
        encoder = re.sub(r"[^\w.-]+", "_", self.encoder)
        return f"tree-{self.branching}-{self.levels}-{encoder}-{self.views}"


def find_encoder(name: str, lm: MemoryLM) -> Encoder:
    """The encoder of this name, on the atlas that ships; not the one that has to be trained."""
    if name == "sif":
        assert lm.encoder is not None
        return lm.encoder
    if name == "mean":
        table = embedding_table(lm.model.anchor)
        ones, none = np.ones(len(table), np.float32), np.zeros((0, table.shape[1]), np.float32)
        return EmbeddingEncoder(table, lm.tokenizer, ones, none)
    if name == "hidden":
        return HiddenEncoder(lm)
    if name.startswith(BERT):
        model = name.removeprefix(BERT)
        return BertEncoder.load(folder=Path.cwd(), model=model, max_length=LONGEST)
    raise ValueError(f"encoder {name!r}: expected one of {', '.join(ENCODERS)}")


def routed_texts(views: str, documents: Sequence[Document]) -> list[str]:
    """What is routed of each document."""
    if views == "prompt":
        return [document.prompt for document in documents]
    if views == "text":
        return [document.text for document in documents]
    first: dict[int, str] = {}
    for document in documents:
        if document.wording == 0 or document.fact_index not in first:
            first[document.fact_index] = document.text
    return [first[document.fact_index] for document in documents]


class HiddenEncoder(Encoder):
    """The mean of the anchor's last hidden states, memory off.

    Args:
        lm: its anchor is used, and its tokenizer.
    """

    #: Texts at a time; those of one length, so that nothing is padding.
    BATCH = 256

    def __init__(self, lm: MemoryLM) -> None:
        self._anchor = lm.model.anchor
        self._tokenizer = lm.tokenizer

    @property
    def width(self) -> int:
        return self._anchor.args.hidden_size

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32, rows of unit length."""
        tokens = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        found = np.empty((len(texts), self.width), np.float32)
        by_length: dict[int, list[int]] = {}
        for row, ids in enumerate(tokens):
            by_length.setdefault(len(ids), []).append(row)
        for length, rows in by_length.items():
            for start in range(0, len(rows), self.BATCH):
                part = rows[start : start + self.BATCH]
                if not length:
                    found[part] = np.eye(1, self.width)
                    continue
                hidden = self._anchor.model(mx.array([tokens[row] for row in part]))
                found[part] = np.array(hidden.mean(axis=1).astype(mx.float32))
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def to_config(self) -> dict[str, Any]:
        return {"type": "embeddings", "study": "hidden"}
