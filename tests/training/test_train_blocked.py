"""``train`` on from a bank of which blocks are blocked or removed: refused, since a run would train
them, and its result would have them at work again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.remove import remove
from tests.corpus.corpora import files_of
from tests.training.runs import bank, train


@pytest.fixture
def model(place, tmp_path) -> Path:
    return Path(shutil.copytree(place / "model", tmp_path / "model"))


@pytest.fixture
def refused(place, model, tmp_path, capsys):
    """The line that a run ends with; neither run nor model has changed."""

    def check(**options) -> str:
        before = files_of(model)
        capsys.readouterr()
        assert train(place, tmp_path / "run", model=model, **options) == 2
        told = capsys.readouterr()
        line = told.err.splitlines()[-1]
        assert told.out == "" and line.startswith(f"mlx_hiermem: error: {model / 'memory'}: ")
        assert not (tmp_path / "run").exists() and files_of(model) == before
        return line

    return check


def test_blocked_blocks_are_not_switched_on_by_training(place, model, refused, tmp_path):
    with BankEdit(model / "memory") as edit:
        edit.set_blocked([(2, 4), (1, 0), (2, 1), (2, 0), (2, 8)])
    for options in ({}, {"regime": "cotrain", "freeze": "*embed*"}, {"subtree": 0}):
        line = refused(**options)
        assert "has blocked blocks (1:0, 2:0, 2:1 and 2 more)" in line
        assert "bank unblock" in line and "--fresh-memory" in line
    given = {"model": model, "fresh_memory": True}
    assert train(place, tmp_path / "fresh", **given) == 0
    assert not (tmp_path / "fresh" / "model" / "memory" / "blocked.json").exists()
    with BankEdit(model / "memory") as edit:
        edit.set_blocked([])
    assert train(place, tmp_path / "run", model=model) == 0


def test_removed_blocks_do_not_come_back_by_training(place, model, refused, tmp_path):
    remove(model / "memory", [(2, 4)])
    line = refused()
    assert "has removed blocks (2:4)" in line and "--fresh-memory" in line
    assert "docs/training.md" in line
    # What that page says for who wants the block to be trained anew.
    with BankEdit(model / "memory") as edit:
        edit.replace_blocks(2, {4: bytes(edit.config.block_bytes(2))})
    reader = BlockReader(model / "memory")
    assert not reader.blocked.removed and not reader.block(2, 4).any()
    reader.close()
    assert train(place, tmp_path / "run", model=model, learning_rate=0, final_learning_rate=0) == 0
    before, after = bank(model), bank(tmp_path / "run" / "model")
    differ = {pair for pair in before if not np.array_equal(before[pair], after[pair])}
    assert differ == {(2, 4)}  # start values
