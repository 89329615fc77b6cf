"""KV memories: learned pairs of keys and values, which the queries of a layer attend to.

No mask and no positional encoding: the queries are those before the rotary embedding, after the
anchor's query norm where it has one. The result is added to the attention's output of each head,
before the output projection (section 3 of the paper). Where heads share keys and values (GQA), they
share those of the memory in the same way, so a pair has the size of one in the anchor's own cache.

A block of rank r is, for each layer, r keys and r values of all key/value heads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..shapes import AnchorShape
from ._kind import Forward, Kind, Lookup, NoPlace, truncated_normal
from ._layers import ATTENTION, check_sizes, part_of

#: What mlx-lm's attentions call their query norm.
QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm")


class KV(Kind):
    """Section 3 of the paper; a block that is blocked keeps its share of the softmax, as zeros."""

    groups = (1, 1)
    matrices = ("keys", "values")

    def row_widths(self, shape: AnchorShape) -> tuple[int, ...]:
        return (shape.key_value_width,) * 2

    def start(self, rank: int, shape: AnchorShape, rng: np.random.Generator) -> list[np.ndarray]:
        """Keys truncated normal with a deviation of 1 (ours, the paper gives none); values zero."""
        size = (rank, shape.key_value_width)
        return [truncated_normal(rng, size, 1.0), np.zeros(size, np.float32)]

    def forwards(
        self, layer: nn.Module, shape: AnchorShape, lookup: Lookup
    ) -> Iterator[tuple[nn.Module, Forward]]:
        attention = part_of(layer, "attention", ATTENTION)
        check_sizes(attention, "q_proj", (shape.hidden_size, shape.attention_width))
        check_sizes(attention, "k_proj", (shape.hidden_size, shape.key_value_width))
        check_sizes(attention, "o_proj", (shape.attention_width, shape.hidden_size))
        normed = query_norm(attention, shape)
        scale = getattr(attention, "scale", shape.head_dim**-0.5)
        # From the query projection to the output projection of one call, per thread.
        call = threading.local()

        def queries(base: Callable[..., mx.array], x: mx.array) -> mx.array:
            out = base(x)
            call.queries = None if lookup() is None else out
            return out

        def outputs(base: Callable[..., mx.array], heads: mx.array) -> mx.array:
            memory, found = lookup(), getattr(call, "queries", None)
            call.queries = None
            if memory is None:
                return base(heads)
            assert found is not None, "q_proj is called before o_proj"
            keys, values = memory
            extra = attend(normed(found), keys, values, shape, scale)
            return base(heads + extra.astype(heads.dtype))

        yield attention.q_proj, queries
        yield attention.o_proj, outputs


def query_norm(attention: nn.Module, shape: AnchorShape) -> Callable[[mx.array], mx.array]:
    """Queries (B, T, heads * head size) -> (B, T, heads, head size), normalised as the anchor does.

    Raises:
        NoPlace: its query norm is neither over a head nor over all heads together.
    """
    norm = next((attention[name] for name in QUERY_NORMS if name in attention), None)
    heads, size = shape.num_attention_heads, shape.head_dim

    def split(queries: mx.array) -> mx.array:
        return queries.reshape(*queries.shape[:2], heads, size)

    if norm is None:
        return split
    gain = norm.get("weight")
    if gain is None and getattr(norm, "dims", size) == heads * size:
        return lambda queries: split(norm(queries))
    if gain is None or gain.shape in ((size,), (heads, size)):
        return lambda queries: norm(split(queries))
    if gain.shape == (heads * size,):
        return lambda queries: split(norm(queries))
    raise NoPlace(
        f"has a q_norm of {gain.shape} gains; expected {size}, for each head, or {heads * size}"
    )


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, shape: AnchorShape, scale: float
) -> mx.array:
    """Attention of queries to the memory's pairs, all of them.

    Args:
        queries: (B, T, heads, head size).
        keys, values: (B or 1, R, key/value heads * head size).
        scale: of the products, the anchor's own.

    Returns:
        (B, T, heads * head size), in the dtype of ``queries``.
    """
    B, T = queries.shape[:2]
    one = keys.shape[0]
    # One memory for the whole batch: nothing masks, so its sequences are one long one.
    q = queries.reshape(one, -1, shape.num_attention_heads, shape.head_dim)
    k, v = (
        pairs.astype(q.dtype).reshape(one, -1, shape.num_key_value_heads, shape.head_dim)
        for pairs in (keys, values)
    )
    out = mx.fast.scaled_dot_product_attention(
        q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), scale=scale
    )
    return out.swapaxes(1, 2).reshape(B, T, -1)


KIND = KV()
