"""Journals and lists of removed blocks that nobody here wrote."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from mlx_hiermem.bank import journal
from mlx_hiermem.bank.blocked import BlockedBlocks, blocked_bytes
from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.manifest import write_manifest
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.remove import remove
from mlx_hiermem.errors import FormatError
from tests.bank.removing import BLOCKS


@pytest.fixture
def folder(tmp_path, make):
    """A bank of 3 and 9 clusters, of which one block is blocked."""
    make.bank(tmp_path / "memory", make.config((4, 2), 3))
    with BankEdit(tmp_path / "memory") as edit:
        edit.set_blocked([(2, 8)])
    return tmp_path / "memory"


def _files(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize(
    "overwrite",
    [
        "1", "[]", '{"config.json": [[0, 1]]}', '{"manifest.json": [[0, 1]]}',
        '{"blocked.json": 1}', '{"blocked.json": [1]}', '{"blocked.json": [[1, 1]]}',
        '{"blocked.json": [[-1, 1]]}', '{"blocked.json": [[0, 1.5]]}', '{"blocked.json": [[0]]}',
        '{"blocked.json": [[true, 2]]}', '{"blocked.json": [[0, 9223372036854775808]]}',
        '{"../x": [[0, 1]]}',
    ],
)  # fmt: skip
def test_a_journal_that_is_none(folder, overwrite):
    text = f'{{"files": ["blocked.json", "manifest.json"], "overwrite": {overwrite}}}'
    (folder / journal.JOURNAL).write_text(text)
    with pytest.raises(FormatError, match="edit.json: not the journal of an edit"):
        BlockReader(folder)


def test_a_journal_neither_lengthens_a_file_nor_follows_a_link(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"abc")
    data = (folder / "blocked.json").read_bytes()
    for name in ("blocked.json", "manifest.json"):
        shutil.copy(folder / name, folder / (journal.PREFIX + name))
    journal.commit(folder, ["blocked.json", "manifest.json"], {"blocked.json": [(3, 2**40)]})
    with open(folder / "blocked.json", "rb") as old:
        with BankEdit(folder):
            pass
        assert old.read() == data[:3] + bytes(len(data) - 3)
    for name in ("blocked.json", "manifest.json"):
        shutil.copy(folder / name, folder / (journal.PREFIX + name))
    (folder / "blocked.json").unlink()
    (folder / "blocked.json").symlink_to(secret)
    journal.commit(folder, ["blocked.json", "manifest.json"], {"blocked.json": [(0, 3)]})
    with pytest.raises(FormatError, match="cannot be brought to its end"):
        with BankEdit(folder):
            pass
    assert secret.read_bytes() == b"abc"


def test_a_journal_that_would_be_too_long_is_refused(folder, monkeypatch):
    monkeypatch.setattr(journal, "_LIMIT", 100)
    files = _files(folder)
    with pytest.raises(FormatError, match="the edit is too large.*several steps"):
        remove(folder, BLOCKS)
    assert _files(folder) == files


@pytest.mark.parametrize(
    "text",
    [
        '{"removed": [[1, 0]]}', '{"blocked": [], "removed": 1}',
        '{"blocked": [], "removed": [[1, 9]]}', '{"blocked": [], "removed": [], "more": []}',
        '{"blocked": [[1, 0]], "removed": [[1, 0]]}',
    ],
)  # fmt: skip
def test_a_list_that_is_wrong(folder, text):
    (folder / "blocked.json").write_text(text)
    write_manifest(folder)
    with pytest.raises(FormatError, match="blocked.json: ") as error:
        BlockReader(folder)
    assert "\n" not in str(error.value)


def test_a_bank_without_removed_blocks_is_as_it_was():
    assert blocked_bytes(BlockedBlocks([(2, 1), (1, 0)])) == b'{"blocked": [[1, 0], [2, 1]]}\n'
    both = json.loads(blocked_bytes(BlockedBlocks([(2, 1), (1, 0)], [(1, 0)])))
    assert both == {"blocked": [[2, 1]], "removed": [[1, 0]]}
