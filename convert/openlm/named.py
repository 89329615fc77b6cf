"""Sizes of the models that OpenLM knows by name (its folder model_configs, read in 2026).

Every one of them has a vocabulary of 50,432 tokens, contexts of 2,048, a head of its own and no
norm behind the embedding, unless it says otherwise here.
"""

from __future__ import annotations

from typing import Any

# hidden_dim, n_layers, n_heads
_SIZES = {
    "ant_neox": (768, 12, 12),
    "aphid_neox": (488, 12, 12),
    "atom_neox": (192, 12, 12),
    "g3b_neox": (2560, 32, 32),
    "l7b_neox": (4096, 32, 32),
    "llama2_7b": (4096, 32, 32),
    "m1b_neox": (2048, 24, 16),
    "m1b_tiktoken": (2048, 24, 16),
    "marmot_neox": (1536, 24, 16),
    "open_lm_11m": (96, 12, 12),
    "open_lm_11m_v2": (96, 8, 4),
    "open_lm_154m_v2": (576, 24, 8),
    "open_lm_160m": (768, 12, 12),
    "open_lm_1b": (2048, 24, 16),
    "open_lm_1b_old": (2048, 24, 16),
    "open_lm_25m": (192, 12, 12),
    "open_lm_3b": (2560, 32, 32),
    "open_lm_410m": (1024, 24, 16),
    "open_lm_411m_v2": (1024, 24, 8),
    "open_lm_41m": (288, 12, 12),
    "open_lm_79m_v2": (512, 8, 4),
    "open_lm_7b": (4096, 32, 32),
    "open_lm_830m": (1536, 24, 16),
    "open_lm_87m": (488, 12, 12),
    "open_lm_test_tiny": (16, 2, 2),
    "potato_neox": (1024, 24, 16),
    "quark_neox": (96, 12, 12),
}
_OTHERWISE: dict[str, dict[str, Any]] = {
    "llama2_7b": {
        "seq_len": 4096, "vocab_size": 32000, "positional_embedding_type": "llama_rotary",
        "model_norm": "rms_norm", "ffn_type": "swiglu",
    },
    "m1b_tiktoken": {"vocab_size": 50304},
    "open_lm_1b_old": {
        "qk_norm": False, "ffn_type": "swiglu", "model_norm": "default_layer_norm",
        "positional_embedding_type": "head_rotary",
    },
    "open_lm_test_tiny": {"seq_len": 16, "vocab_size": 16},
}  # fmt: skip


def named(name: str) -> dict[str, Any] | None:
    """What OpenLM's model_config of this name says; None: it has none."""
    if name not in _SIZES:
        return None
    sizes = dict(zip(("hidden_dim", "n_layers", "n_heads"), _SIZES[name], strict=True))
    common = {"seq_len": 2048, "vocab_size": 50432, "post_embed_norm": False, "weight_tying": False}
    return {**sizes, **common, **_OTHERWISE.get(name, {})}
