"""Anchors that an FFN memory cannot be attached to: refused with the layer and the reason."""

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.gemma3n import MLP as Gemma3nMLP

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import ConfigError
from mlx_hiermem.memories import attach
from tests.anchors.tiny import INNER, OTHERS, VOCAB, D, make

CONFIG = MemoryConfig((4, 2), branching=2)
NO_FFN = "has no FFN with gate_proj, up_proj, down_proj; it has "
#: For each architecture: what the reason says.
REASONS = {
    # gate and up in one matrix
    "phi3": rf"layer 0 {NO_FFN}.*mlp \(gate_up_proj, down_proj\)",
    "glm": rf"layer 0 {NO_FFN}.*mlp \(gate_up_proj, down_proj\)",
    "glm4": rf"layer 0 {NO_FFN}.*mlp \(gate_up_proj, down_proj\)",
    # no gate
    "starcoder2": rf"layer 0 {NO_FFN}.*mlp \(c_fc, c_proj\)",
    "nemotron": rf"layer 0 {NO_FFN}.*mlp \(down_proj, up_proj\)",
    "apertus": f"layer 0 {NO_FFN}.*mlp",
    # gate, up and down under other names
    "internlm2": f"layer 0 {NO_FFN}.*feed_forward",
    "lfm2": f"layer 0 {NO_FFN}.*feed_forward",
    # experts
    "mixtral": f"layer 0 {NO_FFN}.*block_sparse_moe",
    "qwen2_moe": rf"layer 0 {NO_FFN}.*mlp \(.*switch_mlp",
    "qwen3_moe": f"layer 0 {NO_FFN}.*mlp",
    "olmoe": f"layer 0 {NO_FFN}.*mlp",
    "granitemoe": f"layer 0 {NO_FFN}.*block_sparse_moe",
    "gpt_oss": f"layer 0 {NO_FFN}.*mlp",
    "deepseek": f"layer 1 {NO_FFN}.*mlp",
    # sizes that a memory's size depends on are not there
    "gpt2": "the anchor's config: num_hidden_layers is None",
    "mamba": "the anchor's config: num_attention_heads is None",
}


def refusal(anchor: nn.Module, config: MemoryConfig = CONFIG) -> str:
    tokens = mx.arange(9)[None] % VOCAB
    bare = anchor(tokens)
    classes = [type(module) for module in anchor.modules()]
    with pytest.raises(ConfigError) as caught:
        attach(anchor, config)
    assert [type(module) for module in anchor.modules()] == classes
    assert mx.array_equal(anchor(tokens), bare)
    return str(caught.value)


@pytest.mark.parametrize("name", REASONS)
def test_architectures_without_a_gated_ffn(name):
    assert REASONS.keys() == OTHERS.keys()
    text = refusal(make(name))
    layer, reason = re.fullmatch(r"(layer \d )?(.*)", REASONS[name]).groups()
    where = rf"{layer}of the anchor \(mlx_lm\.models\.{name}\) " if layer else ""
    assert re.match(where + reason, text) and "\n" not in text
    if layer:
        assert "ffn memories cannot be attached there: choose another kind, or layers" in text


class Normed(nn.Module):
    """BitNet's FFN (whose own class needs Metal): a norm between activation and down_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, INNER, bias=False)
        self.up_proj = nn.Linear(D, INNER, bias=False)
        self.ffn_sub_norm = nn.RMSNorm(INNER)
        self.down_proj = nn.Linear(INNER, D, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        inner = nn.relu2(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.ffn_sub_norm(inner))


class PreNormed(Normed):
    """Lille's FFN has its norm inside: rows of a memory would see what is before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.norm(x)
        return self.down_proj(nn.silu(self.gate_proj(h)) * self.up_proj(h))


class Softmax(Normed):
    """Gate mixes, up does not."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(mx.softmax(self.gate_proj(x), axis=-1) * self.up_proj(x))


def sparse() -> nn.Module:
    """Gemma 3n's, which keeps the largest of its inner units: one unit more moves the others."""

    class Sizes:
        hidden_size = D
        intermediate_size = [INNER]
        activation_sparsity_pattern = [0.95]

    return Gemma3nMLP(Sizes, 0)


@pytest.mark.parametrize("made", [Normed, PreNormed, Softmax, sparse])
def test_an_ffn_that_cannot_be_widened(made):
    anchor = make("llama")
    anchor.layers[2].mlp = made()
    text = refusal(anchor)
    assert "layer 2 of the anchor (mlx_lm.models.llama) has an FFN" in text
    assert "does more between its matrices" in text and "cannot be widened" in text
    assert "\n" not in text
    attach(anchor, MemoryConfig((4, 2), branching=2, layers=(0, 1)))


class Packed(nn.Module):
    """A matrix that is stored in a way of its own, as BitNet's are."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.zeros((*x.shape[:-1], INNER))


def test_a_matrix_that_is_no_linear_layer():
    anchor = make("llama")
    anchor.layers[1].mlp.up_proj = Packed()
    assert "layer 1 of the anchor (mlx_lm.models.llama) has a up_proj that is a Packed" in refusal(
        anchor
    )


def test_two_ffns_in_a_layer():
    anchor = make("llama")
    anchor.layers[0].shared_mlp = make("llama").layers[0].mlp
    assert "layer 0 of the anchor (mlx_lm.models.llama) has more than one FFN" in refusal(anchor)
