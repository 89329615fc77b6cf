"""Bad input to ``init``: one line of what, where and what to do, exit code 2, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from mlx_hiermem import cli
from mlx_hiermem.making import make_model


def edited(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))
    return folder


def without(name: str):
    return lambda folder: (folder / name).unlink()


#: What is done to the llama's folder, options in place of the usual ones, and what is said.
BAD = {
    "no such model": (None, {"model": "{tmp}/none"}, "none: no such folder; give a model folder"),
    "an existing folder": (None, {"mlx-path": "{tmp}"}, ": exists already; remove it, or give an"),
    "an existing folder before anything else": (
        None, {"mlx-path": "{tmp}", "model": "{tmp}/none"}, ": exists already; remove it, or give",
    ),
    "a model with a bank": (
        None, {"model": "{place}/model"},
        "model: has a memory bank already; .*train --model .*, or give --fresh-memory to leave",
    ),
    "words": (None, {"config": "4,x"}, "--config '4,x': expected numbers with commas between"),
    "no ranks": (None, {"config": "0,0"}, r"ranks is \[0, 0\]; at least one level needs a rank"),
    "a rank below zero": (None, {"config": "4,-1"}, "--config '4,-1': expected numbers"),
    "a rank beyond counting": (None, {"config": "2147483648"}, "--config '2147483648': expected n"),
    "a block beyond a shard": (None, {"config": "100000000"}, "a block of level 1 has .* numbers"),
    "too many clusters": (None, {"config": "1,1,1,1,1,1,1"}, r"16\^7 clusters are more than a tr"),
    "clusters without number": (None, {"config": ",".join("1" * 40)}, "cannot be numbered"),
    "branching of one": (None, {"branching": "1"}, "branching is 1; expected an integer >= 2"),
    "two branchings": (None, {"branching": "4,4"}, "--branching 4,4: expected one number"),
    "branching in words": (None, {"branching": "four"}, "--branching 'four': expected numbers"),
    "an unknown kind": (None, {"kind": "mlp"}, "kind is 'mlp'; known are ffn, kv, lora_ffn, lora"),
    "an unknown dtype": (None, {"bank-dtype": "int8"}, "dtype is 'int8'; known are bfloat16, fl"),
    "layers in words": (None, {"layers": "some"}, "layers 'some': expected one of uniform, early,"),
    "a layer beyond": (None, {"layers": "0,2"}, "names layer 2, but the anchor has 2 layers"),
    "layers twice": (None, {"layers": "1,1"}, r"layers is \[1, 1\]; expected ascending layer"),
    "no config": (without("config.json"), {}, r"config\.json: cannot be read \(No such file"),
    "no weights": (
        without("model.safetensors"), {}, r"no model\*\.safetensors; convert the model with mlx_lm"
    ),
    "no JSON": (
        lambda folder: (folder / "config.json").write_text("{"), {}, r"config\.json: not valid JSON"
    ),
    "no kind of anchor": (
        lambda folder: edited(folder, model_type="gone"), {}, r"config\.json: no model_type; expect"
    ),
    "an unknown anchor": (
        lambda folder: edited(folder, model_type="unheard"), {},
        r"config\.json: the anchor cannot be built \(.*unheard not supported.*; fetch or convert",
    ),
    "no width": (
        lambda folder: edited(folder, hidden_size="gone"), {},
        r"config\.json: the anchor's config: hidden_size is None; expected a positive integer",
    ),
    "layers beyond counting": (
        lambda folder: edited(folder, num_hidden_layers=10**9), {},
        r"num_hidden_layers is 1000000000; expected at most",
    ),
    "no size of the norm": (
        lambda folder: edited(folder, rms_norm_eps="gone"), {},
        r"config\.json: the anchor cannot be built \(TypeError: .*rms_norm_eps",
    ),
    "an anchor without gates": (
        lambda folder: edited(folder, model_type="starcoder2"), {},
        r"llama: layer 0 of the anchor .*starcoder2.* ffn memories cannot be attached there: ch",
    ),
    "no tree": (None, {"tree": "{tmp}/none"}, "none: no corpus and no memory bank; give a folder"),
    "a folder of something else": (
        None, {"tree": "{place}/llama"}, "llama: no corpus and no memory bank; give a folder that"
    ),
    "a bank without a tree": (
        None, {"tree": "{bare}"}, "bare/memory: this bank has no tree; give one that has, or a corp"
    ),
    "a tree of other levels": (
        None, {"tree": "{place}/corpus-bert", "config": "1,1,1"},
        r"tree\.safetensors: a tree of 2 levels, but --config has 3 ranks; give one rank for each",
    ),
    "a tree of another branching": (
        None, {"tree": "{place}/corpus-bert", "branching": "4"},
        r"tree\.safetensors: a tree of branching 3, but --branching is 4; leave it out",
    ),
    "a corpus of other embeddings": (
        None, {"tree": "{place}/corpus"},
        "routing: its tree was grown with the token embeddings of another anchor; cluster",
    ),
    "a bank of other embeddings": (
        None, {"tree": "{place}/model/memory"},
        "memory: its tree was grown with the token embeddings of another anchor; cluster",
    ),
    "an altered tree of a corpus": (
        None, {"tree": "{altered}/corpus-bert"}, r"routing/tree\.safetensors: altered: sha256 is"
    ),
    "an altered encoder of a bank": (
        None, {"tree": "{altered}/bank"}, r"memory/encoder/config\.json: altered: sha256 is"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def altered(place) -> Path:
    """A corpus, and a bank, whose routing is not what it was."""
    folder = place / "altered"
    folder.mkdir()
    shutil.copytree(place / "corpus-bert", folder / "corpus-bert")
    make_model(place / "llama", folder / "bank", (1, 1), tree=place / "corpus-bert")
    for name in ("corpus-bert/routing/tree.safetensors", "bank/memory/encoder/config.json"):
        data = bytearray((folder / name).read_bytes())
        data[-7] ^= 1
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input(place, bare, altered, tmp_path, capsys, name):
    """One line, exit code 2, nothing written."""
    damage, options, says = BAD[name]
    model = shutil.copytree(place / "llama", tmp_path / "llama")
    if damage is not None:
        damage(model)
    given = {"model": str(model), "config": "4,2", "mlx-path": str(tmp_path / "deep" / "out")}
    for option, value in options.items():
        given[option] = value.format(tmp=tmp_path, place=place, bare=bare, altered=altered)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    arguments = [part for option, value in given.items() for part in (f"--{option}", value)]
    assert cli.main(["init", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"mlx_hiermem: error: [^\n]+\n", captured.err), captured.err
    assert "fault of ours" not in captured.err and re.search(says, captured.err), captured.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
