"""Thousands of mutated inputs of every kind: refused in one line or answered, and nothing else.

No crash, no hang, no memory that grows with what a file claims, no code of it run, nothing written
where it does not belong. A fault is told with the command that shows it again.
"""

from __future__ import annotations

import re
import signal
import time
from random import Random

import pytest

from mlx_hiermem.errors import FormatError
from tests.reliability import fuzz_process
from tests.reliability.fuzz_ending import SEEDS, VARIABLE
from tests.reliability.fuzz_kinds import KINDS
from tests.reliability.fuzz_process import FolderTarget, fuzz, told, try_inputs

pytestmark = pytest.mark.fuzz

INPUTS = 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_inputs(kind, tmp_path, scaled, figure):
    count = scaled(INPUTS)
    found = fuzz(kind, count, tmp_path)
    figure(
        f"fuzz.{kind}",
        found.inputs,
        f"inputs: {found.refused} refused, {found.accepted} accepted, {len(found.faults)} faults",
    )
    assert not found.faults, "\n\n".join(told(kind, found))
    assert (found.inputs, found.refused + found.accepted) == (count, count)
    # Both happen, or the mutations do nothing, or break everything.
    assert count < 200 or min(found.refused, found.accepted) > count / 100


# ---- what is looked for is seen --------------------------------------------------------


class Faulty(FolderTarget):
    """Does what an input must not be able to do; the seed says what."""

    def make(self) -> None:
        (self.folder / "file").write_text("honest")
        (self.folder / "below").mkdir()

    def change(self, random: Random) -> str:
        self.put("file", b"changed")
        return "everything"

    def look(self, random: Random) -> None:
        self.act()

    act = staticmethod(lambda: None)


class _LongError(FormatError):
    def __str__(self) -> str:
        return 900 * "x"


def _try(tmp_path, act):
    """What comes of one input with which ``act`` is called."""
    (tmp_path / "home").mkdir(parents=True)

    def make(folder, canary):
        target = Faulty(folder, canary)
        target.act = lambda: act(target)
        return target

    return try_inputs(make, tmp_path, 0, 1)


def _hold(megabytes):
    return bytearray(megabytes << 20).count(1)


def _compute(target):
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda target: 1 / 0, "ZeroDivisionError"),
        (lambda target: target.canary.touch(), "code of the input was run"),
        (lambda target: (target.folder.parent / "home" / "x").touch(), "something was written"),
        (lambda target: (target.folder / "x").touch(), "something was written"),
        (lambda target: (target.folder / "file").write_text("other"), "something was written"),
        (lambda target: (target.folder / "file").unlink(), "something was written"),
        (lambda target: _hold(300), r"took \d+ MiB"),
        (lambda target: _hold(10**6), "MemoryError"),
        (lambda target: (_ for _ in ()).throw(_LongError()), "900 characters"),
        (lambda target: (_ for _ in ()).throw(FormatError(" ")), "not a line"),
        (_compute, "slow"),
        (lambda target: exit(0), "SystemExit"),
    ],
)
def test_what_must_not_be_is_seen(tmp_path, monkeypatch, act, message):
    monkeypatch.setattr(fuzz_process, "SLOW", 0.1)
    found = _try(tmp_path, act)
    assert found.inputs == 1 and found.refused == found.accepted == 0
    (fault,) = found.faults
    assert re.search(message, fault["fault"]), fault
    assert fault["seed"] == 0 and fault["change"] == "everything"
    assert (tmp_path / "target" / "file").read_text() == "honest"


def test_what_may_be_is_none(tmp_path):
    def refuse(target):
        raise FormatError(f"{target.folder}/file: is not what it was; copy it again")

    assert _try(tmp_path / "a", refuse).refused == 1
    assert _try(tmp_path / "b", lambda target: None).accepted == 1


@pytest.mark.parametrize("end", ["signal", "exit", "hang"])
def test_a_process_that_ends_is_gone_on_behind(tmp_path, monkeypatch, end):
    """The seed is known, the others are tried, and what it said is told."""
    monkeypatch.setenv(VARIABLE, end)
    found = fuzz("ending", 10, tmp_path / "all", chunk=6)
    assert [fault["seed"] for fault in found.faults] == [*SEEDS]
    assert found.inputs == 10
    text = "\n".join(told("ending", found))
    assert "fuzz_process ending NEW_FOLDER 3 1" in text and "what was changed" in text
    assert {"signal": str(-signal.SIGSEGV), "exit": "with 7", "hang": "Timeout"}[end] in text
