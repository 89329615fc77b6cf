"""Every norm, rotary embedding and kind of memory of OpenLM, three ways.

The independent reference (``openlm_reference``, float64), the converter's own one, which reads the
checkpoint (``convert/reference``), and the MLX model that the converter's mapping writes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx_lm.models.cache import make_prompt_cache

from mlx_hiermem.anchors import compute_dtype, load_anchor
from mlx_hiermem.anchors.norms import PARAMETERS
from mlx_hiermem.anchors.openlm import Model, ModelArgs, init_weights
from mlx_hiermem.anchors.rotary import make_rotary
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.convert.anchor_writer import write_anchor
from mlx_hiermem.convert.openlm.config import read_openlm_config
from mlx_hiermem.convert.openlm.weights import map_anchor, openlm_config
from mlx_hiermem.convert.reference.openlm import OpenLMReference
from mlx_hiermem.convert.sources import open_source
from mlx_hiermem.errors import ConfigError
from mlx_hiermem.memories import attach
from tests.parity import openlm_reference
from tests.parity.torch_memory import random_blocks

D, LAYERS, HEADS, HEAD_DIM, INNER, VOCAB = 24, 2, 3, 6, 40, 40
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 9)
BASE = {
    "hidden_dim": D, "n_layers": LAYERS, "n_heads": HEADS, "seq_len": 64, "vocab_size": VOCAB,
    "post_embed_norm": False, "weight_tying": False, "model_norm": "gain_only_layer_norm",
    "qk_norm": True, "positional_embedding_type": "rotary", "norm_eps": 1e-5,
    "head_dim": HEAD_DIM, "rope_theta": 1000.0, "bf16_frequencies": False,
}  # fmt: skip


def state_dict(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under OpenLM's names: no gain is 1, no bias 0, eps counts."""
    random = torch.Generator().manual_seed(seed)
    width = config["n_heads"] * config["head_dim"]
    found: dict[str, torch.Tensor] = {}

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        found[f"{name}.weight"] = (
            torch.randn(rows, columns, generator=random) * scale * columns**-0.5
        )

    def norm(name: str, size: int, scale: float = 1.0) -> None:
        parts = PARAMETERS[config["model_norm"]]
        if "weight" in parts:
            found[f"{name}.weight"] = scale * (0.5 + torch.rand(size, generator=random))
        if "bias" in parts:
            found[f"{name}.bias"] = 0.3 * torch.randn(size, generator=random)

    matrix("tok_embeddings", VOCAB, D, 0.02 if config["model_norm"] != "no_wb_layer_norm" else 1)
    if config["post_embed_norm"]:
        norm("post_embed_norm", D)
    for n in range(config["n_layers"]):
        norm(f"layers.{n}.attention_norm", D)
        matrix(f"layers.{n}.attention.in_proj", 3 * width, D, 2)
        matrix(f"layers.{n}.attention.out_proj", D, width)
        if config["qk_norm"]:
            norm(f"layers.{n}.attention.q_norm", width)
            norm(f"layers.{n}.attention.k_norm", width)
        norm(f"layers.{n}.ffn_norm", D)
        matrix(f"layers.{n}.feed_forward.w12", 2 * INNER, D)
        matrix(f"layers.{n}.feed_forward.w3", D, INNER)
    norm("norm", D, 30 if config["weight_tying"] else 1)
    if config["weight_tying"]:
        found["output.weight"] = found["tok_embeddings.weight"]
    else:
        matrix("output", VOCAB, D)
    return found


class Three:
    """A checkpoint on disk, and the three that compute from it."""

    def __init__(self, folder: Path, kind: str | None = None, **changes) -> None:
        self.config = {**BASE, **changes}
        self.state, self.kind = state_dict(self.config), kind
        path = folder / "epoch_1.pt"
        torch.save({"epoch": 1, "state_dict": self.state}, path)
        written = {key: value for key, value in self.config.items() if key != "bf16_frequencies"}
        (folder / "model_config.json").write_text(json.dumps(written))
        with open_source(path) as source:
            read = read_openlm_config(
                path, source.tensors, rope_bf16=self.config["bf16_frequencies"]
            )
            self.args = read.args
            mapped = map_anchor(source.tensors, self.args)
            assert not mapped.missing and not mapped.surplus
            out = folder / "mlx"
            out.mkdir()
            write_anchor(out, mapped.targets, asdict(self.args))
            self.theirs = OpenLMReference(source.tensors, self.args, kind)
        self.model, _ = load_anchor(out)

    def compare(self, tokens: np.ndarray = TOKENS, seed: int | None = None) -> np.ndarray:
        """All three agree; returns the logits of the independent one."""
        joined, options, model = None, {}, self.model
        if seed is not None:
            model = attach(self.model, MemoryConfig((3, 2), kind=self.kind, branching=2))
            blocks, joined = random_blocks(model, seed)
            options = {"memory": model.join(blocks)}
        expected = openlm_reference.logits(
            self.state, self.config, tokens.tolist(), self.kind, joined
        ).numpy()
        assert 0.3 < expected.std() < 20  # so that 1e-4 says something
        given = None if joined is None else {n: [m.numpy() for m in ms] for n, ms in joined.items()}
        close(self.theirs.logits(tokens, given), expected)
        close(np.array(model(mx.array(tokens)[None], **options))[0], expected)
        return expected


def close(found: np.ndarray, expected: np.ndarray, atol: float = 1e-4) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk", "no qk"])
@pytest.mark.parametrize("norm", PARAMETERS)
def test_norms(tmp_path, norm, qk_norm):
    Three(tmp_path, model_norm=norm, qk_norm=qk_norm).compare()


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_tying": True},
        {"post_embed_norm": True},
        {"post_embed_norm": True, "model_norm": "default_layer_norm", "weight_tying": True},
        {"post_embed_norm": True, "model_norm": "no_wb_layer_norm"},
        {"positional_embedding_type": "llama_rotary", "model_norm": "rms_norm", "qk_norm": False},
        {"positional_embedding_type": "none"},
        {"head_dim": 8},  # d / heads
        {"norm_eps": 1e-2},
        {"rope_theta": 100_000.0},
        {"bf16_frequencies": True},
    ],
    ids=str,
)
def test_everything_else(tmp_path, changes):
    expected = Three(tmp_path, **changes).compare()
    if not {"weight_tying", "bf16_frequencies"} & set(changes):  # those may well be close
        (tmp_path / "plain").mkdir()
        plain = Three(tmp_path / "plain").compare()
        assert np.abs(expected - plain).max() > 1e-3


@pytest.mark.parametrize("changes", [
    {}, {"model_norm": "no_wb_layer_norm"}, {"model_norm": "rms_norm"},
    {"model_norm": "default_layer_norm", "qk_norm": False, "weight_tying": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["ffn", "lora_qk", "lora_vo", "lora_ffn", "kv"])
def test_memories(tmp_path, kind, changes):
    three = Three(tmp_path, kind, **changes)
    with_memory, without = three.compare(seed=3), three.compare()
    assert np.abs(with_memory - without).max() > 0.05


# ---- rounded frequencies ---------------------------------------------------------------


def rotated(kind: str, rounded: bool, position: int) -> tuple[np.ndarray, np.ndarray]:
    """A head of 64 numbers at a position: ours, and the formula's."""
    vector = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    rope = make_rotary(kind, 64, 10_000.0, rounded)
    ours = rope(mx.array(vector)[None, None, None], offset=position)
    config = {
        "positional_embedding_type": kind, "rope_theta": 10_000.0, "bf16_frequencies": rounded
    }  # fmt: skip
    theirs = openlm_reference.turned(torch.from_numpy(vector).double(), position, config)
    return np.array(ours).reshape(-1), theirs.numpy()


@pytest.mark.parametrize("kind", ["rotary", "llama_rotary"])
@pytest.mark.parametrize("rounded", [True, False])
def test_frequencies_far_into_a_context(kind, rounded):
    ours, theirs = rotated(kind, rounded, 2047)
    close(ours, theirs, 1e-3)
    assert np.abs(ours - rotated(kind, not rounded, 2047)[1]).max() > 0.5


def test_the_phase_error_is_what_the_documentation_says():
    exact = 10_000.0 ** -(np.arange(0, 64, 2) / 64)
    rounded = torch.from_numpy(exact).float().bfloat16().double().numpy()
    assert 0.8 < np.abs(2047 * (exact - rounded)).max() < 1.0


@pytest.mark.parametrize("rounded", [True, False], ids=["bf16", "float32"])
def test_logits_far_into_a_context(tmp_path, rounded):
    """One layer, so that only the last token's attention counts; both references, both switches."""
    length = 2000
    tokens = np.random.default_rng(5).integers(0, VOCAB, length)
    three = Three(tmp_path, n_layers=1, bf16_frequencies=rounded, rope_theta=10_000.0)
    expected = three.theirs.logits(tokens)[-1]
    found = np.array(three.model(mx.array(tokens)[None]))[0, -1]
    close(found, expected, 2e-4)
    (tmp_path / "other").mkdir()
    other = Three(tmp_path / "other", n_layers=1, bf16_frequencies=not rounded, rope_theta=10_000.0)
    assert np.abs(other.theirs.logits(tokens)[-1] - expected).max() > 5e-3


# ---- as a model of mlx-lm --------------------------------------------------------------

KINDS = [
    {"norm_type": "no_wb_layer_norm", "positional_embedding_type": "none"},
    {"norm_type": "default_layer_norm", "post_embed_norm": True},
    {"norm_type": "rms_norm", "positional_embedding_type": "llama_rotary"},
    {"rope_inv_freq_dtype": "bfloat16"},
    {"rope_inv_freq_dtype": "bfloat16", "positional_embedding_type": "llama_rotary"},
]


def tiny(**kinds) -> Model:
    model = Model(ModelArgs(64, 2, 96, 2, 32, vocab_size=61, **kinds))
    mx.random.seed(0)
    init_weights(model)
    return model


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_decoding_in_pieces_and_in_a_batch_of_different_lengths(kinds):
    from mlx_lm.models.cache import BatchKVCache

    model = tiny(**kinds)
    tokens = mx.random.randint(0, 61, (2, 9))
    whole = model(tokens)
    cache = make_prompt_cache(model)
    pieces = [model(tokens[:, :4], cache=cache)]
    pieces += [model(tokens[:, t : t + 1], cache=cache) for t in range(4, 9)]
    close(np.array(mx.concatenate(pieces, axis=1)), np.array(whole), 1e-5)
    # The second row is three tokens shorter: offsets are an array.
    padded = mx.concatenate([tokens[1:, :0], mx.zeros((1, 3), mx.int32), tokens[1:, :6]], axis=1)
    rows = mx.concatenate([tokens[:1], padded])
    caches = [BatchKVCache([0, 3]) for _ in model.layers]
    pieces = [model(rows[:, :5], cache=caches), model(rows[:, 5:], cache=caches)]
    found = mx.concatenate(pieces, axis=1)
    close(np.array(found[0]), np.array(whole[0]), 1e-5)
    close(np.array(found[1, 3:]), np.array(model(tokens[1:, :6])[0]), 1e-5)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_quantised_and_in_bfloat16(kinds):
    model = tiny(**kinds)
    tokens = mx.random.randint(0, 61, (1, 7))
    expected = model(tokens)
    model.set_dtype(mx.bfloat16)
    assert compute_dtype(model) == mx.bfloat16
    assert model(tokens).dtype == mx.bfloat16
    assert mx.abs(model(tokens) - expected).max() < 0.1
    model.set_dtype(mx.float32)
    nn.quantize(model, 32, 8)
    assert compute_dtype(model) == mx.float32
    assert mx.abs(model(tokens) - expected).max() < 0.1


def test_norms_without_numbers_in_a_quantisation_without_floating_scales():
    model = tiny(norm_type="no_wb_layer_norm")
    nn.quantize(model, 32, 4, mode="mxfp4")
    found = model.model(mx.array([[1, 2, 3]]))
    assert compute_dtype(model) == found.dtype


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ({"positional_embedding_type": "head_rotary"}, "head_rotary.*along the heads.*1b_old"),
        ({"positional_embedding_type": "alibi"}, "'alibi'; known are rotary, llama_rotary, none"),
        ({"norm_type": "batch_norm"}, "'batch_norm'; known are gain_only_layer_norm"),
        ({"norm_type": ["x"]}, r"\['x'\]; known are"),
        ({"rope_inv_freq_dtype": "float16"}, "'float16'; known are float32, bfloat16"),
    ],
    ids=str,
)
def test_unknown_kinds_are_refused(tmp_path, kinds, says):
    with pytest.raises(ConfigError, match=says):
        ModelArgs(64, 2, 96, 2, 32, **kinds)
    config = {**asdict(ModelArgs(64, 2, 96, 2, 32)), **kinds}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"config.json: .*{says}"):
        load_anchor(tmp_path)


def test_the_config_written_back_is_read_the_same(tmp_path):
    three = Three(tmp_path, post_embed_norm=True, model_norm="rms_norm", bf16_frequencies=True)
    (tmp_path / "model_config.json").write_text(json.dumps(openlm_config(three.args)))
    with open_source(tmp_path / "epoch_1.pt") as source:
        assert read_openlm_config(tmp_path / "epoch_1.pt", source.tensors).args == three.args
