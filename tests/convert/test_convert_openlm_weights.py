"""Which rows of an OpenLM state dict are which weights of ours, there and back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from mlx_hiermem.anchors.norms import PARAMETERS
from mlx_hiermem.anchors.openlm import Model, ModelArgs
from mlx_hiermem.convert.openlm import weights
from mlx_hiermem.convert.openlm.weights import (
    Mapped,
    is_anchor_key,
    map_anchor,
    to_openlm,
    without_prefix,
)
from mlx_hiermem.convert.sources import open_source
from mlx_hiermem.errors import FormatError
from tests.convert.openlm_states import (
    HEAD_DIM,
    HEADS,
    INNER,
    LAYERS,
    VOCAB,
    D,
    save,
    state_dict,
)

ARGS = ModelArgs(D, LAYERS, INNER, HEADS, HEAD_DIM, vocab_size=VOCAB)
WIDTH = HEADS * HEAD_DIM


def is_memory_key(name: str) -> bool:
    return "memory." in name


def mapped(
    folder: Path, state: dict[str, torch.Tensor], args: ModelArgs = ARGS
) -> tuple[Mapped, dict[str, np.ndarray]]:
    """The mapping of a state dict on disk, and the numbers that it leads to."""
    numbers = {}
    with open_source(save(folder, state)) as source:
        found = map_anchor(without_prefix(source.tensors, is_memory_key), args, is_memory_key)
        for target in found.targets:
            parts = [part.tensor.read(part.first, part.count) for part in target.parts]
            numbers[target.name] = np.concatenate(parts)
            assert numbers[target.name].shape == target.shape
        return found, numbers


def test_every_row_is_where_it_belongs(tmp_path):
    state = state_dict()
    found, numbers = mapped(tmp_path, state)
    assert found.missing == found.surplus == ()
    assert sorted(found.ignored) == [f"layers.{n}.attention.pos_embed.inv_freq" for n in (0, 1)]
    for n in range(LAYERS):
        theirs, ours = f"layers.{n}", f"model.layers.{n}"
        in_proj = state[f"{theirs}.attention.in_proj.weight"].numpy()
        w12 = state[f"{theirs}.feed_forward.w12.weight"].numpy()
        expected = {
            "self_attn.q_proj": in_proj[:WIDTH],
            "self_attn.k_proj": in_proj[WIDTH : 2 * WIDTH],
            "self_attn.v_proj": in_proj[2 * WIDTH :],
            "self_attn.o_proj": state[f"{theirs}.attention.out_proj.weight"],
            "self_attn.q_norm": state[f"{theirs}.attention.q_norm.weight"],
            "self_attn.k_norm": state[f"{theirs}.attention.k_norm.weight"],
            "mlp.gate_proj": w12[:INNER],
            "mlp.up_proj": w12[INNER:],
            "mlp.down_proj": state[f"{theirs}.feed_forward.w3.weight"],
            "input_layernorm": state[f"{theirs}.attention_norm.weight"],
            "post_attention_layernorm": state[f"{theirs}.ffn_norm.weight"],
        }
        for name, array in expected.items():
            np.testing.assert_array_equal(numbers[f"{ours}.{name}.weight"], np.asarray(array))
    for ours, theirs in (("model.norm", "norm"), ("lm_head", "output"),
                         ("model.embed_tokens", "tok_embeddings")):  # fmt: skip
        np.testing.assert_array_equal(numbers[f"{ours}.weight"], state[f"{theirs}.weight"].numpy())


@pytest.mark.parametrize("norm", PARAMETERS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"qk_norm": False, "post_embed_norm": True},
     {"head_dim": 12}],
    ids=str,
)  # fmt: skip
def test_the_targets_are_the_parameters_of_the_model(tmp_path, norm, changes):
    args = replace(ARGS, norm_type=norm, **changes)
    state = state_dict(
        norm_parts=PARAMETERS[norm], qk_norm=args.qk_norm, head_dim=args.head_dim,
        tied=args.tie_word_embeddings, post_embed_norm=args.post_embed_norm,
    )  # fmt: skip
    found, _ = mapped(tmp_path, state, args)
    assert found.missing == found.surplus == ()
    shapes = {name: array.shape for name, array in tree_flatten(Model(args).parameters())}
    assert {target.name: target.shape for target in found.targets} == shapes


@pytest.mark.parametrize("tied", [True, False])
def test_back_to_openlm_is_the_same_state_dict(tmp_path, tied):
    state = state_dict(tied=tied, post_embed_norm=True, norm_parts=("weight", "bias"))
    args = replace(
        ARGS, norm_type="lp_layer_norm", tie_word_embeddings=tied, post_embed_norm=True
    )  # fmt: skip
    _, numbers = mapped(tmp_path, state, args)
    back = {}
    for one in to_openlm(args):
        back[one.name] = np.concatenate([numbers[name] for name, _ in one.parts])
        assert back[one.name].shape == one.shape
        assert [len(numbers[name]) for name, _ in one.parts] == [rows for _, rows in one.parts]
    expected = {name: tensor for name, tensor in state.items() if "inv_freq" not in name}
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(back[name], tensor.numpy())


def test_missing_and_surplus_are_listed(tmp_path):
    state = state_dict()
    del state["layers.1.attention.in_proj.weight"], state["norm.weight"]
    state["lm_head.bias"] = torch.ones(3)
    state["layers.7.ffn_norm.weight"] = torch.ones(D)
    state["memory.level1.w1"] = torch.ones(2, 2, 2, 2)
    found, numbers = mapped(tmp_path, state)
    assert found.missing == ("layers.1.attention.in_proj.weight", "norm.weight")
    assert found.surplus == ("lm_head.bias", "layers.7.ffn_norm.weight")
    assert "model.layers.1.self_attn.q_proj.weight" not in numbers


# ---- the prefix of the wrappers --------------------------------------------------------


def test_the_prefix_of_the_wrappers(tmp_path):
    state = {**state_dict(), "layers.0.memory.level1.w1": torch.ones(2, 2, 2)}
    state = {f"model.{name}": tensor for name, tensor in state.items()}
    state["other"] = torch.ones(2)
    found, _ = mapped(tmp_path, state)
    assert found.missing == () and found.surplus == ("other",)


def test_a_prefix_that_only_some_have_stays(tmp_path):
    state = state_dict()
    state["model.norm.weight"] = state.pop("norm.weight")
    found, _ = mapped(tmp_path, state)
    assert found.missing == ("norm.weight",) and found.surplus == ("model.norm.weight",)


def test_a_prefix_whose_loss_makes_two_of_one(tmp_path):
    state = {f"model.{name}": tensor for name, tensor in state_dict().items()}
    state["memory.level1.w1"] = state["model.memory.level1.w1"] = torch.ones(2)
    with pytest.raises(FormatError, match="'memory.level1.w1' with and without the prefix"):
        mapped(tmp_path, state)


@pytest.mark.parametrize("name", state_dict(post_embed_norm=True, norm_parts=("weight", "bias")))
def test_names_of_an_anchor(name):
    assert is_anchor_key(name)
    assert not is_anchor_key(f"model.{name}") and not is_anchor_key(f"{name}.x")


@pytest.mark.parametrize(
    "name",
    ["memory.level1.w1", "layers.0.memory.level1.w1", "layers.x.ffn_norm.weight", "freqs_cis",
     "layers.0.feed_forward.w1.weight", "layers.0.attention_norm"],
)  # fmt: skip
def test_names_of_something_else(name):
    assert not is_anchor_key(name)


# ---- tied heads ------------------------------------------------------------------------

TIED = replace(ARGS, tie_word_embeddings=True)


@pytest.mark.parametrize("kept", ["tok_embeddings.weight", "output.weight", "both"])
def test_one_copy_of_a_tied_matrix_is_enough(tmp_path, kept):
    state = state_dict(tied=True)
    expected = state["output.weight"].numpy()
    for name in {"tok_embeddings.weight", "output.weight"} - {kept} if kept != "both" else ():
        del state[name]
    if kept == "both":  # two copies in the file, in place of one tensor with two names
        state["output.weight"] = state["output.weight"].clone()
    found, numbers = mapped(tmp_path, state, TIED)
    assert found.missing == ()
    assert ("output.weight" in found.ignored) == (kept == "both")
    np.testing.assert_array_equal(numbers["model.embed_tokens.weight"], expected)
    assert "lm_head.weight" not in numbers


def test_neither_copy_is_missing_both(tmp_path):
    state = {
        name: tensor
        for name, tensor in state_dict(tied=True).items()
        if name not in ("tok_embeddings.weight", "output.weight")
    }
    assert mapped(tmp_path, state, TIED)[0].missing == ("tok_embeddings.weight", "output.weight")


@pytest.mark.parametrize("row", [0, 17, VOCAB - 1])
def test_tied_matrices_that_differ(tmp_path, row, monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK", 7 * 4 * D)  # seven rows at a time
    state = state_dict(tied=True)
    state["output.weight"] = state["output.weight"].clone()
    state["output.weight"][row, 3] += 1e-6
    with pytest.raises(FormatError, match="output.weight is not tok_embeddings.weight.*tying"):
        mapped(tmp_path, state, TIED)


def test_tied_matrices_of_two_dtypes(tmp_path):
    state = state_dict(tied=True)
    state["output.weight"] = state["output.weight"].half()
    with pytest.raises(FormatError, match="is not tok_embeddings.weight"):
        mapped(tmp_path, state, TIED)


# ---- tensors that do not fit -----------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in state_dict() if "inv_freq" not in name])
def test_wrong_shapes(tmp_path, name):
    state = state_dict()
    expected = tuple(state[name].shape)
    for wrong in (state[name][:-1], state[name][None], torch.tensor(1.0)):
        state[name] = wrong.clone()
        shape = tuple(wrong.shape)
        with pytest.raises(FormatError) as caught:
            mapped(tmp_path, state)
        text = str(caught.value)
        assert f"epoch_1.pt: {name} has the shape {shape}; expected {expected}" in text
        assert "\n" not in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool], ids=str)
def test_wrong_dtypes(tmp_path, dtype):
    state = state_dict()
    state["norm.weight"] = state["norm.weight"].to(dtype)
    says = f"norm.weight is stored as {str(dtype).removeprefix('torch.')}; expected float32"
    with pytest.raises(FormatError, match=re.escape(says)):
        mapped(tmp_path, state)
