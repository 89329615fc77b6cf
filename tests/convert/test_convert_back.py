"""``convert --to torch``: layout 1 in safetensors, which PyTorch loads, and which comes back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.manifest import read_manifest
from mlx_hiermem.bank.remove import remove
from mlx_hiermem.cli import main
from mlx_hiermem.convert.bank import to_torch as to_torch_module
from tests.convert.checkpoints import MATRICES, make_numbers, write_stacked
from tests.tiny import make_tiny_model

ENCODER = json.dumps({"type": "bert", "model": "somewhere"})
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def back(model: Path, out: Path, *more: str) -> int:
    return main(
        ["convert", "--to", "torch", "--model", str(model), "--torch-path", str(out), *more]
    )


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for name in sorted(set(index.values())):
        with safe_open(folder / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        found |= load_file(folder / name)
    assert set(found) == set(index)
    return found


@pytest.fixture
def converted(tmp_path):
    def make(**options):
        numbers = make_numbers(**options)
        where = write_stacked(numbers, tmp_path / "from")
        words = [*where.arguments(), "--encoder", ENCODER, "--mlx-path", str(tmp_path / "m")]
        assert main(["convert", *words]) == 0
        return numbers, where, tmp_path / "m"

    return make


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_state_dict_is_what_it_was(converted, tmp_path, kind, tied):
    numbers, where, model = converted(
        kind=kind, tied=tied, n_layers=3, layers=(0, 2), head_dim=6, ranks=(4, 0, 2),
        norm="default_layer_norm", post_embed_norm=True,
    )  # fmt: skip
    assert back(model, tmp_path / "back") == 0
    found = state_of(tmp_path / "back")
    expected = torch.load(where.model, weights_only=True)["state_dict"]
    gone = {name for name in expected if "inv_freq" in name}
    gone |= {"output.weight"} if tied else set()
    assert set(found) == set(expected) - gone
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype
    described = json.loads((tmp_path / "back" / "memory_config.json").read_text())
    assert described["kind"] == kind and described["ranks"] == [4, 0, 2]
    assert described["layers"] == [0, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_bit_equal(converted, tmp_path, dtype, monkeypatch):
    """MLX -> torch -> MLX: every file that holds numbers, to the byte; chunks of any size."""
    monkeypatch.setattr(to_torch_module, "CHUNK_BYTES", 3000)
    _, _, model = converted(
        dtype=DTYPES[dtype], branching=4, ranks=(3, 2, 1), rotary="llama_rotary"
    )
    assert back(model, tmp_path / "back") == 0
    words = ["--model", str(tmp_path / "back"), "--mlx-path", str(tmp_path / "again")]
    words += ["--tree", str(tmp_path / "back" / "tree.safetensors")]
    assert main(["convert", *words]) == 0
    ours, theirs = (read_manifest(one / "memory").files for one in (model, tmp_path / "again"))
    assert set(ours) == set(theirs)
    assert {name for name in ours if ours[name] != theirs[name]} <= {"config.json"}
    old, new = (
        json.loads((one / "memory" / "config.json").read_text())
        for one in (model, tmp_path / "again")
    )
    assert {key for key in old if old[key] != new[key]} <= {"base_anchor"}  # its name
    assert old["base_anchor"]["shape"] == new["base_anchor"]["shape"]
    for name in ("model.safetensors", "config.json"):
        assert (model / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_every_bit_pattern_survives(converted, tmp_path):
    """Also subnormal numbers and minus zero, in bfloat16."""
    numbers = make_numbers(dtype=torch.bfloat16)
    bits = np.random.default_rng(0).integers(0, 1 << 16, numbers.blocks[2]["w1"].shape, np.uint16)
    bits[(bits & 0x7F80) == 0x7F80] = 0x8000  # NaN and infinite ones are refused
    numbers.blocks[2]["w1"].copy_(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16))
    where = write_stacked(numbers, tmp_path / "here")
    words = [*where.arguments(), "--encoder", ENCODER, "--mlx-path", str(tmp_path / "m")]
    assert main(["convert", *words]) == 0
    assert back(tmp_path / "m", tmp_path / "back") == 0
    found = state_of(tmp_path / "back")["memory.level2.w1"]
    np.testing.assert_array_equal(found.view(torch.int16).numpy().view(np.uint16), bits)


def test_the_tokenizer_comes_along(tmp_path, capsys):
    tiny = make_tiny_model(tmp_path / "tiny")
    assert back(tiny, tmp_path / "back", "--json") == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["anchor"] and found["bank"]
    assert found["bytes"] == sum(one.nbytes for one in state_of(tmp_path / "back").values())
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert back(tiny, tmp_path / "back") == 2
    assert back(tiny, tmp_path / "back", "--overwrite") == 0


def test_only_the_bank_of_another_anchor(tmp_path, capsys):
    from mlx_hiermem.making import make_model
    from tests.init.fresh import save_llama

    tiny = make_tiny_model(tmp_path / "tiny")
    save_llama(tmp_path / "llama", tiny)
    make_model(tmp_path / "llama", tmp_path / "m", (4, 2), branching=3)
    assert back(tmp_path / "m", tmp_path / "back") == 0
    assert all(name.startswith("memory.") for name in state_of(tmp_path / "back"))
    assert back(tmp_path / "llama", tmp_path / "none") == 2
    assert "neither an OpenLM anchor nor a memory bank" in capsys.readouterr().err


def test_quantised_ones_are_refused(tmp_path, capsys):
    numbers = make_numbers(d=64, head_dim=32, f=64)
    where = write_stacked(numbers, tmp_path / "from")
    for what, words in (("bank", "made from"), ("anchor", "the anchor is quantised")):
        arguments = [*where.arguments(), "--encoder", ENCODER, "-q", what]
        assert main(["convert", *arguments, "--mlx-path", str(tmp_path / what)]) == 0
        capsys.readouterr()
        assert back(tmp_path / what, tmp_path / "back") == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
        assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))


def test_blocked_blocks_are_refused_and_removed_ones_are_zeros(tmp_path, capsys):
    tiny = make_tiny_model(tmp_path / "tiny", branching=3, ranks=(4, 2))
    remove(tiny / "memory", [(2, 4)])
    with BankEdit(tiny / "memory") as edit:
        edit.set_blocked([(1, 2), (2, 7)])
    assert back(tiny, tmp_path / "back") == 2
    captured = capsys.readouterr()
    assert "has blocked blocks (1:2, 2:7)" in captured.err and captured.err.count("\n") == 1
    assert "bank unblock" in captured.err and captured.out == ""
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))
    with BankEdit(tiny / "memory") as edit:
        edit.set_blocked([])
    assert back(tiny, tmp_path / "back") == 0
    found = {n: t for n, t in state_of(tmp_path / "back").items() if n.startswith("memory.level2.")}
    assert found and not any(tensor[4].any() for tensor in found.values())
    assert all(tensor[7].any() for tensor in found.values())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--to", "torch"], "takes --torch-path"),
        (["--to", "jax", "--torch-path", "x"], "expected torch"),
        (["--to", "torch", "--torch-path", "x", "--mlx-path", "y"], "takes --torch-path"),
        (["--torch-path", "x", "--mlx-path", "y"], "goes with --to torch"),
        ([], "--mlx-path is missing"),
        (["--mlx-path", "y", "--dtype", "int8"], "--dtype 'int8'"),
        (["--mlx-path", "y", "--quantize", "tree"], "--quantize 'tree'"),
        (["--mlx-path", "y", "--q-bits", "4"], "go with --quantize"),
        (["--mlx-path", "y", "--encoder", "minilm"], "--encoder 'minilm'"),
        (["--mlx-path", "y", "--encoder", '{"type": "gpt"}'], "--encoder"),
    ],
)
def test_options(arguments, words, capsys):
    assert main(["convert", "--model", "atlas", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_model_whose_encoder_is_its_embeddings(tmp_path, capsys):
    """The encoder's file and entry come along: it routes as before."""
    import mlx_hiermem

    tiny = make_tiny_model(tmp_path / "tiny", branching=3, ranks=(4, 2))
    assert back(tiny, tmp_path / "back") == 0
    words = ["--model", str(tmp_path / "back"), "--mlx-path", str(tmp_path / "again")]
    words += ["--tree", str(tmp_path / "back" / "tree.safetensors"), "--verify"]
    assert main(["convert", *words]) == 0
    old, new = mlx_hiermem.load(tiny), mlx_hiermem.load(tmp_path / "again")
    for text in ("one text", "another", "the atomic number of gold is"):
        assert old.route(text) == new.route(text)
        assert old.generate(text, max_tokens=6) == new.generate(text, max_tokens=6)
    (tmp_path / "back" / "encoder.safetensors").unlink()
    assert main(["convert", *words[:3], str(tmp_path / "none"), *words[4:]]) == 2
    assert "does not lie beside the tree" in capsys.readouterr().err
