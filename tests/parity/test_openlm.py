"""The OpenLM anchor against a plain torch forward, written here from the formulas.

Section 3 and appendix A of the paper: gain-only LayerNorm, QK-norm over the whole heads x head_dim
vector before the split into heads, half-split rotary embedding, SwiGLU, pre-norm residuals. An FFN
memory widens W1, W2 and W3 by M1, M2 and M3 (section 2).
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch import Tensor

from mlx_hiermem.anchors.openlm import Model, ModelArgs
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.memories import attach

D, LAYERS, INNER, HEADS, HEAD_DIM, VOCAB = 24, 3, 40, 3, 6, 50
WIDTH = HEADS * HEAD_DIM  # of the attention: neither D nor D // HEADS * HEADS

TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, 11))


def random_weights(tied: bool, qk_norm: bool = True) -> dict[str, np.ndarray]:
    """Weights under the model's names: no gain is 1, and embeddings so small that eps counts."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(0, scale * columns**-0.5, (rows, columns)).astype(np.float32)

    def gain(width: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.uniform(0.5, 1.5, width)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCAB, D, 0.02), "model.norm.weight": gain(D)}
    if tied:  # logits of a size at which an error of 1e-4 is small
        weights["model.norm.weight"] = gain(D, 50)
    else:
        weights["lm_head.weight"] = matrix(VOCAB, D)
    for layer in range(LAYERS):
        one = {
            "input_layernorm": gain(D),
            "post_attention_layernorm": gain(D),
            "self_attn.q_proj": matrix(WIDTH, D, 2),
            "self_attn.k_proj": matrix(WIDTH, D, 2),
            "self_attn.v_proj": matrix(WIDTH, D),
            "self_attn.o_proj": matrix(D, WIDTH),
            "mlp.gate_proj": matrix(INNER, D),
            "mlp.up_proj": matrix(INNER, D),
            "mlp.down_proj": matrix(D, INNER),
        }
        if qk_norm:
            one |= {"self_attn.q_norm": gain(WIDTH), "self_attn.k_norm": gain(WIDTH)}
        weights |= {f"model.layers.{layer}.{name}.weight": array for name, array in one.items()}
    return weights


def random_memory(layers: int, rank: int, seed: int) -> np.ndarray:
    """A joined memory (L, 3, R, d) whose effect is as large as that of the anchor's FFN."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, D**-0.5, (layers, 3, rank, D)).astype(np.float32)


# ---- the reference ---------------------------------------------------------------------


def layer_norm(x: Tensor, gain: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return gain * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, base: float = 100_000.0) -> Tensor:
    """(B, T, heads, head_dim): number i of the first half is paired with i of the second."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1])[:, None] * frequency  # (T, head_dim / 2)
    cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


def reference(
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    memory: np.ndarray | None = None,
    memory_layers: tuple[int, ...] = tuple(range(LAYERS)),
) -> np.ndarray:
    """Logits (B, T, V), float32."""
    w = {name: torch.from_numpy(array) for name, array in weights.items()}
    x = w["model.embed_tokens.weight"][torch.from_numpy(tokens)]
    B, T, _ = x.shape
    for n in range(LAYERS):
        one = {
            name.removeprefix(f"model.layers.{n}.").removesuffix(".weight"): array
            for name, array in w.items()
            if name.startswith(f"model.layers.{n}.")
        }
        h = layer_norm(x, one["input_layernorm"])
        q, k, v = (h @ one[f"self_attn.{name}_proj"].T for name in "qkv")
        if "self_attn.q_norm" in one:
            q = layer_norm(q, one["self_attn.q_norm"])
            k = layer_norm(k, one["self_attn.k_norm"])
        q, k, v = (array.reshape(B, T, HEADS, HEAD_DIM) for array in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q), rotate(k)) * HEAD_DIM**-0.5
        scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(B, T, WIDTH)
        x = x + out @ one["self_attn.o_proj"].T

        w1, w2, w3 = (one[f"mlp.{name}_proj"] for name in ("gate", "up", "down"))
        if memory is not None and n in memory_layers:
            m1, m2, m3 = torch.from_numpy(memory[memory_layers.index(n)])
            w1, w2, w3 = torch.cat([w1, m1]), torch.cat([w2, m2]), torch.cat([w3, m3.T], 1)
        h = layer_norm(x, one["post_attention_layernorm"])
        gate = h @ w1.T
        x = x + (gate * torch.sigmoid(gate) * (h @ w2.T)) @ w3.T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return (layer_norm(x, w["model.norm.weight"]) @ head.T).numpy()


# ---- ours ------------------------------------------------------------------------------


def anchor(weights: dict[str, np.ndarray]) -> Model:
    model = Model(
        ModelArgs(
            D,
            LAYERS,
            INNER,
            HEADS,
            HEAD_DIM,
            vocab_size=VOCAB,
            tie_word_embeddings="lm_head.weight" not in weights,
            qk_norm="model.layers.0.self_attn.q_norm.weight" in weights,
        )
    )
    model.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    return model


def assert_close(ours: mx.array, expected: np.ndarray) -> None:
    assert ours.dtype == mx.float32
    assert 0.5 < expected.std() < 20  # so that 1e-4 says something
    np.testing.assert_allclose(np.array(ours), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_logits(tied, qk_norm):
    weights = random_weights(tied, qk_norm)
    assert_close(anchor(weights)(mx.array(TOKENS)), reference(weights, TOKENS))


@pytest.mark.parametrize("tied", [True, False])
def test_cached_decode_equals_prefill(tied):
    """A prefill of five tokens, then one by one, against the reference's single pass."""
    from mlx_lm.models.cache import make_prompt_cache

    weights = random_weights(tied)
    model = anchor(weights)
    cache = make_prompt_cache(model)
    tokens = mx.array(TOKENS)
    pieces = [model(tokens[:, :5], cache=cache)]
    pieces += [model(tokens[:, t : t + 1], cache=cache) for t in range(5, tokens.shape[1])]
    assert_close(mx.concatenate(pieces, axis=1), reference(weights, TOKENS))


@pytest.mark.parametrize("layers", [None, (0, 2)], ids=["all layers", "some layers"])
def test_ffn_memory_is_wider_matrices(layers):
    weights = random_weights(True)
    model = attach(anchor(weights), MemoryConfig(ranks=(5, 2), branching=2, layers=layers))
    at = tuple(range(LAYERS)) if layers is None else layers
    memory = random_memory(len(at), 7, seed=2)
    expected = reference(weights, TOKENS, memory, at)
    assert np.abs(expected - reference(weights, TOKENS)).max() > 0.5
    assert_close(model(mx.array(TOKENS), memory=mx.array(memory).reshape(1, -1)), expected)


def test_each_sequence_has_its_own_memory_with_a_cache():
    weights = random_weights(False)
    model = attach(anchor(weights), MemoryConfig(ranks=(4,), branching=2))
    memories = [random_memory(LAYERS, 4, seed) for seed in (3, 4)]
    expected = np.concatenate(
        [reference(weights, TOKENS[i : i + 1], memory) for i, memory in enumerate(memories)]
    )
    cache = model.make_cache(mx.array(np.stack(memories)).reshape(2, -1))
    tokens = mx.array(TOKENS)
    pieces = [model(tokens[:, :6], cache=cache)]
    pieces += [model(tokens[:, t : t + 1], cache=cache) for t in range(6, tokens.shape[1])]
    assert_close(mx.concatenate(pieces, axis=1), expected)
