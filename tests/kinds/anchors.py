"""Tiny anchors that differ in what matters to memories, with random weights."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import gemma3_text, llama, olmo2, qwen3

from mlx_hiermem.anchors import openlm

D, LAYERS, VOCAB = 32, 3, 40


def _openlm() -> nn.Module:  # query norm over all heads; heads narrower than the residuals
    return openlm.Model(openlm.ModelArgs(D, LAYERS, 48, 2, 8, vocab_size=VOCAB))


def _llama() -> nn.Module:  # keys and values shared by two heads
    return llama.Model(llama.ModelArgs("llama", D, LAYERS, 48, 4, 1e-5, VOCAB, None, None, 2))


def _qwen3() -> nn.Module:  # query norm over each head, before heads and time change places
    return qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3", hidden_size=D, num_hidden_layers=LAYERS, intermediate_size=48,
            num_attention_heads=4, rms_norm_eps=1e-5, vocab_size=VOCAB, num_key_value_heads=2,
            max_position_embeddings=64, rope_theta=1e4, head_dim=16, tie_word_embeddings=True,
        )
    )  # fmt: skip


def _gemma3() -> nn.Module:  # GeGLU, local and global attention, norms behind the parts as well
    return gemma3_text.Model(
        gemma3_text.ModelArgs(
            model_type="gemma3_text", hidden_size=D, num_hidden_layers=LAYERS,
            intermediate_size=48, num_attention_heads=4, head_dim=8, vocab_size=VOCAB,
            num_key_value_heads=1, query_pre_attn_scalar=11, sliding_window=4,
            sliding_window_pattern=2,
        )
    )  # fmt: skip


def _olmo2() -> nn.Module:  # norms behind attention and FFN only
    return olmo2.Model(
        olmo2.ModelArgs(
            model_type="olmo2", hidden_size=D, num_hidden_layers=LAYERS, intermediate_size=48,
            num_attention_heads=4, rms_norm_eps=1e-5, vocab_size=VOCAB,
        )
    )  # fmt: skip


ANCHORS = {
    "openlm": _openlm,
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "olmo2": _olmo2,
}


def make(name: str) -> nn.Module:
    """An anchor whose numbers are all random, the gains of its norms as well."""
    mx.random.seed(0)
    model = ANCHORS[name]()

    def vary(weight: mx.array) -> mx.array:
        return weight + 0.2 * mx.random.normal(weight.shape) if weight.ndim == 1 else weight

    model.update(tree_map(vary, model.parameters()))
    mx.eval(model.parameters())
    return model
