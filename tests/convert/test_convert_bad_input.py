"""Bad input to ``mlx_hiermem convert``: one line, exit code 2, nothing run, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mlx_hiermem.cli import main
from tests.convert.attack_dcp import DCP
from tests.convert.attack_dcp import save_dcp as save_dcp_folder
from tests.convert.attack_kinds import KINDS
from tests.convert.attack_tensors import TENSORS
from tests.convert.attack_zips import ZIPS
from tests.convert.attacks import BOMBS, CODE
from tests.convert.checkpoints import Written, make_numbers, write_stacked, write_state
from tests.tiny import make_tiny_model

# Those that take seconds each are in test_convert_attacks.py.
ATTACKS = {
    name: attack
    for name, attack in {**CODE, **BOMBS, **TENSORS, **ZIPS, **KINDS}.items()
    if not name.startswith("deep")
}
ENCODER = json.dumps({"type": "bert", "model": "somewhere"})


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Written:
    folder = tmp_path_factory.mktemp("good")
    return write_stacked(make_numbers(), folder, together=False)


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("honest") / "saved"
    save_dcp_folder(folder, {"model": {"w": torch.zeros(2, 3), "b": torch.zeros(4)}})
    return folder


def refused(arguments: list[str], words: str, folder: Path, capsys) -> None:
    """The command says so in one line, and leaves the folder as it was."""
    before = sorted(path.name for path in folder.iterdir())
    out = folder / "m"
    code = main(["convert", "--encoder", ENCODER, *arguments, "--mlx-path", str(out)])
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("mlx_hiermem: error: ") and err.count("\n") == 1 and len(err) < 900
    assert words in err
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(good, tmp_path, capsys, name):
    """As an anchor, as a bank, and as a tree."""
    path, canary = tmp_path / "evil.pt", tmp_path / "canary"
    ATTACKS[name][0](path, canary)
    config = ["--model-config", str(good.model_config)]
    refused(["--model", str(path), *config], "evil.pt", tmp_path, capsys)
    model = ["--model", str(good.model), *config]
    refused([*model, "--bank", str(path)], "evil.pt", tmp_path, capsys)
    refused([*model, "--bank", str(good.bank), "--tree", str(path)], "evil.pt", tmp_path, capsys)
    assert not canary.exists()


@pytest.mark.parametrize("name", DCP)
def test_attacks_by_dcp(good, honest, tmp_path, capsys, name):
    folder, canary = tmp_path / "dcp", tmp_path / "canary"
    DCP[name][0](honest, folder, canary)
    config = ["--model-config", str(good.model_config)]
    refused(["--model", str(folder), *config], "dcp", tmp_path, capsys)
    assert not canary.exists()


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, torch.Tensor]:
    state = dict(make_numbers().anchor)
    change(state)
    return state


ANCHORS = {
    "missing": (
        lambda state: state.pop("layers.1.feed_forward.w3.weight"),
        "layers.1.feed_forward.w3.weight missing",
    ),
    "surplus": (lambda state: state.update(extra=torch.zeros(2)), "extra left over"),
    "shape": (
        lambda state: state.update({"layers.1.ffn_norm.weight": torch.ones(17)}),
        "layers.1.ffn_norm.weight",
    ),
    "nan": (
        lambda state: state["norm.weight"].__setitem__(3, float("nan")),
        "norm.weight has numbers that are not finite",
    ),
    "inf": (
        lambda state: state["layers.1.attention.in_proj.weight"][47].__setitem__(3, float("inf")),
        "in_proj.weight has numbers that are not finite",
    ),
    "integers": (
        lambda state: state.update({"norm.weight": torch.ones(16, dtype=torch.int32)}),
        "norm.weight is stored as int32",
    ),
}


@pytest.mark.parametrize("name", ANCHORS)
def test_anchors(good, tmp_path, capsys, name):
    change, words = ANCHORS[name]
    path = write_state(changed(change), tmp_path)
    config = ["--model-config", str(good.model_config)]
    refused(["--model", str(path), *config], words, tmp_path, capsys)


def test_trees(good, tmp_path, capsys):
    """Of another k, another p, not finite, or of no width that fits the encoder."""
    model = [*good.arguments()]
    at = model.index("--tree") + 1
    rng = np.random.default_rng(0)
    for sizes, words in (
        ((4, 16), "branching"),
        ((3, 9, 27), "levels"),
        ((3,), "levels"),
        ((3, 8), "tree"),
    ):
        levels = {f"level{i}": rng.normal(size=(k, 8)) for i, k in enumerate(sizes, 1)}
        np.savez(tmp_path / "tree.npz", **levels)
        model[at] = str(tmp_path / "tree.npz")
        refused(model, words, tmp_path, capsys)
    np.savez(tmp_path / "tree.npz", level1=np.full((3, 8), np.nan), level2=np.zeros((9, 8)))
    refused(model, "tree.npz", tmp_path, capsys)
    tree = good.tree
    code = main(["convert", *good.arguments(), "--mlx-path", str(tmp_path / "m")])
    assert code == 2 and "name the encoder" in capsys.readouterr().err
    assert tree.exists()


def test_places(good, tmp_path, capsys):
    """Targets and sources that are not to be mixed up."""
    folder = tmp_path / "f"
    shutil.copytree(good.model.parent, folder)
    model = ["--model", str(folder / "epoch_1.pt"), "--model-config", str(good.model_config)]
    with_target = ["convert", *model, "--mlx-path", str(folder), "--overwrite"]
    assert main(with_target) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (folder / "epoch_1.pt").exists()
    refused(["--model", str(tmp_path / "none.pt")], "none.pt", tmp_path, capsys)
    refused(["--model", "nobody/nothing-here"], "nobody/nothing-here", tmp_path, capsys)
    refused([*model, "--bank", str(tmp_path / "none")], "none", tmp_path, capsys)
    refused(
        [*model, "--bank", str(folder / "epoch_1.pt")], "no tensor of a memory", tmp_path, capsys
    )
    refused([*model, "--tree", str(good.tree)], "has no memory", tmp_path, capsys)
    refused([*model, "--tokenizer", str(folder)], "no tokenizer in it", tmp_path, capsys)
    refused([*model, "--ignore", "("], "no regular expression", tmp_path, capsys)
    refused([*model, "--key-map", str(good.tree)], "tree.npz", tmp_path, capsys)
    (tmp_path / "m").mkdir()
    refused(model, "exists already", tmp_path, capsys)


def test_a_model_that_holds_a_memory_and_another_one(good, tmp_path, capsys):
    both = write_stacked(make_numbers(), tmp_path / "both")
    model = ["--model", str(both.model), "--model-config", str(both.model_config)]
    refused([*model, "--bank", str(good.bank)], "holds a memory of its own", tmp_path, capsys)


def test_overwriting_what_is_read(tmp_path, capsys):
    tiny = make_tiny_model(tmp_path / "tiny")
    before = {path: path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    assert main(["convert", "--model", str(tiny), "--mlx-path", str(tiny), "--overwrite"]) == 2
    assert "which it would replace" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tiny.rglob("*") if path.is_file()}


def test_a_link_out_of_the_folder(good, tmp_path, capsys):
    folder = tmp_path / "sharded"
    folder.mkdir()
    bank = write_state(
        {name: one for name, one in make_numbers().anchor.items()}, tmp_path, "x", "safetensors"
    )
    os.rename(bank, tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    config = ["--model-config", str(good.model_config)]
    refused(["--model", str(folder), *config], "link", tmp_path, capsys)
