"""What the tests of bad input share: one line, and a folder that is left as it was."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest

from mlx_hiermem import cli
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.errors import FormatError, HierMemError
from tests.bank.mutations import LONGEST, state


@contextmanager
def refused(folder, message, kind=FormatError):
    """What is in it fails with one line that matches, and leaves the folder as it was."""
    before = state(folder)
    with pytest.raises(HierMemError) as error:
        yield
    text = str(error.value)
    assert type(error.value) is kind, repr(error.value)
    assert re.search(message, text), text
    assert text.isprintable() and len(text) < LONGEST, text
    assert state(folder) == before


def open_refused(folder, message, kind=FormatError, **options):
    with refused(folder, message, kind):
        MemoryBank.open(folder, **options)


def verify(folder, message):
    with MemoryBank.open(folder, tiers="disk") as opened, refused(folder, message):
        opened.verify()


def command(capsys, folder, message, *arguments):
    """A command that has to fail with code 2 and one line, and to leave the folder as it was."""
    before = state(folder)
    capsys.readouterr()
    assert cli.main([*arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"mlx_hiermem: error: [^\n]+\n", printed.err), printed.err
    assert re.search(message, printed.err), printed.err
    assert state(folder) == before


def bank_commands(capsys, folder, message, *actions):
    for action in actions or ("inspect", "verify"):
        command(capsys, folder, message, "bank", action, "--bank", str(folder))
