"""A store of documents for RAG: the training corpus, encoded as the memory's questions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.errors import InputError
from mlx_hiermem.routing.encoder import Encoder

_SLICE = 256


@dataclass(frozen=True)
class Store:
    """Documents and their vectors.

    Attributes:
        texts: distinct documents.
        vectors: (D, c) float32, unit length.
        facts: (D,) int64, the number of the fact that each states; None where nobody knows.
    """

    texts: list[str]
    vectors: np.ndarray
    facts: np.ndarray | None

    @classmethod
    def of(
        cls, encoder: Encoder, texts: Sequence[str], facts: Sequence[int] | None = None
    ) -> Store:
        """Encode documents.

        Raises:
            InputError: there is none.
        """
        if not texts:
            raise InputError("the store holds no document; give at least one")
        known = None if facts is None else np.asarray(facts, np.int64)
        return cls(list(texts), encoder.encode(list(texts)), known)

    def nearest(self, vectors: np.ndarray, count: int) -> np.ndarray:
        """The documents with the largest dot product, (N, count) int64, the nearest first."""
        count = min(count, len(self.texts))
        found = []
        for start in range(0, len(vectors), _SLICE):
            scores = vectors[start : start + _SLICE] @ self.vectors.T
            top = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
            found.append(np.take_along_axis(top, order, 1))
        return np.concatenate(found)

    def nearest_of(self, vectors: np.ndarray, facts: Sequence[int], stating: bool) -> np.ndarray:
        """The nearest document that states each question's fact, or (``stating`` False) another.

        Args:
            vectors: (N, c).
            facts: (N,), the fact that each question asks for.

        Returns:
            (N,) int64.

        Raises:
            InputError: no document is left for a question.
        """
        found = np.empty(len(vectors), np.int64)
        for i, (vector, fact) in enumerate(zip(vectors, facts, strict=True)):
            allowed = np.flatnonzero((self.facts == fact) == stating)
            if not len(allowed):
                raise InputError(f"no document for question {i}; is it the training corpus?")
            found[i] = allowed[(self.vectors[allowed] @ vector).argmax()]
        return found
