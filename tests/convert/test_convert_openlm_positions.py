"""The base of an OpenLM checkpoint's rotary embedding, and whether it was rounded."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from mlx_hiermem.convert.openlm.base import base_of
from mlx_hiermem.errors import FormatError, InputError
from tests.convert.openlm_reading import PARAMS, read, refused, without
from tests.convert.openlm_states import CONFIG, LAYERS, save, state_dict, write


@pytest.mark.parametrize("key", ["rope_theta", "rotary_base", "rope_base"])
def test_the_base_from_a_config(tmp_path, key):
    config = {**CONFIG, key: 100000}
    path = save(tmp_path, state_dict(base=None), model_config__json=config)
    assert read(path).args.rope_theta == 100_000.0
    assert read(path, rope_theta=5e5).args.rope_theta == 5e5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [10_000.0, 100_000.0, 500_000.0, 1e6, 20_000.0, 3e5])
def test_the_base_from_the_buffer(tmp_path, base, dtype):
    state = state_dict(base=base, buffer_dtype=dtype)
    found = read(save(tmp_path, state, model_config__json=CONFIG))
    assert found.args.rope_theta == base and found.notices == ()


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("base", [10_000.0, 100_000.0, 123_000.0, 500_000.0, 1e6])
def test_the_base_of_torchs_own_frequencies(size, base):
    inv_freq = (1.0 / (base ** (torch.arange(0, size, 2).float() / size))).numpy()
    assert base_of(inv_freq, "float32").value == base
    assert base_of(inv_freq * np.float32(1.001), "float32") is None
    if base in (10_000.0, 100_000.0):  # the candidates are told apart in bfloat16 too
        rounded = torch.from_numpy(inv_freq).bfloat16().float().numpy()
        assert base_of(rounded, "bfloat16").value == base
        assert base_of(rounded, "float32").rounded


def test_the_smallest_numbers_of_float16():
    inv_freq = (1e6 ** -(torch.arange(0, 64, 2) / 64)).half().float().numpy()
    assert inv_freq[-1] < 2**-14
    assert base_of(inv_freq, "float16").value == 1e6


def test_the_base_of_nobody(tmp_path):
    path = save(tmp_path, state_dict(base=None), model_config__json=CONFIG)
    found = read(path)
    assert found.args.rope_theta == 10_000.0
    assert len(found.notices) == 1
    assert "10,000 is taken" in found.notices[0] and "--rope-theta 100000" in found.notices[0]
    assert read(path, rope_theta=100_000.0).notices == ()


def test_a_buffer_that_contradicts_the_config(tmp_path):
    path = save(
        tmp_path, state_dict(base=10_000.0), model_config__json={**CONFIG, "rope_theta": 100000}
    )
    refused(path, "model_config.json: rope_theta is 100000; but the freq.*those of 10,000; give")
    found = read(path, rope_theta=100_000.0)
    assert found.args.rope_theta == 100_000.0
    assert "although the frequencies" in found.notices[0]


@pytest.mark.parametrize("wrong", ["another", "nan", "zeros", "one layer"])
def test_a_buffer_that_is_none(tmp_path, wrong):
    state = state_dict()
    name = "layers.1.attention.pos_embed.inv_freq"
    numbers = {"another": state[name] * 0.9, "nan": state[name] * np.nan,
               "zeros": state[name] * 0, "one layer": state[name] * 0.9}[wrong]  # fmt: skip
    for n in (1,) if wrong == "one layer" else (0, 1):
        state[f"layers.{n}.attention.pos_embed.inv_freq"] = numbers
    path = save(tmp_path, state, model_config__json=CONFIG)
    if wrong == "one layer":
        refused(path, "layers.1.*expected the same frequencies in all", FormatError)
    else:
        refused(path, r"layers.0.attention.pos_embed.inv_freq: its freq.* one base.*--rope-theta")


def test_a_buffer_of_another_head(tmp_path):
    state = state_dict()
    for n in range(LAYERS):
        state[f"layers.{n}.attention.pos_embed.inv_freq"] = torch.ones(3)
    path = save(tmp_path, state, model_config__json=CONFIG)
    refused(path, r"has the shape \(3,\); expected \(4,\)")


@pytest.mark.parametrize("theta", [0.5, float("nan"), float("inf"), "10000", True])
def test_a_base_that_is_none(tmp_path, theta):
    path = save(tmp_path, state_dict(base=None), model_config__json=CONFIG)
    refused(path, "--rope-theta", InputError, rope_theta=theta)
    if theta == theta and theta not in (float("inf"),):
        write(tmp_path / "model_config.json", {**CONFIG, "rope_theta": theta})
        refused(path, "model_config.json: rope_theta is")


@pytest.mark.parametrize(
    ("params", "rounds"),
    [
        ({"precision": "amp_bfloat16", "qk_norm": False}, True),
        ({"precision": "amp_bf16", "qk_norm": False}, True),
        ({"precision": "amp_bfloat16"}, False),  # QK-norm gives float32 under autocast
        ({"precision": "amp_bfloat16", "model_norm": "gain_only_lp_layer_norm"}, True),
        ({"precision": "bf16"}, True),
        ({"precision": "fp32", "qk_norm": False}, False),
        ({"precision": "amp_bfloat16", "fsdp_amp": True}, True),  # the buffer itself is rounded
    ],
    ids=str,
)
def test_who_rounded_the_frequencies(tmp_path, params, rounds):
    values = {**PARAMS, **without(CONFIG, "qk_norm", "model_norm"), **params}
    path = save(tmp_path, state_dict(qk_norm=values["qk_norm"]), params__txt=values)
    found = read(path)
    assert found.args.rope_inv_freq_dtype == "float32"
    assert [bool(re.search("rounded.*params.txt.*--rope-bf16", one)) for one in found.notices] == (
        [True] if rounds else []
    )
    asked = read(path, rope_bf16=True)
    assert asked.args.rope_inv_freq_dtype == "bfloat16" and asked.notices == ()


def test_a_buffer_that_was_rounded(tmp_path):
    state = {
        name: tensor.bfloat16().float() if "inv_freq" in name else tensor
        for name, tensor in state_dict(base=100_000.0).items()
    }
    found = read(save(tmp_path, state, model_config__json=CONFIG))
    assert found.args.rope_theta == 100_000.0
    assert "numbers of bfloat16" in found.notices[0]


@pytest.mark.parametrize("kind", ["llama_rotary", "none"])
def test_rounding_is_of_rotary_only(tmp_path, kind):
    config = {**CONFIG, "positional_embedding_type": kind}
    path = save(tmp_path, state_dict(), params__txt={**PARAMS, "precision": "bf16", **config})
    assert read(path, rope_theta=10_000.0).args.positional_embedding_type == kind
    assert not any("rounded" in notice for notice in read(path).notices)
    refused(path, f"--rope-bf16.*{kind}", InputError, rope_bf16=True)
