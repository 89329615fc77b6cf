"""FFN memories: what the branch computes, with the anchor's own activation, and how it starts."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma3_text, llama
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_hiermem.kinds import ffn
from mlx_hiermem.kinds._kind import NoPlace
from mlx_hiermem.shapes import AnchorShape

WIDTH = 8


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


FFNS = {
    "swiglu": (lambda: llama.MLP(llama.ModelArgs("llama", WIDTH, 1, 12, 2, 1e-5, 9)), silu),
    "geglu": (lambda: gemma3_text.MLP(WIDTH, 12), gelu),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", FFNS)
def test_the_branch_is_a_small_ffn_with_the_anchors_activation(name, batch):
    make, activation = FFNS[name]
    x, memory = normal(2, 5, WIDTH), normal(batch, 3, 4, WIDTH, seed=1)
    m12, m3 = mx.array(memory[:, :2]).reshape(batch, -1, WIDTH), mx.array(memory[:, 2])
    before = normal(2, 5, WIDTH, seed=2)
    given = mx.array(before), mx.array(x), m12, m3
    out = ffn.with_branch(*given, ffn.activation_of(make()))
    assert out.shape == x.shape
    for row in range(2):
        m1, m2, m3 = memory[row % batch]
        expected = before[row] + (activation(x[row] @ m1.T) * (x[row] @ m2.T)) @ m3
        np.testing.assert_allclose(np.array(out[row]), expected, atol=2e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_what_the_branch_gives_has_the_dtype_of_the_anchor(dtype):
    activation = ffn.activation_of(FFNS["swiglu"][0]())
    x = mx.array(normal(2, 5, WIDTH)).astype(dtype)
    memory = mx.array(normal(1, 12, WIDTH)).astype(mx.bfloat16)
    assert ffn.with_branch(x, x, memory[:, :8], memory[:, 8:], activation).dtype == dtype


def test_the_activation_leaves_the_ffn_as_it_was():
    module = FFNS["swiglu"][0]()
    x = mx.array(normal(1, 3, WIDTH))
    before, parts = module(x), dict(module.children())
    ffn.activation_of(module)
    assert mx.array_equal(module(x), before) and dict(module.children()) == parts


class Normed(nn.Module):
    """An FFN with a norm between the activation and the last matrix, as BitNet's has."""

    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 12, bias=False)
        self.up_proj = nn.Linear(WIDTH, 12, bias=False)
        self.down_proj = nn.Linear(12, WIDTH, bias=False)
        self.sub_norm = nn.RMSNorm(12)

    def __call__(self, x):
        inner = nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.sub_norm(inner))


class Unweighted(Normed):
    def __call__(self, x):
        inner = nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(mx.fast.rms_norm(inner, None, 1e-5))


class Cumulative(Normed):
    def __call__(self, x):
        return self.down_proj(mx.cumsum(self.gate_proj(x) * self.up_proj(x), axis=-1))


class NeedsMore(Normed):
    def __call__(self, x, gates):
        return self.down_proj(self.gate_proj(x) * self.up_proj(x) * gates)


@pytest.mark.parametrize("made", [Normed, Unweighted, Cumulative, NeedsMore])
def test_an_ffn_that_mixes_its_inner_dimension_cannot_be_widened(made):
    with pytest.raises(NoPlace, match="does more between its matrices"):
        ffn.activation_of(made())


def _layer(ffn_module: nn.Module) -> nn.Module:
    layer = nn.Module()
    layer.mlp = ffn_module
    layer.norm = nn.RMSNorm(WIDTH)
    return layer


class ReGLU(Normed):
    def __call__(self, x):
        return self.down_proj(nn.relu(self.gate_proj(x)) * self.up_proj(x))


def test_an_activation_with_a_flat_half_can_be_widened():
    gate, up = mx.array(normal(2, 3, 7)), mx.array(normal(2, 3, 7, seed=1))
    assert mx.array_equal(ffn.activation_of(ReGLU())(gate, up), mx.maximum(gate, 0) * up)


def test_a_layer_without_a_place_says_what_it_has():
    shape = AnchorShape(1, WIDTH, 12, 2, 4)

    def reason(layer):
        with pytest.raises(NoPlace) as caught:
            list(ffn.KIND.forwards(layer, shape, lambda: None))
        return str(caught.value)

    assert "it has mlp (Linear), norm (RMSNorm)" in reason(_layer(nn.Linear(WIDTH, WIDTH)))
    assert "gate_proj that is a SwitchLinear" in reason(_layer(SwitchGLU(WIDTH, 12, 2)))
    two = _layer(FFNS["swiglu"][0]())
    two.other = FFNS["swiglu"][0]()
    assert "more than one FFN" in reason(two)
    wide = FFNS["swiglu"][0]()
    wide.down_proj = nn.Linear(12, 2 * WIDTH)
    assert "down_proj from 12 to 16 numbers" in reason(_layer(wide))


def test_start_values():
    rank, width = 50, 64
    shape = AnchorShape(1, width, 12, 2, 4)
    m1, m2, m3 = ffn.KIND.start(rank, shape, np.random.default_rng(0))
    assert m1.shape == m2.shape == m3.shape == (rank, width) and m1.dtype == np.float32
    assert not m3.any()
    for matrix in (m1, m2):
        assert matrix.std() == pytest.approx(2 * 0.8796 * width**-0.5, rel=0.03)
        assert np.abs(matrix).max() <= 4 * width**-0.5 * 1.0001
    assert np.abs(m1 - m2).max() > 0.1
