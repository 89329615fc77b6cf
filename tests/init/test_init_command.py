"""``init``: a folder that loads, a bank of every kind without effect, and one with a tree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mlx_hiermem
from mlx_hiermem import MemoryConfig, cli, making
from mlx_hiermem.bank.manifest import read_manifest
from mlx_hiermem.config import KINDS
from mlx_hiermem.making import make_model
from tests.init.fresh import SMALL, disk_bytes, init, logits, save_llama, zeros

# ---- what is made ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["anchor", "llama"])
def test_a_folder_that_loads_and_answers_as_the_anchor(place, tmp_path, capsys, name):
    out = tmp_path / "out"
    assert init(place / name, out, *SMALL, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    for path in (place / name).iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    lm = mlx_hiermem.load(out)
    assert lm.tree is None and lm.encoder is None
    config = lm.bank.config
    assert (config.kind, config.ranks, config.branching) == ("ffn", (4, 2), 3)
    assert (config.layers, config.dtype, config.quantization) == (None, "bfloat16", None)
    assert config.base_anchor["name"] == name
    base = logits(lm, "none")
    assert base.any()
    for memory in ("generic", (1, 5)):
        np.testing.assert_array_equal(logits(lm, memory), base)
    assert told == {
        "model": str(out), "kind": "ffn", "ranks": [4, 2], "branching": 3, "levels": 2,
        "layers": [0, 1], "dtype": "bfloat16", "base_anchor": dict(config.base_anchor),
        "fetch_size": config.fetch_size(), "bank_size": config.bank_size(),
        "bank_bytes": sum((out / "memory" / shard).stat().st_size for shard in zeros(out)),
        "disk_bytes": disk_bytes(out), "sparse": True, "tree": False,
        "revision": lm.bank.inspect()["revision"],
    }  # fmt: skip
    assert cli.main(["bank", "verify", "--model", str(out)]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_has_an_effect(place, tmp_path, kind):
    made = make_model(place / "llama", tmp_path / "out", (3, 0, 2), kind=kind, layers="late")
    assert (made.config.layers, made.config.branching) == ((1,), 16)
    lm = mlx_hiermem.load(tmp_path / "out")
    assert lm.bank.config == made.config and lm.bank.config.kind == kind
    base = logits(lm, "none")
    for memory in ("generic", (1, 20, 333)):
        np.testing.assert_array_equal(logits(lm, memory), base)


def test_the_text_says_sizes_and_what_to_do(place, tmp_path, capsys):
    out = tmp_path / "my model"
    assert init(place / "llama", out, *SMALL, "--layers", "0", "--kind", "kv") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    text = captured.out
    assert "kv memories 4,2 on 1 of 2 layers, branching 3, without effect; revision " in text
    assert "96 numbers in a fetched memory, 480 in the bank: " in text
    assert " of bfloat16, in sparse files, which take 20 kB of the disk" in text
    assert f"cluster --model '{out}' --branching 3 --levels 2 --data" in text
    assert f"train --model '{out}' --data CORPUS" in text


def test_a_model_s_bank_is_left_behind(place, tmp_path):
    made = make_model(place / "model", tmp_path / "out", (1, 1), fresh_memory=True)
    assert not made.has_tree and made.config.ranks == (1, 1)
    assert not (tmp_path / "out" / "memory" / "tree.safetensors").exists()
    assert init("atlas", tmp_path / "atlas", "--config", "1", "--fresh-memory") == 0
    config = MemoryConfig.load(tmp_path / "atlas" / "memory" / "config.json")
    assert config.base_anchor["name"] == "atlas" and config.ranks == (1,)
    assert not (tmp_path / "atlas" / "README.md").exists()


def test_a_model_of_the_hub(place, tmp_path, monkeypatch):
    """Its bank is not downloaded; its commit is kept."""
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = shutil.copytree(place / "llama", tmp_path / commit)
    asked = []

    def find_model(*given):
        asked.append(given)
        return folder

    monkeypatch.setattr(making, "find_model", find_model)
    made = make_model("owner/name", tmp_path / "out", (1,), revision="main")
    (name, revision, part) = asked[0]
    assert (name, revision, part.levels) == ("owner/name", "main", ())
    assert made.config.base_anchor["name"] == "owner/name"
    assert made.config.base_anchor["revision"] == commit


def test_a_quantised_anchor(place, tmp_path):
    from mlx_lm import convert

    save_llama(tmp_path / "wide", place / "anchor", hidden_size=64, intermediate_size=64)
    convert(str(tmp_path / "wide"), str(tmp_path / "q4"), quantize=True, q_bits=4, q_group_size=32)
    make_model(tmp_path / "q4", tmp_path / "out", (4, 2), branching=3)
    lm = mlx_hiermem.load(tmp_path / "out")
    np.testing.assert_array_equal(logits(lm, "generic"), logits(lm, "none"))


# ---- with a tree -----------------------------------------------------------------------


def test_the_tree_of_a_corpus(place, tmp_path):
    for given in (place / "corpus", place / "corpus" / "routing"):
        out = tmp_path / f"of-{given.name}"
        made = make_model(place / "anchor", out, (4, 2), tree=given)
        assert made.has_tree and made.config.branching == 3
        check_routes(out, place / "corpus")


def test_the_tree_of_a_bank(place, tmp_path):
    for given in (place / "model", place / "model" / "memory"):
        out = tmp_path / f"of-{given.name}"
        make_model(place / "anchor", out, (1, 0), tree=given)
        assert mlx_hiermem.load(out).route("x y") == mlx_hiermem.load(place / "model").route("x y")
        names = set(read_manifest(out / "memory").files)
        assert {"tree.safetensors", "encoder.safetensors"} < names


def test_the_tree_of_a_bert(place, tmp_path):
    """Its files lie in a folder of the memory folder, and it goes with any anchor."""
    first, second = tmp_path / "first", tmp_path / "second"
    make_model(place / "llama", first, (4, 2), tree=place / "corpus-bert")
    make_model(place / "anchor", second, (2, 2), tree=first / "memory")
    for out in (first, second):
        assert (out / "memory" / "encoder" / "model.safetensors").is_file()
        check_routes(out, place / "corpus-bert")


def check_routes(model: Path, corpus: Path) -> None:
    lm = mlx_hiermem.load(model)
    assert (model / "memory" / "tree.safetensors").read_bytes() == (
        corpus / "routing" / "tree.safetensors"
    ).read_bytes()
    assert isinstance(lm.generate("some words.", max_tokens=2), str)
    np.testing.assert_array_equal(logits(lm, "fetched"), logits(lm, "none"))
    assert lm.assign(["some words."]).tolist() == [list(lm.route("some words.").ids)]
