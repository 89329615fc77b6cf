"""A small encoder that is trained to bring the wordings of one fact together.

It is the sum of its tokens' vectors, as the atlas's own encoder is, but the vectors are learnt: a
prompt shall be nearer to another prompt or text of the same fact than to those of all other facts
of the batch (InfoNCE, "Representation learning with contrastive predictive coding", van den Oord,
Li, Vinyals 2018). It sees the wordings of the training corpus alone, each as often as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_hiermem.routing.embeddings import EmbeddingEncoder

STEPS, BATCH, RATE, TEMPERATURE = 300, 256, 1e-3, 0.05

#: (prompt, whole text) of each wording of one fact.
Views = Sequence[tuple[str, str]]


def train_encoder(
    start: EmbeddingEncoder,
    table: np.ndarray,
    facts: Sequence[Views],
    seed: int = 0,
    steps: int = STEPS,
) -> np.ndarray:
    """Train token vectors from those that an encoder adds up, to be taken by :func:`of_vectors`.

    Args:
        start: the encoder.
        table: (V, d), the anchor's token embeddings that it was made of.
        facts: their wordings, at least one of each.
        seed: of the draws.
        steps: of AdamW, over ``BATCH`` facts each.

    Returns:
        (V, d) float32.
    """
    rng = np.random.default_rng(seed)
    ids = [[tuple(_ids(start, text) for text in view) for view in views] for views in facts]
    optimizer = optim.AdamW(optim.cosine_decay(RATE, max(steps, 1)), weight_decay=0.0)
    state = {"vectors": mx.array(_vectors(start, table))}
    step = mx.value_and_grad(_loss)
    for _ in range(steps):
        chosen = rng.choice(len(ids), min(BATCH, len(ids)), replace=False)
        asked, found = [], []
        for fact in chosen:
            one, other = rng.integers(len(ids[fact]), size=2)
            asked.append(ids[fact][one][0])
            found.append(ids[fact][other][rng.integers(2)])
        _, gradients = step(state, _padded(asked), _padded(found))
        state = optimizer.apply_gradients(gradients, state)
        mx.eval(state, optimizer.state)
    return np.array(state["vectors"])


def of_vectors(vectors: np.ndarray, start: EmbeddingEncoder) -> EmbeddingEncoder:
    """The encoder that adds these token vectors (V, d) up, for the tokens of ``start``."""
    lengths = np.linalg.norm(vectors, axis=1).astype(np.float32)
    none = np.zeros((0, vectors.shape[1]), np.float32)
    return EmbeddingEncoder(vectors, start.tokenizer, lengths, none, start.lowercase)


def _vectors(start: EmbeddingEncoder, table: np.ndarray) -> np.ndarray:
    """Each token's vector as the encoder adds it up, the common components taken out."""
    lengths = np.linalg.norm(table, axis=1, keepdims=True)
    vectors = table / np.maximum(lengths, 1e-12) * start.weights[:, None]
    rest = vectors - (vectors @ start.components.T) @ start.components
    return rest.astype(np.float32)


def _ids(start: EmbeddingEncoder, text: str) -> list[int]:
    text = text.lower() if start.lowercase else text
    return start.tokenizer.encode(text, add_special_tokens=False)


def _padded(texts: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array]:
    """Ids (B, T) with zeros behind the end, and what counts, 1 or 0 (B, T, 1)."""
    length = max(map(len, texts))
    ids, counts = np.zeros((2, len(texts), length), np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        counts[row, : len(text)] = 1
    return mx.array(ids), mx.array(counts[..., None].astype(np.float32))


def _encode(vectors: mx.array, ids: mx.array, counts: mx.array) -> mx.array:
    """(B, d), rows of unit length."""
    total = (vectors[ids] * counts).sum(axis=1)
    return total / mx.maximum(mx.linalg.norm(total, axis=-1, keepdims=True), 1e-6)


def _loss(state: dict[str, Any], asked: Any, found: Any) -> mx.array:
    vectors = state["vectors"]
    near = _encode(vectors, *asked) @ _encode(vectors, *found).T / TEMPERATURE  # (B, B)
    return nn.losses.cross_entropy(near, mx.arange(len(near)), reduction="mean")
