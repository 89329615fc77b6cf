"""``mlx_hiermem convert`` as a whole: real checkpoints in, models that load and answer out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import Starcoder2Config, Starcoder2ForCausalLM

import mlx_hiermem
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.cli import main
from mlx_hiermem.convert import huggingface_anchor
from mlx_hiermem.convert.verify import PROMPTS, WITHOUT_TOKENIZER
from tests.convert.banks import same_numbers
from tests.convert.checkpoints import (
    MATRICES,
    Written,
    make_numbers,
    save_dcp,
    write_all,
    write_foreign,
    write_per_cluster,
    write_stacked,
    write_subtrees,
)
from tests.corpus.corpora import make_tiny_bert
from tests.init.fresh import save_llama
from tests.tiny import make_tiny_model

ENCODER = json.dumps({"type": "bert", "model": "somewhere"})


def convert(where: Written, out: Path, *more: str) -> int:
    words = [*where.arguments(), "--encoder", ENCODER, "--mlx-path", str(out), *more]
    return main(["convert", *words])


def done(capsys) -> dict:
    """What ``--json`` printed, in its one line."""
    lines = capsys.readouterr().out.strip().splitlines()
    return json.loads(lines[-1])


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("everything"))


def names() -> list[str]:
    """All that ``write_all`` writes, without writing it."""
    layouts = ("stacked", "per_layer", "per_cluster", "foreign", "subtrees")
    formats = ("pt", "safetensors", "safetensors_sharded", "dcp")
    found = [f"{layout}-{format}" for format in formats for layout in layouts]
    return [*found, *MATRICES, "tied-bfloat16", "transposed", "prefix-module.",
            "prefix-_orig_mod.", "bare"]  # fmt: skip


def test_the_list_of_examples_is_whole(everything):
    assert sorted(everything) == sorted(names())


@pytest.mark.parametrize("name", names())
def test_verified(everything, name, tmp_path, capsys):
    """Every layout, format and kind, through the command, against the forward in torch."""
    assert convert(everything[name], tmp_path / "m", "--verify", "--json") == 0
    found = done(capsys)
    memories = [one["memory"] for one in found["verification"]["differences"]]
    assert memories[:2] == ["none", "generic"] and len(memories) == 6
    assert found["verification"]["agrees"] is True
    assert all(one["largest"] < 1e-4 for one in found["verification"]["differences"])
    assert found["missing"] == found["left_over"] == []
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| generic |" in card and "| path " in card
    assert str(tmp_path) not in card
    hidden = [path for path in (tmp_path / "m").rglob("*") if path.name.startswith(".")]
    assert hidden == []


def test_it_answers(tmp_path, capsys):
    """Anchor, bank, tree, encoder and tokenizer from five places make a model that answers."""
    bert = make_tiny_bert(tmp_path / "bert")
    width = json.loads((bert / "config.json").read_text())["hidden_size"]
    numbers = make_numbers(vocab=257, dtype=torch.bfloat16, width=width)
    where = write_stacked(numbers, tmp_path / "from", together=False)
    tiny = make_tiny_model(tmp_path / "tiny")
    encoder = json.dumps({"type": "bert", "model": str(bert), "max_length": 64})
    words = ["--tokenizer", str(tiny), "--encoder", encoder]
    assert main(["convert", *where.arguments(), *words, "--mlx-path", str(tmp_path / "m")]) == 0
    lm = mlx_hiermem.load(tmp_path / "m")
    same_numbers(numbers, lm.bank, "bfloat16")
    for level, expected in zip(lm.tree.centroids, numbers.tree, strict=True):
        np.testing.assert_array_equal(level, expected)
    answers = {lm.generate("hello", memory=(i, 3 * i), max_tokens=8) for i in range(3)}
    assert len(answers) > 1
    path = lm.route("What is the capital of France?").ids
    text = lm.generate("What is the capital of France?", max_tokens=8)
    assert text == lm.generate("What is the capital of France?", memory=path, max_tokens=8)


def test_an_encoder_made_of_another_anchors_embeddings(tmp_path, capsys):
    tiny = make_tiny_model(tmp_path / "tiny", branching=3, ranks=(4, 2))
    where = write_stacked(make_numbers(vocab=257), tmp_path / "from")
    words = ["--model", str(where.model), "--model-config", str(where.model_config)]
    words += ["--tree", str(tiny), "--mlx-path", str(tmp_path / "m")]
    assert main(["convert", *words]) == 2
    assert "token embeddings of another anchor" in capsys.readouterr().err
    assert not list(tmp_path.glob("*m*partial")) and not (tmp_path / "m").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(tmp_path, capsys, dtype):
    numbers = make_numbers()
    assert convert(write_stacked(numbers, tmp_path / "from"), tmp_path / "m", "--dtype", dtype) == 0
    with MemoryBank.open(tmp_path / "m" / "memory") as bank:
        same_numbers(numbers, bank, dtype)
    weights = mx.load(str(tmp_path / "m" / "model.safetensors"))
    assert {str(one.dtype) for one in weights.values()} == {f"mlx.core.{dtype}"}


@pytest.mark.parametrize("what", [None, "all", "bank", "anchor"])
def test_quantize(tmp_path, capsys, what):
    numbers = make_numbers(d=64, heads=2, head_dim=32, f=64, width=8)
    where = write_stacked(numbers, tmp_path / "from")
    words = ["--quantize", *([] if what is None else [what]), "--q-bits", "8", "--verify", "--json"]
    assert convert(where, tmp_path / "m", *words) == 0
    found = done(capsys)
    packed = {"anchor": what != "bank", "bank": what != "anchor"}
    assert (found["memory"]["quantization"] is not None) == packed["bank"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert ("quantization" in config) == packed["anchor"]
    assert found["verification"]["agrees"] is None
    # Eight bits are near; the blocks are as large as weights of the anchor.
    for one in found["verification"]["differences"]:
        assert one["mean"] < 0.1 * one["scale"]
    assert not list((tmp_path / "m").rglob(".*"))


def test_dry_run(tmp_path, capsys):
    where = write_per_cluster(make_numbers(), tmp_path / "from")
    assert convert(where, tmp_path / "m", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "memory.level2.{0..8}.layers.{0..1}.w3" in text
    assert "self_attn.{q_proj,k_proj,v_proj}.weight" in text
    assert "level 2: w3 of layer 0 to 1, cluster 0 to 8" in text
    assert "takes about" in text and "are free on the disk" in text
    assert convert(where, tmp_path / "m", "--dry-run", "--json") == 0
    found = done(capsys)
    assert not (tmp_path / "m").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["from"]
    assert found["problem"] is None
    sizes = {line["target"]: line["tensors"] for line in found["lines"]}
    assert sizes["level 2: w3 of layer 0 to 1, cluster 0 to 8"] == 18
    assert found["memory"]["bank_size"] == 2880
    assert found["seconds"] > 0
    every = sum(line["bytes"] for line in found["lines"])
    assert found["bytes_read"] == every > 20_000


def test_a_dry_run_shows_what_is_wrong(tmp_path, capsys):
    """All of the mapping, what is missing and what is left over; then the one line."""
    numbers = make_numbers()
    del numbers.anchor["layers.1.ffn_norm.weight"]
    numbers.anchor["layers.1.ffn_norm.wait"] = torch.zeros(16)
    where = write_stacked(numbers, tmp_path / "from")
    assert convert(where, tmp_path / "m", "--dry-run") == 2
    found = capsys.readouterr()
    assert "missing: layers.1.ffn_norm.weight" in found.out
    assert "left over: layers.1.ffn_norm.wait" in found.out
    assert "memory.level1.w1" in found.out
    assert found.err.count("\n") == 1 and "layers.1.ffn_norm.weight missing" in found.err


def test_overwrite(tmp_path, capsys):
    numbers, others = make_numbers(seed=0), make_numbers(seed=1)
    assert convert(write_stacked(numbers, tmp_path / "0"), tmp_path / "m") == 0
    where = write_stacked(others, tmp_path / "1")
    capsys.readouterr()
    assert convert(where, tmp_path / "m") == 2
    assert "exists already" in capsys.readouterr().err
    with MemoryBank.open(tmp_path / "m" / "memory") as bank:
        same_numbers(numbers, bank)
    assert convert(where, tmp_path / "m", "--overwrite") == 0
    with MemoryBank.open(tmp_path / "m" / "memory") as bank:
        same_numbers(others, bank)


def test_a_bank_for_an_anchor_that_mlx_has(tmp_path, capsys):
    """The anchor is copied as it is, with its tokenizer."""
    tiny = make_tiny_model(tmp_path / "tiny", branching=3, ranks=(4, 2))
    numbers = make_numbers()
    where = write_subtrees(numbers, tmp_path / "from")
    words = ["--model", str(tiny), "--bank", str(where.bank), "--tree", str(tiny)]
    assert main(["convert", *words, "--mlx-path", str(tmp_path / "m")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "m" / name).read_bytes() == (tiny / name).read_bytes()
    lm = mlx_hiermem.load(tmp_path / "m")
    assert len(lm.generate("hello", max_tokens=4)) > 0
    same_numbers(numbers, lm.bank)


def test_foreign_names_and_names_to_leave_out(tmp_path, capsys):
    numbers = make_numbers()
    numbers.anchor["ema.decay"] = torch.zeros(1)
    where = write_foreign(numbers, tmp_path / "from")
    assert convert(where, tmp_path / "m") == 2
    assert "ema.decay left over" in capsys.readouterr().err
    assert convert(where, tmp_path / "m", "--ignore", r"ema\..*", "--json") == 0
    found = done(capsys)
    assert {"ema.decay", "bank/steps"} <= set(found["ignored"])
    with MemoryBank.open(tmp_path / "m" / "memory") as bank:
        same_numbers(numbers, bank)


def test_a_bank_in_dcp_beside_its_anchor(tmp_path, capsys):
    jobs: list = []
    numbers = make_numbers(kind="lora_vo")
    where = write_stacked(numbers, tmp_path / "from", "dcp", together=False, jobs=jobs)
    save_dcp(jobs)
    assert convert(where, tmp_path / "m", "--verify") == 0
    with MemoryBank.open(tmp_path / "m" / "memory") as bank:
        same_numbers(numbers, bank)


@pytest.mark.parametrize("kind", MATRICES)
def test_a_bank_for_a_model_of_hugging_face(tmp_path, capsys, kind):
    """transformers' own forward, with the memory in hooks, is the original."""
    tiny = make_tiny_model(tmp_path / "tiny")
    llama = save_llama(tmp_path / "llama", tiny, num_key_value_heads=2)
    numbers = make_numbers(kind=kind)
    where = write_stacked(numbers, tmp_path / "from", "safetensors", together=False)
    words = ["--model", str(llama), "--bank", str(where.bank), "--tree", str(where.tree)]
    words += ["--encoder", ENCODER, "--verify", "--json", "--mlx-path"]
    assert main(["convert", *words, str(tmp_path / "m")]) == 0
    found = done(capsys)
    assert found["verification"]["agrees"] is True
    worst = max(one["largest"] / one["scale"] for one in found["verification"]["differences"])
    assert worst < 1e-4
    with MemoryBank.open(tmp_path / "m" / "memory") as bank:
        same_numbers(numbers, bank)
    assert (tmp_path / "m" / "tokenizer.json").exists()


def test_verify_with_a_tokenizer_of_other_tokens(tmp_path, capsys):
    """No prompt is made of tokens of the vocabulary alone: random ones take their place."""
    tiny = make_tiny_model(tmp_path / "tiny")
    where = write_stacked(make_numbers(vocab=64), tmp_path / "from")
    words = ["--tokenizer", str(tiny), "--verify", "--json"]
    assert convert(where, tmp_path / "m", *words) == 0
    found = done(capsys)["verification"]
    assert found["agrees"] is True
    assert {one["positions"] for one in found["differences"]} == {len(PROMPTS) * WITHOUT_TOKENIZER}


def test_verify_where_the_config_does_not_tell_the_vocabulary(tmp_path, capsys, monkeypatch):
    """It is that of the architecture, here of 49,152 tokens: the table of the tokens tells."""
    tiny = make_tiny_model(tmp_path / "tiny")
    folder = tmp_path / "from"
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Starcoder2Config(**sizes, num_hidden_layers=1, intermediate_size=16)
    Starcoder2ForCausalLM(config).save_pretrained(folder)
    for path in tiny.glob("tokenizer*"):
        shutil.copy(path, folder)
    told = json.loads((folder / "config.json").read_text())
    assert told.pop("vocab_size") == 49_152
    (folder / "config.json").write_text(json.dumps(told))
    words = ["convert", "--model", str(folder), "--json", "--mlx-path"]
    assert main([*words, str(tmp_path / "m"), "--verify"]) == 0
    assert done(capsys)["verification"]["agrees"] is True
    monkeypatch.setattr(huggingface_anchor, "_TABLES", ())
    assert main([*words, str(tmp_path / "n"), "--verify"]) == 2
    assert "no vocab_size, and no tensor has the name" in capsys.readouterr().err
    assert not list(tmp_path.glob("*n*partial")) and not (tmp_path / "n").exists()
    assert main([*words, str(tmp_path / "n")]) == 0


def test_a_model_of_hugging_face_alone(tmp_path, capsys):
    tiny = make_tiny_model(tmp_path / "tiny")
    llama = save_llama(tmp_path / "llama", tiny, hidden_size=64)
    words = ["--model", str(llama), "--verify", "--json", "--mlx-path"]
    assert main(["convert", *words, str(tmp_path / "m")]) == 0
    found = done(capsys)
    assert found["memory"] is None and found["revision"] is None
    assert [one["memory"] for one in found["verification"]["differences"]] == ["none"]
    assert main(["convert", *words, str(tmp_path / "q"), "-q", "--q-bits", "8"]) == 0
    found = done(capsys)
    assert found["verification"]["agrees"] is None
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization"]["bits"] == 8
    assert main(["convert", *words, str(tmp_path / "x"), "--rope-theta", "10000"]) == 2
    assert "is for OpenLM checkpoints" in capsys.readouterr().err
