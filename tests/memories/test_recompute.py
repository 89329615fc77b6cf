"""Gradient checkpointing changes what is remembered, never what comes out."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama

from mlx_hiermem.anchors import openlm
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.memories import attach
from mlx_hiermem.memories.recompute import recompute_layers

CONFIG = MemoryConfig((3, 2), branching=2, layers=(0, 2))


def make(kind):
    mx.random.seed(0)
    if kind == "openlm":
        model = openlm.Model(openlm.ModelArgs(16, 3, 32, 2, 8, vocab_size=40))
    else:
        args = llama.ModelArgs.from_dict(
            dict(
                model_type="llama", hidden_size=16, num_hidden_layers=3, intermediate_size=32,
                num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=40, head_dim=8,
            )
        )  # fmt: skip
        model = llama.Model(args)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("kind", ["openlm", "llama"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_anchor_and_memory_are_the_same(kind, frozen):
    tokens = mx.array(np.random.default_rng(0).integers(0, 40, (2, 7)))
    memory = mx.random.normal((2, 2 * 3 * 5 * 16), key=mx.random.key(1))

    def gradients(model):
        if frozen:
            model.anchor.freeze()
        weights = tree_map(mx.array, model.anchor.trainable_parameters())

        def loss(weights, memory):
            model.anchor.update(weights)
            return model(tokens, memory=memory).square().mean()

        value, found = mx.value_and_grad(loss, argnums=(0, 1))(weights, model.matrices(memory))
        return value.item(), dict(tree_flatten(found))

    plain = gradients(attach(make(kind), CONFIG))
    model = attach(make(kind), CONFIG)
    recompute_layers(model)
    again = gradients(model)
    assert plain[0] == again[0] and plain[1].keys() == again[1].keys()
    assert len(plain[1]) > 6 or frozen
    for name, gradient in plain[1].items():
        assert mx.abs(gradient).max().item() > 0
        np.testing.assert_allclose(
            np.array(gradient), np.array(again[1][name]), rtol=1e-5, atol=1e-8
        )
