"""Edits: all of it or nothing, whoever reads and whatever is killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hiermem import cli
from mlx_hiermem.bank import journal
from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.manifest import read_manifest, verify_files, write_manifest
from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.errors import FormatError, PathError
from tests.bank import editing
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parents[2]
STEPS = ["write", "journal", "apply", "done"]


@pytest.fixture
def folder(tmp_path, make):
    """A bank whose edited blocks are version 0."""
    make.bank(tmp_path / "memory", make.config((4, 2, 1), 3))
    editing.edit(tmp_path / "memory", range(1))
    return tmp_path / "memory"


def _files(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def _run(*arguments):
    command = [sys.executable, "-m", "tests.bank.editing", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _version(number):
    value = int(editing.content(number, 1)[0])
    return (value,) * 6 + (number % 2,)


def _whole(folder):
    """The bank verifies, and its manifest is that of its files."""
    with MemoryBank.open(folder) as bank:
        bank.verify()
        return bank.revision


def test_an_edit_changes_what_it_says_and_nothing_else(folder, make):
    before = BlockReader(folder)
    files = _files(folder)
    with BankEdit(folder) as edit:
        block = np.arange(edit.config.block_size(3), dtype=np.uint16)
        edit.replace_blocks(3, {13: block, 14: bytes(2 * len(block))})
    assert edit.revision != before.manifest.revision == edit.reader.manifest.revision
    after = BlockReader(folder)
    for level in (1, 2, 3):
        for cluster in range(3**level):
            old, new = before.stored(level, cluster), after.stored(level, cluster)
            if (level, cluster) == (3, 13):
                old = block
            elif (level, cluster) == (3, 14):
                old = 0 * block
            np.testing.assert_array_equal(new, old)
    before.close()
    after.close()
    changed = {name for name, sha256 in _files(folder).items() if files.get(name) != sha256}
    shard = "level-3-00001-of-00003.safetensors"
    assert changed == {shard, "checksums.safetensors", "manifest.json"}
    assert _files(folder).keys() == files.keys()
    assert _whole(folder) == edit.revision == write_manifest(folder).revision


def test_what_was_open_stays_as_it_was(folder):
    with MemoryBank.open(folder, tiers="disk") as bank:
        editing.edit(folder, range(1, 2))
        block = np.array(bank.fetch((0, 0, 0)).blocks[2].view(mx.uint16))
        assert (block == editing.content(0, 1)).all()
        assert bank.blocked == {(1, 0)}
    with MemoryBank.open(folder, tiers="disk") as bank:
        block = np.array(bank.fetch((0, 0, 0)).blocks[2].view(mx.uint16))
        assert (block == editing.content(1, 1)).all()
        assert bank.blocked == {(1, 1)}


def test_an_edit_of_nothing_changes_nothing(folder):
    files = _files(folder)
    with BankEdit(folder) as edit:
        edit.set_blocked([(1, 0)])
        edit.replace_blocks(1, {0: editing.content(0, edit.config.block_size(1))})
    assert _files(folder) == files
    assert edit.revision == edit.reader.manifest.revision


def test_an_error_within_leaves_the_bank_as_it_was(folder):
    files = _files(folder)
    with pytest.raises(ZeroDivisionError), BankEdit(folder) as edit:
        edit.set_blocked([(1, 1)])
        raise ZeroDivisionError
    for change in (
        lambda edit: edit.set_blocked([(4, 0)]),
        lambda edit: edit.set_blocked([(1, 3)]),
        lambda edit: edit.replace_blocks(2, {9: b""}),
    ):
        with pytest.raises(PathError), BankEdit(folder) as edit:
            change(edit)
    with pytest.raises(FormatError, match="given as 2 bytes, expected"), BankEdit(folder) as edit:
        edit.replace_blocks(2, {0: b"ab"})
    assert _files(folder) == files


def test_blocks_that_may_not_come_in(folder):
    files = _files(folder)
    with BankEdit(folder) as edit:
        size = edit.config.block_size(2)
        good = np.zeros(size, np.uint16)
        nan, infinite = good.copy(), good.copy()
        nan[1], infinite[size - 1] = 0x7FC0, 0xFF80
        for wrong, message in (
            (good.astype(np.float16), "given in float16, expected uint16"),
            (good.view(np.int16), "given in int16, expected uint16"),
            (nan, "NaN or infinite"),
            (infinite.tobytes(), "NaN or infinite"),
        ):
            with pytest.raises(FormatError, match=message):
                edit.replace_blocks(2, {1: wrong})
    assert _files(folder) == files


def test_a_buffer_that_is_used_again_is_not_what_is_written(folder):
    with BankEdit(folder) as edit:
        buffer = np.empty(edit.config.block_size(3), np.uint16)
        raw = bytearray(buffer.nbytes)
        for cluster in range(3):
            buffer[:] = 1 + cluster
            edit.replace_blocks(3, {cluster: buffer})
            raw[:] = bytes([1 + cluster]) * len(raw)
            edit.replace_blocks(3, {3 + cluster: raw})
    reader = BlockReader(folder)
    assert [reader.stored(3, i)[0] for i in range(6)] == [1, 2, 3, 0x101, 0x202, 0x303]
    reader.close()


@pytest.mark.parametrize("row", [0, 4])
def test_an_edit_does_not_hide_damage(folder, row):
    """Neither in a row that stays, nor in one that is replaced."""
    path = folder / "level-3-00001-of-00003.safetensors"
    with open(path, "r+b") as file:
        file.seek(-(9 - row) * 48 if row else -1, os.SEEK_END)
        file.write(b"\x01")
    files = _files(folder)
    with pytest.raises(FormatError, match=f"{path.name}: is not what manifest.json says"):
        with BankEdit(folder) as edit:
            edit.replace_blocks(3, {13: editing.content(0, edit.config.block_size(3))})
    assert _files(folder) == files


def test_files_keep_who_may_read_them(folder):
    for path in folder.iterdir():
        path.chmod(0o640)
    editing.edit(folder, range(1, 2))
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_a_quantised_bank_is_edited_by_its_bytes(tmp_path, make):
    make.bank(tmp_path / "plain", make.config((4, 2), 3, hidden=32))
    quantize_bank(tmp_path / "plain", tmp_path / "packed", 4)
    with BankEdit(tmp_path / "packed") as edit:
        edit.replace_blocks(2, {5: bytes(edit.config.block_bytes(2))})
    with MemoryBank.open(tmp_path / "packed", check_blocks=True) as bank:
        assert not np.array(bank.fetch((1, 5)).blocks[1].astype(mx.float32)).any()
        assert np.array(bank.fetch((1, 4)).blocks[1].astype(mx.float32)).any()
    _whole(tmp_path / "packed")


# ---- crashes ---------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_each_step_leaves_the_old_bank_or_the_new_one(folder, step):
    process = _run("edit", folder, 1, step)
    assert process.wait() == -signal.SIGKILL
    version = 0 if STEPS.index(step) < 2 else 1
    assert editing.look(folder)[1] == _version(version)
    with MemoryBank.open(folder) as bank:  # through the journal, where the edit was not finished
        assert bank.blocked == {(1, version)}
        bank.fetch((2, 8, 26))
    with BankEdit(folder) as edit:  # who comes next brings it to its end
        assert edit.reader.blocked == {(1, version)}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert _whole(folder) == write_manifest(folder).revision
    assert editing.look(folder)[1] == _version(version)


@pytest.mark.parametrize("count", range(4))
def test_a_kill_between_two_renames(folder, tmp_path, monkeypatch, count):
    """The journal is there, some files have their names already."""

    class Killed(BaseException):
        pass

    replace, done = os.replace, []

    def replaced(source, target):
        if Path(source).name.startswith(journal.PREFIX) and Path(target).name[0] != ".":
            if len(done) == count:
                raise Killed
            done.append(target)
        replace(source, target)

    monkeypatch.setattr(journal.os, "replace", replaced)
    with pytest.raises(Killed):
        editing.edit(folder, range(1, 2))
    monkeypatch.undo()
    assert editing.look(folder)[1] == _version(1)
    verify = BlockReader(folder)
    verify.close()
    editing.edit(folder, range(2, 3))
    assert editing.look(folder)[1] == _version(2)
    _whole(folder)


def _kill_while_editing(folder, first, seconds):
    process = _run("edit", folder, first)
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.kill()
    process.wait()
    revision, seen = editing.look(folder)
    assert seen in {_version(number) for number in range(max(0, first - 1), first + 1000)}
    with BankEdit(folder):
        pass
    assert _whole(folder) == revision == write_manifest(folder).revision
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_kills_at_random_moments(folder):
    rng = random.Random(0)
    for number in range(3):
        _kill_while_editing(folder, 64 * number + 1, rng.random() / 2)


@pytest.mark.slow
def test_kills_at_50_random_moments(folder):
    rng = random.Random(1)
    for number in range(50):
        _kill_while_editing(folder, 64 * number + 1, rng.random() / 2)


# ---- readers beside an edit ------------------------------------------------------------


def test_two_processes_read_while_one_edits(folder):
    readers = [_run("read", folder, 2.5) for _ in range(2)]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    end, number = time.monotonic() + 2.5, 0
    while time.monotonic() < end:
        number += 1
        editing.edit(folder, range(number, number + 1))
    expected = {_version(one) for one in range(number + 1)}
    for reader in readers:
        seen = json.loads(reader.communicate()[0])
        assert reader.returncode == 0
        assert len(seen) > 5
        assert {tuple(what) for _, what in seen} <= expected


def test_one_editor_at_a_time(folder):
    with BankEdit(folder):
        with pytest.raises(FormatError, match="another process is editing the bank; wait"):
            with BankEdit(folder):
                pass
    with BankEdit(folder):
        pass


def test_a_folder_that_cannot_be_locked_is_not_called_busy(folder, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(FormatError, match="cannot be locked \\(No locks available\\)"):
        with BankEdit(folder):
            pass


# ---- the journal of a stranger ---------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"files": 1}', '{"files": []}', '{"files": ["manifest.json", 1]}',
        '{"files": ["manifest.json", "../config.json"]}', '{"files": ["config.json"]}',
        '{"files": ["manifest.json", "/etc/passwd"]}', '{"files": ["manifest.json", ".x"]}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_journal_that_is_none(folder, text):
    (folder / journal.JOURNAL).write_text(text)
    for open_it in (BlockReader, lambda folder: BankEdit(folder).__enter__()):
        with pytest.raises(FormatError, match="edit.json: not the journal of an edit") as error:
            open_it(folder)
        assert "\n" not in str(error.value)


def test_a_journal_may_not_lead_out_of_the_folder(folder, tmp_path):
    (tmp_path / "secret").write_text((folder / "manifest.json").read_text())
    (folder / f"{journal.PREFIX}manifest.json").symlink_to(tmp_path / "secret")
    journal.commit(folder, ["manifest.json"])
    with pytest.raises(FormatError, match="outside of the folder"):
        MemoryBank.open(folder)


def test_a_link_is_not_put_in_the_place_of_a_file(folder):
    files = _files(folder)
    (folder / f"{journal.PREFIX}manifest.json").symlink_to(folder / "manifest.json")
    journal.commit(folder, ["manifest.json"])
    with pytest.raises(FormatError, match="edit-manifest.json: not a file of its own"):
        with BankEdit(folder):
            pass
    assert not (folder / "manifest.json").is_symlink()
    assert files.items() <= _files(folder).items()


def test_writing_a_bank_anew_drops_an_edit(folder, make):
    process = _run("edit", folder, 1, "apply")
    process.wait()
    assert (folder / journal.JOURNAL).exists()
    written = make.bank(folder, make.config((4, 2, 1), 3), seed=3)
    with MemoryBank.open(folder) as bank:
        assert bank.revision == written.revision
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


# ---- the commands ----------------------------------------------------------------------


def test_block_and_unblock(tmp_path, capsys):
    folder = make_tiny_model(tmp_path / "tiny")
    revision = read_manifest(folder / "memory").revision

    def run(*arguments):
        code = cli.main(["bank", *arguments, "--model", str(folder)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, out, _ = run("block", "1:2", "2:5", "--json")
    report = json.loads(out)
    assert code == 0 and report["blocked"] == [[1, 2], [2, 5]] and not report["blocked_before"]
    assert report["revision_before"] == revision != report["revision"]
    with MemoryBank.open(folder / "memory") as bank:
        assert bank.blocked == {(1, 2), (2, 5)}
        assert bank.fetch((2, 6)).report.blocks[0].source == "blocked"
    code, out, _ = run("unblock", "2:5")
    assert code == 0 and "1 block unblocked" in out and out.endswith("blocked now: 1:2\n")
    files = _files(folder / "memory")
    for wrong in (["block", "3:0"], ["block", "1:3"], ["unblock", "1:-1"], ["block", "x"]):
        code, out, err = run(*wrong)
        assert code == 2 and not out and err.count("\n") == 1
    assert _files(folder / "memory") == files
    run("unblock", "1:2")
    assert run("unblock", "1:2")[0] == 0
    verify_files(folder / "memory", read_manifest(folder / "memory"))
    assert cli.main(["bank", "block", "1:0"]) == 2
    assert "either --model FOLDER or --bank FOLDER" in capsys.readouterr().err


def test_checksums_are_added_to_a_bank_without(tmp_path, capsys):
    folder = make_tiny_model(tmp_path / "tiny") / "memory"
    files = _files(folder)
    (folder / "checksums.safetensors").unlink()
    write_manifest(folder)
    assert cli.main(["bank", "checksums", "--bank", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 3 + 9 + 2
    assert _files(folder) == files
    with open(folder / "level-2-00000-of-00003.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    (folder / "checksums.safetensors").unlink()
    damaged = _files(folder)
    assert cli.main(["bank", "checksums", "--bank", str(folder)]) == 2
    assert _files(folder) == damaged
