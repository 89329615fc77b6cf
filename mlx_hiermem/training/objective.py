"""The training objective: next token, with attention kept inside each document.

Source: section 3 of the paper (loss with anchor and fetched memory together; attention restricted
to each document).
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..memories import MemoryModel


def document_mask(tokens: mx.array, end_of_text: int) -> mx.array:
    """Who may attend to whom in packed sequences (B, T): boolean (B, 1, T, T).

    A token sees itself and earlier tokens of its own document. The end-of-text token is the last
    token of the document before it.
    """
    ends = (tokens == end_of_text).astype(mx.int32)
    document = mx.cumsum(ends, axis=1) - ends  # an end-of-text token still counts to its document
    same = document[:, :, None] == document[:, None, :]
    position = mx.arange(tokens.shape[1])
    return (same & (position[:, None] >= position[None, :]))[:, None]


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross entropy in nats, (B, T) float32, of logits (B, T, V) at the target tokens (B, T).

    The same number as ``mlx.nn.losses.cross_entropy``, with one exponential per logit for forward
    and backward together instead of two, and that one as a power of two: on the CPU backend the
    loss of a small model with a large vocabulary is most of a step, and this makes it 2.5 times
    cheaper.
    """
    logits = logits.astype(mx.float32)
    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    total = mx.power(2.0, (logits - top) * math.log2(math.e)).sum(axis=-1)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)
    return mx.log(total) + (top - chosen).squeeze(-1)


def next_token_loss(
    model: nn.Module,
    tokens: mx.array,
    memory: Any,
    end_of_text: int,
    mask_documents: bool = True,
) -> tuple[mx.array, mx.array]:
    """Summed cross entropy of the next token, in nats, and the number of tokens predicted.

    The sum, so that parts of a batch add up, whatever the number of tokens in each.

    Args:
        model: a :class:`MemoryModel`, or a bare anchor when ``memory`` is None.
        tokens: packed sequences (B, T).
        memory: as a ``MemoryModel`` takes it, or None for the anchor alone.
        end_of_text: token between documents. What follows it is the start of an unrelated
            document, which nothing could predict, so it is left out of the loss.
        mask_documents: keep attention inside documents; off for anchors that were not
            pretrained so.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    options = {"mask": document_mask(inputs, end_of_text)} if mask_documents else {}
    if isinstance(model, MemoryModel):
        options["memory"] = memory
    logits = model(inputs, **options)
    counted = inputs != end_of_text
    return (cross_entropy(logits, targets) * counted).sum(), counted.sum()


def predicted_tokens(tokens: np.ndarray, end_of_text: int) -> int:
    """How many tokens of packed sequences (B, T) the loss counts."""
    return int((tokens[:, :-1] != end_of_text).sum())
