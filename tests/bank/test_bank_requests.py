"""What may be asked of a bank and cannot be had: budgets, paths, parts, folders of levels."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_hiermem.bank.parts import Part
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.errors import BudgetError, ConfigError, PathError
from tests.bank.attacking import command, open_refused, refused

LEVEL1 = "level-1-00000-of-00001.safetensors"
FIRST, SECOND = (f"level-2-0000{number}-of-00002.safetensors" for number in (0, 1))


@pytest.fixture
def bank(even_bank):
    return even_bank


@pytest.mark.parametrize(
    "budget",
    [0, -1, 1, -(10**30), 1.5, 1e30, float("nan"), float("inf"), "2GB", "", True, [1], b"1"],
)
def test_budgets_that_hold_nothing(bank, budget):
    open_refused(bank.folder, "memory budget: ", BudgetError, memory_budget=budget)


def test_budgets_that_hold_all(bank):
    for budget in (10**30, np.int64(10**12), None):
        with MemoryBank.open(bank.folder, memory_budget=budget) as opened:
            opened.fetch((1, 3))
    with MemoryBank.open(bank.folder, memory_budget=0, tiers="disk") as opened:
        opened.fetch((1, 3))
        assert opened.bytes_held == 0


@pytest.mark.parametrize("budget", ["0", "-1", "1", "nan", "inf", "1e9", "", "2 XB", "9" * 5000])
def test_budgets_on_the_command_line(bank, capsys, budget):
    inspect = ["bank", "inspect", "--bank", str(bank.folder), f"--memory-budget={budget}"]
    command(capsys, bank.folder, "a number of bytes|memory budget: 1 bytes cannot hold", *inspect)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((0, 0, 0), "has 3 ids, expected 2"),
        ((0,), "has 1 ids, expected 2"),
        ((), "has 0 ids, expected 2"),
        ((2, 4), "cluster '2' of level 1 does not exist; its clusters are 0 to 1"),
        ((0, 8), "cluster '8' of level 2 does not exist"),  # of a tree with branching 3
        ((0, 2), "cluster 2 of level 2 is not a child of cluster 0 of level 1"),
        ((1, 1), "is not a child of cluster 1 of level 1; its children are 2 to 3"),
        ((-1, -1), "cluster '-1' of level 1 does not exist"),
        ((0.0, 1), "cluster '0.0' of level 1"),
        ((False, 1), "cluster 'False' of level 1"),
        ((None, None), "cluster 'None' of level 1"),
        (("0", "1"), "cluster '0' of level 1"),
        (([0], [1]), r"cluster '\[0\]' of level 1"),
        ("01", "cluster path '01': expected 2 cluster ids"),
        (b"\0\1", "expected 2 cluster ids"),
        (None, "cluster path 'None': expected 2 cluster ids"),
        (7, "cluster path '7': expected 2 cluster ids"),
        (np.zeros((2, 2), int), "cluster '.0 0.' of level 1"),
        ((2**63, 0), "cluster '9223372036854775808' of level 1"),
    ],
)
def test_paths_of_another_tree(bank, path, message):
    with MemoryBank.open(bank.folder) as opened:
        for ask in (opened.fetch, opened.prefetch, lambda path: opened.fetch_many([(0, 0), path])):
            with refused(bank.folder, message, PathError):
                ask(path)
        assert opened.fetch((1, 3)).report.blocks[1].cluster == 3


def test_paths_on_the_command_line(tiny, capsys):
    for path, message in (
        ("1,3,9", "has 3 ids, expected 2"),
        ("3,9", "cluster '3' of level 1 does not exist"),
        ("0,3", "cluster 3 of level 2 is not a child of cluster 0"),
        ("0,99999999999999999999", "does not exist|too large"),
        ("0,-1", "is no cluster path"),
        ("0;1", "is no cluster path"),
    ):
        arguments = ["--model", str(tiny), "--prompt", "gold", f"--path={path}"]
        command(capsys, tiny, message, "generate", *arguments)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part(levels=(3,)), "level '3' has no memory; levels with memory are 1, 2"),
        (Part(levels=(0,)), "level '0' has no memory"),
        (Part(levels=(2**63,)), "level '9223372036854775808' has no memory"),
        (Part(levels=("1",)), "level '1' has no memory"),
        (Part(subtrees=(2,)), "cluster '2' of level 1 does not exist; its clusters are 0 to 1"),
        (Part(subtrees=(-1,)), "cluster '-1' of level 1 does not exist"),
        (Part(subtrees=(0.0,)), "cluster '0.0' of level 1 does not exist"),
    ],
)
def test_parts_that_are_not_there(bank, part, message):
    open_refused(bank.folder, message, PathError, part=part)


def test_parts_on_the_command_line(bank, capsys):
    for options, message in (
        (["--levels", "3"], "level '3' has no memory"),
        (["--levels", "1,x"], "expected numbers with commas between"),
        (["--levels", "9" * 5000], "expected numbers with commas between"),
        (["--subtrees", "2"], "cluster '2' of level 1 does not exist"),
        (["--level-folder", f"3={bank.folder}"], "folder of level 3: the bank has memory at"),
        (["--level-folder", "2=/no/such/folder"], "/no/such/folder: no such folder"),
        (["--level-folder", "two"], "--level-folder: 'two' is none"),
    ):
        inspect = ["bank", "inspect", "--bank", str(bank.folder)]
        command(capsys, bank.folder, message, *inspect, *options)


def test_a_part_whose_files_are_missing(bank, tmp_path):
    part = Part(subtrees=(1,))
    (bank.folder / FIRST).unlink()
    with MemoryBank.open(bank.folder, part=part) as opened:
        opened.fetch((1, 3))
        opened.verify()
    open_refused(bank.folder, f"{FIRST}: no such file")
    (bank.folder / SECOND).unlink()
    open_refused(bank.folder, f"{SECOND}: no such file", part=part)
    disk = tmp_path / "disk"
    disk.mkdir()
    open_refused(bank.folder, f"disk/{SECOND}: no such file", part=part, folders={2: disk})


def test_folders_of_levels_that_are_not_there(bank, tmp_path):
    for level in (0, 3, 2**63, "2"):
        message = f"folder of level {level}: the bank has memory at levels 1, 2 only"
        open_refused(bank.folder, message, ConfigError, folders={level: tmp_path})
    open_refused(bank.folder, "none: no such folder", folders={2: tmp_path / "none"})
    open_refused(bank.folder, "no such folder", folders={2: bank.folder / LEVEL1})
