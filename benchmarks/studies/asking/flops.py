"""Floating-point operations of answering a question, counted from sizes (the paper, table 3).

An answer of n tokens after a prompt of T tokens feeds T + n - 1 tokens to the anchor, of which n
are followed by the head. Token number t costs

- 2 for each weight of the layers' matrices (norms and the look-up of embeddings are left out),
- 2 for each number of the fetched memory: each is a weight, or part of a key or value,
- 4 * layers * heads * head_dim * t for attention: scores and sums over the t tokens so far,

and the head 2 for each of its weights. Finding a memory costs 3 * c * k * p: at each level a
difference, a square and a sum over c numbers for k children. Finding documents costs 2 * c for each
of D documents, where all are compared. Encoding the question is needed by both and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_hiermem.config import AnchorShape
from mlx_hiermem.errors import ConfigError


@dataclass(frozen=True)
class Sizes:
    """What the count is made from.

    Attributes:
        body: weights of the matrices that every token meets.
        head: weights of the head, the token embeddings where they are tied.
        attention: layers * heads * head_dim.
        memory: numbers of a fetched memory.
    """

    body: int
    head: int
    attention: int
    memory: int


def sizes_of(anchor: nn.Module, fetch_size: int) -> Sizes:
    """The sizes of an anchor and its memory.

    Raises:
        ConfigError: the anchor is quantised, or its embeddings have no usual name.
    """
    weights = {
        name: value.size for name, value in tree_flatten(anchor.parameters()) if value.ndim == 2
    }
    tables = [name for name in weights if name.endswith("embed_tokens.weight")]
    if len(tables) != 1 or any(isinstance(m, nn.QuantizedLinear) for m in anchor.modules()):
        raise ConfigError(
            "FLOPs are counted for anchors in floating point with one embed_tokens; this one is "
            "built otherwise"
        )
    heads = [name for name in weights if name.endswith("lm_head.weight")]
    table = weights.pop(tables[0])
    head = sum(weights.pop(name) for name in heads) if heads else table
    shape = AnchorShape.of(anchor)
    attention = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    return Sizes(sum(weights.values()), head, attention, fetch_size)


def answering(sizes: Sizes, prompt: int, answer: int, memory: bool) -> int:
    """Of prefill and decoding: ``prompt`` tokens, then ``answer`` tokens."""
    fed = prompt + answer - 1
    per_token = 2 * (sizes.body + (sizes.memory if memory else 0))
    attention = 4 * sizes.attention * fed * (fed + 1) // 2
    return per_token * fed + attention + 2 * sizes.head * answer


def routing(width: int, branching: int, levels: int) -> int:
    """Of finding a cluster path, c = ``width``."""
    return 3 * width * branching * levels


def searching(width: int, documents: int) -> int:
    """Of comparing a question with every document of a store."""
    return 2 * width * documents
