"""Tiny models of mlx-lm's architectures, with random numbers throughout.

``GATED`` are those whose layers all have an FFN with gate, up and down, ``OTHERS`` those without.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

#: Widths that a quantised matrix takes: multiples of 32.
D, INNER, LAYERS, VOCAB, WINDOW = 32, 64, 3, 40, 4

#: What most architectures are told; each takes the keys that it knows.
BASE: dict[str, Any] = dict(
    hidden_size=D, intermediate_size=INNER, num_hidden_layers=LAYERS, vocab_size=VOCAB,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    rms_norm_eps=1e-5, layer_norm_eps=1e-5, layer_norm_epsilon=1e-5, norm_eps=1e-5,
    rope_theta=1e4, rope_scaling=None, attention_bias=False, mlp_bias=False,
    tie_word_embeddings=True, hidden_act="silu", sliding_window=WINDOW,
)  # fmt: skip
#: Local and global attention in turns.
TURNS = ["sliding_attention", "full_attention", "sliding_attention"]
ROPE = {"rope_theta": 1e4, "rope_type": "default"}
GRANITE = dict(
    attention_multiplier=0.3, embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.5
)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_conv_kernel_dim=3,
)  # fmt: skip
MAMBA = dict(mamba_d_conv=3, mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1)

GATED: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_5": {**LINEAR, "full_attention_interval": 2, "rope_parameters": None},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {
        "query_pre_attn_scalar": 11, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {"query_pre_attn_scalar": 11, "sliding_window_pattern": 2},
    "gemma4_text": {
        "layer_types": TURNS, "global_head_dim": 16, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB,
    },
    "olmo2": {},
    "olmo3": {"layer_types": TURNS},
    "olmo_hybrid": {**LINEAR, "linear_allow_neg_eigval": False},
    "ministral3": {
        "layer_types": TURNS,
        "rope_parameters": {
            **ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4
        },
    },
    "granite": GRANITE,
    "granitemoehybrid": {**GRANITE, "layer_types": ["attention"] * LAYERS},
    "smollm3": {"no_rope_layer_interval": 2},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.5, "sliding_window_pattern": 2},
    "exaone4": {"sliding_window_pattern": "LGL"},
    "helium": {},
    "seed_oss": {"attention_out_bias": True},
    "hunyuan_v1_dense": {},
    "ernie4_5": {"use_bias": True},
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 3},
    "minicpm3": {
        "dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 3, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "rope_scaling": {
            "type": "longrope", "original_max_position_embeddings": 64, "long_factor": 1.0,
            "short_factor": 1.0,
        },
    },
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "qk_layernorm": True},
    "internlm3": {"qkv_bias": True},
    "mimo": {"num_nextn_predict_layers": 1},
    "nanbeige": {"num_loops": 2},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": 4},
    "telechat3": {},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 1.0},
    "gear": {"layer_types": TURNS},
    "muse_glimmer": {"layer_types": TURNS},
    "spark2_5": {
        "layer_types": TURNS, "rope_parameters": {name: ROPE for name in TURNS},
        "hidden_act": "gelu",
    },
    "plamo": {"n_shared_head": 2},
    "recurrent_gemma": {
        "conv1d_width": 3, "logits_soft_cap": 30.0, "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention", "recurrent"],
    },
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0,
        "expert_layer_period": 1, "mamba_d_conv": 3, "mamba_d_state": 8, "mamba_expand": 2,
        "num_experts": 1, "num_experts_per_tok": 1,
    },
    # These keep their arguments as ``config``.
    "youtu_llm": {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "baichuan_m1": {
        "sliding_window_layers": [0, 2], "conv_window": 2, "tie_word_embeddings": False
    },
}  # fmt: skip
#: Models that see or hear as well: the language model's sizes are under ``text_config``.
NESTED = {
    "gemma3": "gemma3_text",
    "mistral3": "llama",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
}
#: What the FFN is called in a layer where it is not ``mlp``.
FFN = {"falcon_h1": "feed_forward", "jamba": "feed_forward", "recurrent_gemma": "mlp_block"}
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_local_experts=4,
    shared_expert_intermediate_size=16, decoder_sparse_step=1, mlp_only_layers=[],
    norm_topk_prob=True,
)  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "phi3": {},
    "glm": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "starcoder2": {},
    "nemotron": {"hidden_act": "relu2"},
    "apertus": {"post_norm": False, "qk_norm": True},
    "internlm2": {"bias": False},
    "lfm2": {
        "conv_bias": False, "conv_L_cache": 3, "block_dim": D, "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "granitemoe": {**GRANITE, **EXPERTS},
    "gpt_oss": {**EXPERTS, "layer_types": TURNS},
    # Its first layer is dense.
    "deepseek": {
        "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    },
    "gpt2": {"n_ctx": 64, "n_embd": D, "n_head": 4, "n_layer": LAYERS, "n_positions": 64},
    "mamba": {
        "state_size": 8, "conv_kernel": 3, "use_bias": False, "use_conv_bias": True,
        "time_step_rank": 4,
    },
}  # fmt: skip


def make(name: str, **changes: Any) -> nn.Module:
    """A model of an architecture; every number is random, gains and biases too."""
    module = import_module(f"mlx_lm.models.{name}")
    inner = NESTED.get(name, name)
    own = GATED[inner] if inner in GATED else OTHERS[inner]
    config = {**BASE, **own, **changes, "model_type": inner}
    if name in NESTED:
        config = {"model_type": name, "text_config": config, "vocab_size": VOCAB}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))

    def vary(array: mx.array) -> mx.array:
        # What starts as zeros may be gains, and then hides all behind it.
        return array + (0.1 if mx.any(array) else 0.5) * mx.random.normal(array.shape)

    model.update(tree_map(vary, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()
