"""``bank remove --name``: an added memory goes for good, and the bank is as it was before it."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest

from mlx_hiermem import cli
from mlx_hiermem.bank import extend
from mlx_hiermem.bank import remove as removing
from mlx_hiermem.bank.layout import level_of
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.errors import FormatError
from tests.tiny import make_tiny_model, random_texts


@pytest.fixture
def model(tmp_path):
    """A tiny model to which two memories were added by the command."""
    folder = make_tiny_model(tmp_path / "tiny")
    lines = [json.dumps({"text": text}) for text in random_texts(6, seed=3)]
    (tmp_path / "private.jsonl").write_text("\n".join(lines))
    before = files(folder)
    for name in ("acme", "other"):
        code = cli.main(
            ["bank", "add", "--model", str(folder), "--name", name, "--iters", "2", "--roots", "1",
             "--corpus", str(tmp_path / "private.jsonl")]
        )  # fmt: skip
        assert code == 0
    return folder, before


def files(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / "memory").iterdir()
    }


def command(folder, name, *more):
    return cli.main(["bank", "remove", "--model", str(folder), "--name", name, *more])


def test_what_is_left_is_the_bank_before_it(model, capsys):
    folder, before = model
    for name in ("other", "acme"):
        capsys.readouterr()
        assert command(folder, name, "--yes", "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["name"] == name and report["blocks"]
        assert cli.main(["bank", "verify", "--model", str(folder)]) == 0
    after = files(folder)
    del before["manifest.json"]  # which lists an empty list of blocked blocks now
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if "acme" in name or "other" in name]
    with MemoryBank.open(folder / "memory") as bank:
        assert bank.config.roots == 3 and not bank.removed and not bank.blocked


def test_its_numbers_are_overwritten_in_the_files_that_go(model):
    folder, _ = model
    names = [one for one in files(folder) if "acme" in one and level_of(one) is not None]
    assert len(names) == 2
    opened = [os.open(folder / "memory" / name, os.O_RDONLY) for name in names]
    try:
        assert all(any(os.pread(fd, 1 << 20, 0)[-16:]) for fd in opened)
        assert command(folder, "acme", "--yes") == 0
        for fd in opened:
            data = os.pread(fd, 1 << 20, 0)
            size = int.from_bytes(data[:8], "little")
            assert data[8 + size :] and not any(data[8 + size :])
    finally:
        for fd in opened:
            os.close(fd)


def test_the_other_one_answers_as_before(model):
    folder, _ = model
    with MemoryBank.open(folder / "memory") as bank:
        was = np.array(bank.fetch((4, 13)).joined)
    assert command(folder, "acme", "--yes") == 0
    with MemoryBank.open(folder / "memory") as bank:
        assert bank.config.added_roots() == {"other": range(3, 4)}
        np.testing.assert_array_equal(np.array(bank.fetch((3, 10)).joined), was)


def test_a_stop_between_its_two_edits_is_brought_to_an_end(model, monkeypatch, capsys):
    folder, _ = model

    def fails(*_, **__):
        raise FormatError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(extend, "drop", fails)
        assert command(folder, "acme", "--yes") == 2
    with MemoryBank.open(folder / "memory") as bank:
        assert set(bank.config.added_roots()) == {"acme", "other"}
        assert {pair for pair in bank.removed if pair[0] == 1} == {(1, 3)}
    assert command(folder, "acme", "--yes") == 0
    with MemoryBank.open(folder / "memory") as bank:
        assert set(bank.config.added_roots()) == {"other"} and not bank.removed


def test_what_is_refused_changes_nothing(model, capsys):
    folder, _ = model
    before = files(folder)
    assert command(folder, "nobody", "--yes") == 2
    assert "has no added memory nobody; it has acme, other" in capsys.readouterr().err
    assert command(folder, "acme") == 2
    assert "there is no terminal to ask on; give --yes" in capsys.readouterr().err
    assert files(folder) == before
    assert removing.finish(folder / "memory") is False
