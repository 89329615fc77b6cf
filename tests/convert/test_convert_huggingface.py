"""Hugging Face models through mlx-lm: the same logits as transformers, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model, load_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    StableLmConfig,
)

from mlx_hiermem.anchors import load_anchor
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.convert.huggingface import convert_huggingface
from mlx_hiermem.convert.reference.huggingface import HuggingFaceReference
from mlx_hiermem.errors import ConfigError, FormatError, HierMemError, InputError
from mlx_hiermem.memories import attach
from tests.parity.torch_memory import random_blocks, with_memory
from tests.tiny import make_tiny_model

VOCAB = 300
TOKENS = np.random.default_rng(0).integers(3, VOCAB, 20)
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    # A base and a scaling that stand in rope_parameters only.
    "llama": LlamaConfig(
        **SIZES, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 3000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=32, sliding_window=8, query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {"rope_type": "default", "rope_theta": 7000.0},
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer, one token per byte."""
    model = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    folder = tmp_path_factory.mktemp("tokenizer")
    for path in model.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def save(folder: Path, config: PretrainedConfig, tokenizer: Path | None) -> torch.nn.Module:
    """A random model of transformers whose gains are no ones, saved by itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.12))
    model.save_pretrained(folder)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory, tokenizer) -> tuple[torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp("hf")
    return save(folder, CONFIGS[request.param], tokenizer), folder


@pytest.fixture
def llama(tmp_path, tokenizer) -> Path:
    folder = tmp_path / "llama"
    save(folder, CONFIGS["llama"], tokenizer)
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None], use_cache=False).logits[0].numpy()


def close(found: mx.array | np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-4)


def refused(says: str, kind: type, *args, **options) -> str:
    with pytest.raises(HierMemError, match=says) as caught:
        convert_huggingface(*args, **options)
    text = str(caught.value)
    assert type(caught.value) is kind and "\n" not in text and len(text) < 700
    return text


# ---- what comes out --------------------------------------------------------------------


def test_logits_are_those_of_transformers(pair, out, capsys):
    steps: list[int] = []
    names = convert_huggingface(pair[1], out, progress=steps.append)
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert sum(steps) == sum((out / name).stat().st_size for name in names)
    assert capsys.readouterr().out == ""
    close(load_anchor(out)[0](mx.array(TOKENS)[None])[0], logits(pair[0]))
    # mlx-lm alone reads it too: the keys of transformers 5 also stand in its own words.
    close(load_model(out)[0](mx.array(TOKENS)[None])[0], logits(pair[0]))
    assert load_tokenizer(out).encode("abc") == load_tokenizer(pair[1]).encode("abc")


def test_weights_are_kept_to_the_bit(llama, out):
    """Whatever a config of an earlier transformers says: torch_dtype is not the weights' dtype."""
    path = llama / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch_dtype": "float16"}))
    convert_huggingface(llama, out)
    old = mx.load(str(llama / "model.safetensors"))
    new = mx.load(str(out / "model.safetensors"))
    assert new and all(mx.array_equal(array, old[name]) for name, array in new.items())
    assert {array.dtype for array in new.values()} == {mx.float32}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(llama, out, dtype):
    convert_huggingface(llama, out, dtype=dtype)
    arrays = mx.load(str(out / "model.safetensors")).values()
    assert {str(array.dtype) for array in arrays} == {f"mlx.core.{dtype}"}


def test_quantize(llama, out):
    convert_huggingface(llama, out, quantize=True, q_bits=8, q_group_size=32)
    model, config = load_anchor(out)
    assert config["quantization"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    reference = HuggingFaceReference(llama)
    far = np.abs(np.array(model(mx.array(TOKENS)[None])[0]) - reference.logits(TOKENS)).max()
    assert 1e-4 < far < 0.5
    again = out.parent / "again"
    again.mkdir()
    refused("quantised already", InputError, out, again, quantize=True)


def test_an_mlx_model_is_copied(llama, out):
    convert_huggingface(llama, out, dtype="bfloat16")
    again = out.parent / "again"
    again.mkdir()
    (out / "README.md").write_text("of another memory")
    names = convert_huggingface(out, again)
    assert "README.md" not in names and {"config.json", "model.safetensors"} <= set(names)
    for name in names:
        assert (again / name).read_bytes() == (out / name).read_bytes()
    other = out.parent / "other"
    other.mkdir()
    convert_huggingface(out, other, dtype="float32")
    arrays = mx.load(str(other / "model.safetensors")).values()
    assert {array.dtype for array in arrays} == {mx.float32}


def test_a_tokenizer_from_elsewhere(tmp_path, out, tokenizer):
    save(tmp_path / "hf", CONFIGS["llama"], None)
    refused("has no tokenizer.*--tokenizer", InputError, tmp_path / "hf", out)
    refused("no tokenizer in it", InputError, tmp_path / "hf", out, tokenizer=tmp_path)
    assert list(out.iterdir()) == []
    convert_huggingface(tmp_path / "hf", out, tokenizer=tokenizer)
    assert load_tokenizer(out).encode("abc") == load_tokenizer(tokenizer).encode("abc")


def test_code_is_neither_run_nor_copied(llama, out):
    (llama / "modeling_llama.py").write_text("raise SystemExit('run')")
    (llama / "notes.md").write_text("x")
    path = llama / "config.json"
    values = {**json.loads(path.read_text()), "auto_map": {"AutoConfig": "modeling_llama.X"}}
    path.write_text(json.dumps(values))
    names = convert_huggingface(llama, out)
    assert not [name for name in names if name.endswith((".py", ".md"))]
    path.write_text(json.dumps({**values, "model_file": "modeling_llama.py"}))
    again = out.parent / "again"
    again.mkdir()
    refused("model_file|custom module", FormatError, llama, again)
    assert list(again.iterdir()) == []


# ---- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float64"}, "--dtype 'float64': known are float32"),
        ({"quantize": True, "q_bits": 7}, "--q-bits 7: affine has 2, 3, 4, 5, 6, 8"),
        ({"quantize": True, "q_group_size": 5}, "--q-group-size 5: affine has 32, 64, 128"),
        ({"quantize": True, "q_mode": "int4"}, "--q-mode 'int4': known are affine"),
    ],
    ids=str,
)
def test_options_out_of_range(llama, out, options, says):
    refused(says, InputError, llama, out, **options)


def rewrite(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_folders(llama, out, tmp_path):
    refused("no such folder", ConfigError, tmp_path / "none", out)
    weights = llama / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[: len(raw) // 2])
    refused("model.safetensors", FormatError, llama, out)
    weights.rename(llama / "pytorch_model.bin")
    refused("no model.*safetensors; pickled weights", FormatError, llama, out)
    weights.write_bytes(raw)
    rewrite(llama, model_type="unheard_of")
    refused("unheard_of not supported", FormatError, llama, out)
    rewrite(llama, model_type=None)
    refused("config.json: model_type is None", FormatError, llama, out)
    rewrite(llama, model_type="llama", rope_parameters=[1])
    refused("rope_parameters is", ConfigError, llama, out)
    rewrite(llama, model_type="llama", rope_parameters=None, hidden_size=65)
    refused("mlx-lm cannot convert it", FormatError, llama, out)
    (llama / "config.json").write_text("{")
    refused("config.json: not valid JSON", FormatError, llama, out)
    (llama / "config.json").unlink()
    refused("no config.json", FormatError, llama, out)
    assert list(out.iterdir()) == []


def test_missing_and_surplus_weights(llama, out):
    weights = mx.load(str(llama / "model.safetensors"))
    mx.eval(weights)  # before the file is another one
    first = next(iter(weights))
    path = str(llama / "model.safetensors")
    mx.save_safetensors(path, {k: v for k, v in weights.items() if k != first}, {"format": "pt"})
    refused("mlx-lm cannot convert it.*[Mm]issing", FormatError, llama, out)
    mx.save_safetensors(path, {**weights, "model.other": mx.ones(2)}, {"format": "pt"})
    refused("mlx-lm cannot convert it.*other", FormatError, llama, out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(llama, out, number):
    weights = mx.load(str(llama / "model.safetensors"))
    mx.eval(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][90, 3] = number
    for form in ("pt", "mlx"):  # copied ones are looked at too
        mx.save_safetensors(str(llama / "model.safetensors"), weights, {"format": form})
        refused(f"{name} has numbers that are not finite", FormatError, llama, out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_links_that_lead_out(llama, out, tmp_path, name):
    os.rename(llama / name, tmp_path / name)
    (llama / name).symlink_to(tmp_path / name)
    if name == "model.safetensors":  # refused before it is read
        (tmp_path / name).write_bytes(b"secret")
    refused("outside of the folder", FormatError, llama, out)
    assert list(out.iterdir()) == []


# ---- transformers as the reference of --verify -----------------------------------------

MORE = {
    "olmo2": Olmo2Config(**SIZES),  # query norm over all heads together
    "stablelm": StableLmConfig(**SIZES, qk_layernorm=True),  # one for each head
}


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_memories_in_transformers(tmp_path, name):
    """Against weights that hold the memory themselves, and against MLX."""
    original = save(tmp_path, {**CONFIGS, **MORE}[name], None)
    for kind in ("ffn", "lora_qk", "lora_vo", "lora_ffn", "kv"):
        reference = HuggingFaceReference(tmp_path, kind)
        model = attach(load_anchor(tmp_path)[0], MemoryConfig((5, 3), kind=kind, branching=2))
        blocks, joined = random_blocks(model, seed=1)
        given = {layer: [one.numpy() for one in matrices] for layer, matrices in joined.items()}
        expected = logits(with_memory(original, kind, joined))
        found = reference.logits(TOKENS, given)
        close(found, expected)
        assert found.dtype == np.float32 and found.shape == (len(TOKENS), VOCAB)
        memory = model.join(blocks)
        close(model(mx.array(TOKENS)[None], memory=memory)[0], found)
        # Nothing of it stays behind.
        close(reference.logits(TOKENS), logits(original))
        assert np.abs(expected - logits(original)).max() > 0.05


def test_a_layer_without_a_place(tmp_path):
    save(tmp_path, Phi3Config(**SIZES), None)  # one matrix for queries, keys and values
    reference = HuggingFaceReference(tmp_path, "kv")
    with pytest.raises(ConfigError, match="no part with q_proj.*without --verify"):
        reference.logits(TOKENS, {0: [np.ones((2, 32), np.float32)] * 2})


def test_an_original_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ConfigError, match="transformers cannot load the original") as caught:
        HuggingFaceReference(tmp_path)
    assert "\n" not in str(caught.value)
