"""Removing blocks: they are gone from the bank and from the old files, and all else stays."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hiermem.bank import journal
from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.manifest import write_manifest
from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.remove import finish, plan, remove, subtree
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.errors import FormatError, InputError, PathError
from tests.bank.removing import BLOCKS

ROOT = Path(__file__).parents[2]
STEPS = ["write", "journal", "apply", "overwrite", "rename", "done"]
GONE = frozenset(BLOCKS)


@pytest.fixture
def folder(tmp_path, make):
    """A bank of 3 and 9 clusters with names, of which one block is blocked."""
    folder = tmp_path / "memory"
    make.bank(folder, make.config((4, 2), 3))
    (folder / "names.json").write_text('{"level1": ["gold", "iron", "tin"]}')
    write_manifest(folder)
    with BankEdit(folder) as edit:
        edit.set_blocked([(2, 4), (2, 8)])
    return folder


def _files(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def _blocks(folder):
    """All blocks of a bank as bytes."""
    reader = BlockReader(folder)
    try:
        return {
            (level, cluster): reader.stored(level, cluster).tobytes()
            for level in reader.config.memory_levels
            for cluster in range(reader.config.clusters(level))
        }
    finally:
        reader.close()


class _Old:
    """The level files and the names as they are now, whatever takes their names."""

    def __init__(self, folder):
        self.reader = BlockReader(folder)
        self.names = open(folder / "names.json", "rb")  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.reader.close()
        self.names.close()

    def blocks(self):
        config = self.reader.config
        return {
            (level, cluster): self.reader.stored(level, cluster).tobytes()
            for level in config.memory_levels
            for cluster in range(config.clusters(level))
        }


def _without(blocks, gone=GONE):
    """What blocks are after the removal of some."""
    return {pair: bytes(len(one)) if pair in gone else one for pair, one in blocks.items()}


def _hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def _whole(folder):
    with MemoryBank.open(folder, check_blocks=True) as bank:
        bank.verify()
        return bank.revision


def test_a_removed_block_is_gone_and_all_else_is_as_it_was(folder):
    blocks, files = _blocks(folder), _files(folder)
    report = remove(folder, BLOCKS)
    assert _blocks(folder) == _without(blocks)
    reader = BlockReader(folder)
    assert reader.blocked == {(2, 8)} and reader.blocked.removed == GONE
    reader.close()
    changed = {name for name, sha256 in _files(folder).items() if files.get(name) != sha256}
    assert changed == {
        "level-1-00000-of-00001.safetensors", "level-2-00000-of-00003.safetensors",
        "level-2-00001-of-00003.safetensors", "blocked.json", "checksums.safetensors",
        "manifest.json",
    }  # fmt: skip
    assert not _hidden(folder)
    assert _whole(folder) == report["revision"] == write_manifest(folder).revision
    assert report["blocks"] == report["removed"] == sorted(map(list, BLOCKS))
    assert report["bytes"] == sum(len(blocks[pair]) for pair in GONE)
    assert report["levels"] == {"1": 1, "2": 3}


def test_the_old_files_are_overwritten_where_the_blocks_were(folder):
    blocks = _blocks(folder)
    with _Old(folder) as old:
        sizes = [os.fstat(fd).st_size for fd in old.reader.descriptors]
        remove(folder, BLOCKS)
        assert [os.fstat(fd).st_nlink for fd in old.reader.descriptors].count(0) == 3
        assert old.blocks() == _without(blocks)
        assert [os.fstat(fd).st_size for fd in old.reader.descriptors] == sizes
        assert old.names.read() == b'{"level1": ["gold", "iron", "tin"]}'  # no names were given


def test_old_names_are_overwritten_too(folder):
    new = b'{"level1": ["gold", "iron", "cluster 2"]}'
    asked = []
    with _Old(folder) as old:
        remove(folder, subtrees=[2], names=lambda *given: asked.append(given) or new)
        assert set(old.names.read()) == {0}
    assert (folder / "names.json").read_bytes() == new
    assert asked == [(folder, {(1, 2), (2, 6), (2, 7), (2, 8)})]


def test_other_edits_overwrite_nothing(folder):
    with _Old(folder) as old:
        before = old.blocks()
        with BankEdit(folder) as edit:
            edit.replace_blocks(2, {4: bytes(edit.config.block_bytes(2))})
            edit.set_names(b'{"level1": ["a", "b", "c"]}')
        assert old.blocks() == before and b"gold" in old.names.read()


def test_the_bytes_that_are_overwritten_are_reported(folder):
    seen = []
    report = remove(folder, BLOCKS, progress=lambda total, count: seen.append((total, count)))
    (total,) = {total for total, _ in seen}
    size = {path.name: path.stat().st_size for path in folder.iterdir()}
    levels = ("1-00000-of-00001", "2-00000-of-00003", "2-00001-of-00003")
    assert total == sum(size[f"level-{name}.safetensors"] for name in levels) + report["bytes"]
    small = size["blocked.json"] + size["manifest.json"]  # which are not in the total
    assert sum(count for _, count in seen) == total + small


def test_a_fetch_of_a_removed_block_is_that_of_a_blocked_one(folder):
    with MemoryBank.open(folder) as bank:
        for pair in BLOCKS:
            bank.block(*pair)
        paths = [(leaf // 3, leaf) for leaf in range(9)]
        expected = [np.array(bank.fetch(path).joined.view(mx.uint16)) for path in paths]
    remove(folder, BLOCKS)
    with MemoryBank.open(folder) as bank:
        assert bank.removed == GONE and bank.blocked == {(2, 8)}
        for path, memory in zip(paths, expected, strict=True):
            assert (np.array(bank.fetch(path).joined.view(mx.uint16)) == memory).all()
        first, second = bank.fetch_many([(2, 6), (2, 6)])
        for report in (first.report, second.report):
            block = report.blocks[0]
            assert (block.source, block.bytes, block.blocked) == ("removed", 0, False)
            assert report.blocks[1].bytes > 0
        both = bank.fetch((2, 6), blocked=[(1, 2)]).report.blocks[0]
        assert (both.source, both.blocked) == ("removed", True)
        bank.prefetch((1, 4)).wait()
        assert bank.fetch((1, 4)).report.blocks[1].source == "removed"
        found = bank.inspect()
        assert [row["removed"] for row in found["levels"]] == [1, 3]
        assert found["removed"] == sorted(map(list, BLOCKS)) and not found["removal_unfinished"]
        with pytest.raises(PathError, match="block 4 of level 2 was removed: its numbers are gone"):
            bank.unblock(2, 4)
        bank.block(2, 4)
        bank.unblock(2, 4)
        bank.unblock(2, 3)


def test_a_block_that_is_replaced_is_there_again(folder):
    remove(folder, BLOCKS)
    with BankEdit(folder) as edit:
        edit.replace_blocks(2, {4: b"\1" * edit.config.block_bytes(2)})
        edit.set_blocked([(2, 8), (1, 2)])  # the second is gone, which says more
    with MemoryBank.open(folder) as bank:
        assert bank.removed == GONE - {(2, 4)} and bank.blocked == {(2, 8)}
        assert bank.fetch((1, 4)).report.blocks[1].source == "disk"
    with BankEdit(folder) as edit:
        edit.replace_blocks(2, {5: b"\1" * edit.config.block_bytes(2)})
        edit.remove_blocks([(2, 5)])
    with MemoryBank.open(folder) as bank:
        assert (2, 5) in bank.removed
    with BankEdit(folder) as edit:
        edit.remove_blocks([(2, 3)])
        edit.replace_blocks(2, {3: b"\1" * edit.config.block_bytes(2)})
    with MemoryBank.open(folder) as bank:
        assert (2, 3) not in bank.removed


def test_removing_more_later(folder):
    remove(folder, [(2, 4)])
    report = remove(folder, [(2, 4), (2, 3)])
    assert report["blocks"] == [[2, 3]] and report["removed"] == [[2, 3], [2, 4]]


def test_a_subtree_is_all_at_and_below_its_cluster(tmp_path, make):
    config = make.config((2, 0, 1), 3)
    assert sorted(subtree(config, 1)) == [
        (1, 1), *((2, i) for i in (3, 4, 5)), *((3, i) for i in range(9, 18))
    ]  # fmt: skip
    make.bank(tmp_path / "memory", config)
    report = remove(tmp_path / "memory", subtrees=[1])
    assert report["levels"] == {"1": 1, "3": 9}
    with _reader(tmp_path / "memory") as reader:
        assert reader.blocked.removed == {(1, 1), *((3, i) for i in range(9, 18))}
        with pytest.raises(PathError, match="level '2' has no memory|level 2"):
            plan(reader, [(2, 3)])


class _reader:
    def __init__(self, folder):
        self.reader = BlockReader(folder)

    def __enter__(self):
        return self.reader

    def __exit__(self, *_):
        self.reader.close()


@pytest.mark.parametrize("mode", ["affine", "nvfp4"])
def test_a_quantised_bank(tmp_path, make, mode):
    make.bank(tmp_path / "plain", make.config((4, 2), 3, hidden=32))
    quantize_bank(tmp_path / "plain", tmp_path / "packed", 4, mode)
    blocks = _blocks(tmp_path / "packed")
    reader = BlockReader(tmp_path / "packed")
    remove(tmp_path / "packed", BLOCKS)
    assert not any(reader.stored(*pair).any() for pair in BLOCKS)
    reader.close()
    assert _blocks(tmp_path / "packed") == _without(blocks)
    _whole(tmp_path / "packed")
    with MemoryBank.open(tmp_path / "packed") as bank:
        assert not np.array(bank.fetch((2, 6)).blocks[0].astype(mx.float32)).any()


def test_a_bank_that_is_quantised_later_stays_without(tmp_path, make):
    make.bank(tmp_path / "plain", make.config((4, 2), 3, hidden=32))
    remove(tmp_path / "plain", BLOCKS)
    quantize_bank(tmp_path / "plain", tmp_path / "packed", 4)
    with MemoryBank.open(tmp_path / "packed") as bank:
        assert bank.removed == GONE


# ---- refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "roots", "error", "message"),
    [
        ([(3, 0)], [], PathError, "level '3' has no memory"),
        ([(1, 3)], [], PathError, "cluster '3' of level 1 does not exist"),
        ([(2, -1)], [], PathError, "does not exist"),
        ([], [3], PathError, "cluster '3' of level 1 does not exist"),
        ([], [], InputError, "no block is named"),
    ],
)
def test_what_does_not_exist_is_refused(folder, blocks, roots, error, message):
    files = _files(folder)
    with pytest.raises(error, match=message):
        remove(folder, blocks, roots)
    assert _files(folder) == files


def test_what_is_removed_already_is_refused(folder):
    remove(folder, BLOCKS)
    files = _files(folder)
    with pytest.raises(InputError, match="nothing to remove: what was named has been removed"):
        remove(folder, [(2, 4)])
    assert _files(folder) == files


@pytest.mark.parametrize("kind", ["hard", "symbolic"])
def test_a_file_that_is_another_bank_s_too_is_refused(folder, tmp_path, kind):
    name = "level-2-00001-of-00003.safetensors"
    if kind == "hard":
        os.link(folder / name, tmp_path / "other")
    else:
        shutil.move(folder / name, folder / "blob")
        (folder / name).symlink_to(folder / "blob")
    files = _files(folder)
    with pytest.raises(FormatError, match=f"{name}: (is a link|has several names).*cp -rL"):
        remove(folder, [(2, 4)])
    assert _files(folder) == files
    remove(folder, [(2, 0)])  # of another file


def test_a_file_that_cannot_be_written_in_place_is_refused(folder, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(journal, "open_to_overwrite", refused)
    files = _files(folder)
    with pytest.raises(FormatError, match="cannot be overwritten \\(Permission denied\\)"):
        remove(folder, [(2, 4)])
    assert _files(folder) == files


def test_a_damaged_file_is_refused(folder):
    path = folder / "level-2-00001-of-00003.safetensors"
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    files = _files(folder)
    with pytest.raises(FormatError, match="is not what manifest.json says"):
        remove(folder, [(2, 4)])
    assert _files(folder) == files


# ---- killed ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_each_step_leaves_the_old_bank_or_the_new_one(folder, step):
    blocks, after = _blocks(folder), STEPS.index(step) >= 2
    expected = _without(blocks) if after else blocks
    with _Old(folder) as old:
        command = [sys.executable, "-m", "tests.bank.removing", str(folder), step]
        assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
        gone = STEPS.index(step) >= 4
        assert old.blocks() == (_without(blocks) if gone else blocks)
        files = _files(folder)
        assert _blocks(folder) == expected
        with MemoryBank.open(folder) as bank:
            assert bank.removed == (GONE if after else frozenset())
            unfinished = bank.inspect()["removal_unfinished"]
            assert unfinished == (step in ("apply", "overwrite", "rename"))
        assert _files(folder) == files  # reading writes nothing
        assert finish(folder) == unfinished
        with BankEdit(folder):  # who comes next brings it to its end
            pass
        assert old.blocks() == expected
    assert not _hidden(folder) and _blocks(folder) == expected
    assert _whole(folder) == write_manifest(folder).revision


class Killed(BaseException):
    pass


@pytest.mark.parametrize("count", range(4))
def test_a_kill_between_two_writes_in_place(folder, monkeypatch, count):
    """Four blocks, two of which lie side by side: three ranges in three files."""
    blocks, pwrite, done = _blocks(folder), os.pwrite, []

    def written(fd, data, at):
        if len(done) == count:
            raise Killed
        done.append(at)
        return pwrite(fd, data, at)

    with _Old(folder) as old:
        monkeypatch.setattr(journal.os, "pwrite", written)
        if count < 3:
            with pytest.raises(Killed):
                remove(folder, BLOCKS)
        else:
            remove(folder, BLOCKS)
        monkeypatch.undo()
        assert _blocks(folder) == _without(blocks)
        assert finish(folder) == (count < 3)
        assert old.blocks() == _without(blocks)
    _whole(folder)


@pytest.mark.parametrize("count", range(6))
def test_a_kill_between_two_renames_overwrites_no_new_file(folder, monkeypatch, count):
    """A new file has the name already: it is not written in place, even with zeros."""
    blocks, replace, done = _blocks(folder), os.replace, []

    def replaced(source, target):
        if Path(source).name.startswith(journal.PREFIX) and Path(target).name[0] != ".":
            if len(done) == count:
                raise Killed
            done.append(target)
        replace(source, target)

    monkeypatch.setattr(journal.os, "replace", replaced)
    with pytest.raises(Killed):
        remove(folder, BLOCKS)
    monkeypatch.undo()
    opened, original = [], journal.open_to_overwrite
    monkeypatch.setattr(
        journal, "open_to_overwrite", lambda path: opened.append(path) or original(path)
    )
    assert _blocks(folder) == _without(blocks)
    with BankEdit(folder):
        pass
    assert not {str(path) for path in opened} & {str(target) for target in done}
    _whole(folder)


def test_the_disk_has_the_zeros_before_a_file_is_given_up(folder, monkeypatch):
    events, pwrite, replace = [], os.pwrite, os.replace

    def written(fd, data, at):
        events.append(("write", os.fstat(fd).st_ino))
        return pwrite(fd, data, at)

    def replaced(source, target):
        if Path(source).name.startswith(journal.PREFIX) and Path(target).name[0] != ".":
            events.append(("rename", target.name))
        replace(source, target)

    names = ("1-00000-of-00001", "2-00000-of-00003", "2-00001-of-00003")
    old = [(folder / f"level-{name}.safetensors").stat().st_ino for name in names]
    monkeypatch.setattr(os, "pwrite", written)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(("sync", os.fstat(fd).st_ino)))
    remove(folder, BLOCKS)
    first = next(i for i, (what, _) in enumerate(events) if what == "rename")
    for inode in old:
        places = [i for i, event in enumerate(events) if event == ("write", inode)]
        assert places and places[-1] < events.index(("sync", inode)) < first


def test_a_disk_that_fails_leaves_the_removal_to_be_finished(folder, monkeypatch):
    def failing(fd, data, at):
        raise OSError(5, "Input/output error")

    blocks = _blocks(folder)
    with _Old(folder) as old:
        monkeypatch.setattr(journal.os, "pwrite", failing)
        with pytest.raises(FormatError, match="cannot be brought to its end \\(Input/output error"):
            remove(folder, BLOCKS)
        monkeypatch.undo()
        assert old.blocks() == blocks and _blocks(folder) == _without(blocks)
        assert finish(folder) and old.blocks() == _without(blocks)
