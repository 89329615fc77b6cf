"""The paper's anchor: OpenLM's decoder as an mlx-lm model.

What is notable about it:
- gain-only LayerNorm (a LayerNorm, not an RMSNorm; no bias), pre-norm residuals; OpenLM's other
  norms are in norms.py
- QK-norm over the whole heads x head_dim vector, before the split into heads and the rotary
  embedding
- head_dim is a field of its own: the 160M anchor's attention is 384 wide, its residuals 512
- half-split rotary embedding with base 100,000 (others in rotary.py), SwiGLU, no biases, tied or
  separate head

Names follow mlx-lm's models (``embed_tokens``, ``self_attn``, ``mlp.gate_proj``), so quantisation,
adapters and caches of mlx-lm apply. OpenLM's own names are the converter's business.
Sources: section 3 and appendix A of the paper; model.py and norms.py of mlfoundations/open_lm.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention

from .openlm_args import PRESETS, ModelArgs
from .rotary import make_rotary

__all__ = ["PRESETS", "Model", "ModelArgs", "init_weights"]


class Attention(nn.Module):
    """Causal self-attention with QK-norm; every head has its own keys and values."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads = args.num_attention_heads
        self.scale = args.head_dim**-0.5
        width = args.num_attention_heads * args.head_dim
        self.q_proj = nn.Linear(args.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(args.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(args.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, args.hidden_size, bias=False)
        if args.qk_norm:
            self.q_norm, self.k_norm = args.norm(width), args.norm(width)
        self.rope = make_rotary(
            args.positional_embedding_type,
            args.head_dim,
            args.rope_theta,
            rounded=args.rope_inv_freq_dtype == "bfloat16",
        )

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        B, T, _ = x.shape
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)

        # (B, T, heads * head_dim) -> (B, heads, T, head_dim)
        queries = queries.reshape(B, T, self.n_heads, -1).transpose(0, 2, 1, 3)
        keys = keys.reshape(B, T, self.n_heads, -1).transpose(0, 2, 1, 3)
        values = values.reshape(B, T, self.n_heads, -1).transpose(0, 2, 1, 3)
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)

        output = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: W3 (silu(W1 x) * W2 x), with W1 = gate, W2 = up, W3 = down."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer: attention and FFN, each behind its norm and added to the residual stream."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        self.input_layernorm = args.norm(args.hidden_size)
        self.post_attention_layernorm = args.norm(args.hidden_size)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class OpenLM(nn.Module):
    """Embedding, layers and the last norm: tokens (B, T) -> hidden states (B, T, d)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        if args.post_embed_norm:
            self.post_embed_norm = args.norm(args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = args.norm(args.hidden_size)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        mask: mx.array | None = None,
    ) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if "post_embed_norm" in self:
            h = self.post_embed_norm(h)
        if cache is None:
            cache = [None] * len(self.layers)
        if mask is None:
            mask = create_attention_mask(h, cache[0])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h = layer(h, mask, cache=layer_cache)
        return self.norm(h)


class Model(nn.Module):
    """An OpenLM anchor under mlx-lm's model contract.

    Args of a call:
        inputs: tokens (B, T), int32.
        cache: prompt cache, one entry per layer, or None.
        input_embeddings: (B, T, d) in place of the embedded tokens.
        mask: boolean (B, 1, T, T) or (T, T), True where a query may look; the default is causal.
            Training passes the document mask here.

    Returns:
        Logits (B, T, vocabulary).
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = OpenLM(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        mask: mx.array | None = None,
    ) -> mx.array:
        out = self.model(inputs, cache, input_embeddings, mask)
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(out)
        return self.lm_head(out)

    @property
    def layers(self) -> list[Block]:
        return self.model.layers


def init_weights(model: Model) -> None:
    """Start values for training from scratch, in place, from MLX's global random state.

    Truncated normal (cut at 2 sigma) throughout: embeddings and head 1/sqrt(d), projections
    1/sqrt(fan-in), and the two projections that write to the residual stream divided by
    sqrt(2 (n + 1)) for layer n, as in OpenLM's model.py.
    """

    def truncated(weight: mx.array, std: float) -> mx.array:
        return mx.random.truncated_normal(-2.0, 2.0, weight.shape, weight.dtype) * std

    d = model.args.hidden_size
    embedding = model.model.embed_tokens
    embedding.weight = truncated(embedding.weight, d**-0.5)
    if not model.args.tie_word_embeddings:
        model.lm_head.weight = truncated(model.lm_head.weight, d**-0.5)
    for n, layer in enumerate(model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            mlp.gate_proj,
            mlp.up_proj,
        ):
            linear.weight = truncated(linear.weight, linear.weight.shape[1] ** -0.5)
        for linear in (attention.o_proj, mlp.down_proj):
            std = linear.weight.shape[1] ** -0.5 / (2 * (n + 1)) ** 0.5
            linear.weight = truncated(linear.weight, std)
