"""Checkpoints made to hurt: refused with one line, nothing of them is run, nothing crashes."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hiermem.bank.dtypes import STORAGE
from mlx_hiermem.convert.sources import open_source
from mlx_hiermem.errors import FormatError, HierMemError
from tests.convert.attack_kinds import KINDS
from tests.convert.attack_tensors import TENSORS
from tests.convert.attack_zip64 import ZIP64, zip64_end
from tests.convert.attack_zips import ZIPS
from tests.convert.attacks import (
    BOMBS,
    CODE,
    archive,
    honest,
)

ROOT = Path(__file__).parents[2]
ATTACKS = {**CODE, **BOMBS, **TENSORS, **ZIPS, **ZIP64, **KINDS}


def open_apart(paths):
    """{path: (error, text)} of opening each, in another process that must end well."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.convert.open_all", *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout)
    assert results.pop("imported") == ["", ""]
    return results


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(what came of each attack, by its name; the canary)"""
    folder = tmp_path_factory.mktemp("attacks")
    canary = folder / "canary"
    paths = {name: folder / f"{number}.pt" for number, name in enumerate(ATTACKS)}
    for name, path in paths.items():
        ATTACKS[name][0](path, canary)
    assert not canary.exists()
    results = open_apart(paths.values())
    yield {name: results[str(path)] for name, path in paths.items()}, canary
    for path in paths.values():
        path.unlink()


@pytest.mark.parametrize("change", [bytes, zip64_end])
def test_honest_archives_open(tmp_path, change):
    """What the attacks are made of is refused for nothing else."""
    (tmp_path / "a.pt").write_bytes(change(honest()))
    with open_source(tmp_path / "a.pt") as source:
        values = source.tensors["w"].read()
    assert values.tobytes() == bytes(range(24)) and values.shape == (2, 3)


@pytest.mark.parametrize("name", ATTACKS)
def test_refused(opened, name):
    results, canary = opened
    kind, message = results[name]
    assert kind == "FormatError", (kind, message)
    assert "\n" not in message and len(message) < 600
    assert re.search(ATTACKS[name][1], message), message
    assert not canary.exists()


def test_payloads_are_real(tmp_path):
    """Those that run code do so where nobody looks: the canary shows that it would be seen."""
    canary = tmp_path / "canary"
    CODE["os.system"][0](tmp_path / "a.pt", canary)
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        pickle.loads(file.read("x/data.pkl"))
    assert canary.exists()


def refused_or_opened(path):
    """Whether it opens; if not, it is refused with one line."""
    try:
        open_source(path).close()
    except HierMemError as error:
        assert "\n" not in str(error) and len(str(error)) < 800
        return False
    return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a file of torch.save, a file of safetensors)"""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("saved")
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    torch.save({"state_dict": state, "epoch": 3}, folder / "a.pt")
    save_file(state, folder / "a.safetensors", metadata={"format": "pt"})
    assert refused_or_opened(folder / "a.pt") and refused_or_opened(folder / "a.safetensors")
    return folder / "a.pt", folder / "a.safetensors"


@pytest.mark.parametrize("which", [0, 1])
def test_truncated_anywhere(saved, tmp_path, which):
    data = saved[which].read_bytes()
    path = tmp_path / saved[which].name
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError) as error:
            open_source(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("which", [0, 1])
def test_any_change(saved, tmp_path, which):
    """A changed byte is refused or harmless; what opens can be read, and no more than was there."""
    data = saved[which].read_bytes()
    path = tmp_path / saved[which].name

    @given(data_of=st.data())
    @settings(max_examples=300)
    def check(data_of):
        raw = bytearray(data)
        for _ in range(data_of.draw(st.integers(1, 3))):
            raw[data_of.draw(st.integers(0, len(raw) - 1))] = data_of.draw(st.integers(0, 255))
        path.write_bytes(raw)
        if refused_or_opened(path):
            with open_source(path) as source:
                for tensor in source.tensors.values():
                    if tensor.dtype in STORAGE:
                        assert tensor.read().nbytes <= len(data)

    check()


def test_alignment_of_zero(saved, tmp_path):
    """torch.load ends with a division by zero here. The places are in the headers anyway."""
    with zipfile.ZipFile(saved[0]) as file:
        content = {info.filename: file.read(info) for info in file.infolist()}
    content["a/.storage_alignment"] = b"0"
    (tmp_path / "a.pt").write_bytes(archive(content))
    with open_source(tmp_path / "a.pt") as source:
        assert source.tensors["a"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_what_is_beside_the_weights_is_not_read(tmp_path):
    """An optimizer's tensors may be of any form; they are not wanted."""
    state = {"w": torch.ones(2)}
    odd = {"state": {0: torch.ones(3, 2).T}, "betas": (0.9, 0.95), "codes": {1.5, 2j}, (1, 2): b"x"}
    torch.save({"state_dict": state, "optimizer": odd}, tmp_path / "a.pt")
    with open_source(tmp_path / "a.pt") as source:
        assert set(source.tensors) == {"w"}
