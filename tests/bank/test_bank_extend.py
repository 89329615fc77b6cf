"""Added memories in the files of a bank: what is there stays, and it is all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_hiermem.bank import extend
from mlx_hiermem.bank.dtypes import from_storage, to_storage
from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.layout import expected_files, level_of, shards
from mlx_hiermem.bank.manifest import read_manifest
from mlx_hiermem.bank.parts import Part
from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.config import Added, MemoryConfig
from mlx_hiermem.errors import ConfigError, FormatError, InputError, PathError
from mlx_hiermem.routing.names import ClusterNames
from mlx_hiermem.routing.tree import AddedTree, ClusterTree

ROOT = Path(__file__).parents[2]
STEPS = ["write", "journal", "apply", "rename"]
K, P = 3, 3
_OPEN: list[BlockReader] = []


def read(folder) -> BlockReader:
    """The bank, open until the test ends."""
    _OPEN.append(BlockReader(folder))
    return _OPEN[-1]


@pytest.fixture(autouse=True)
def closed():
    yield
    while _OPEN:
        _OPEN.pop().close()


@pytest.fixture(scope="module")
def made(tmp_path_factory, make):
    """A bank of three levels with tree, names and one blocked block."""
    folder = tmp_path_factory.mktemp("made") / "memory"
    folder.mkdir()
    rng = np.random.default_rng(0)
    levels = [rng.standard_normal((K**level, 4)).astype(np.float32) for level in (1, 2, 3)]
    ClusterTree(levels, {"type": "bert"}).save(folder / "tree.safetensors")
    ClusterNames([[f"base {i}" for i in range(K**level)] for level in (1, 2)]).save(folder)
    make.bank(folder, make.config((4, 2, 1), K))
    with BankEdit(folder) as edit:
        edit.set_blocked([(2, 4)])
    return folder


@pytest.fixture
def folder(tmp_path, made):
    return Path(shutil.copytree(made, tmp_path / "memory"))


def _files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def _blocks(config, name, seed):
    """Stored blocks of an added memory: level -> (rows, stored size)."""
    rng = np.random.default_rng(seed)
    roots = config.added_roots()[name]
    return {
        level: to_storage(
            rng.standard_normal(
                (len(roots) * K ** (level - 1), config.block_size(level)), np.float32
            ),
            config.dtype,
        )
        for level in config.memory_levels
    }


def _tree(folder, roots, seed):
    rng = np.random.default_rng(seed)
    levels = [rng.standard_normal((roots * K**level, 4)).astype(np.float32) for level in range(P)]
    tree = ClusterTree.load(folder / "tree.safetensors")
    return tree.with_added([AddedTree(levels)]).added_bytes(0)


def _name(name, roots):
    def names(data):
        table = json.loads(data)
        for level, found in enumerate(table.values()):
            found += [f"{name} {i}" for i in range(roots * K**level)]
        return (json.dumps(table) + "\n").encode()

    return names


def add(folder, name, roots=1, seed=1, **more):
    """Add made-up blocks; returns them."""
    config = read(folder).config
    config = config.with_added([*config.added, Added(name, roots)])
    blocks = _blocks(config, name, seed)
    # Pieces of any size.
    extend.add(
        folder, name, roots, lambda level: np.array_split(blocks[level], 2),
        _tree(folder, roots, seed), _name(name, roots), **more,
    )  # fmt: skip
    return blocks


def _check_blocks(reader, name, blocks):
    roots = reader.config.added_roots()[name]
    for level, rows in blocks.items():
        first = roots.start * K ** (level - 1)
        for number, row in enumerate(rows):
            np.testing.assert_array_equal(reader.stored(level, first + number), row)


def test_what_is_there_stays_and_what_is_new_is_read(folder):
    before, old = _files(folder), read(folder)
    acme = add(folder, "acme", 2)
    beta = add(folder, "beta", 1, seed=2)
    after = _files(folder)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"config.json", "manifest.json", "checksums.safetensors", "names.json"}
    assert set(after) - set(before) == {
        name for name in expected_files(read(folder).config) if name not in before
    }
    assert {"level-1-acme-00000-of-00001.safetensors", "tree-beta.safetensors"} <= set(after)

    reader = read(folder)
    assert reader.config.format_version == 2 and reader.config.roots == K + 3
    assert [reader.config.clusters(level) for level in (1, 2, 3)] == [6, 18, 54]
    for level in (1, 2, 3):
        for cluster in range(K**level):
            np.testing.assert_array_equal(reader.stored(level, cluster), old.stored(level, cluster))
    _check_blocks(reader, "acme", acme)
    _check_blocks(reader, "beta", beta)
    assert reader.blocked == {(2, 4)}
    with MemoryBank.open(folder, check_blocks=True) as bank:
        bank.verify()
        assert bank.inspect()["added"] == [
            {"name": "acme", "roots": 2, "first": 3},
            {"name": "beta", "roots": 1, "first": 5},
        ]
    tree = ClusterTree.load(folder / "tree.safetensors")
    for one in reader.config.added:
        tree = tree.load_added(folder / f"tree-{one.name}.safetensors", one.roots)
    assert tree.roots == 6
    names = ClusterNames.load(folder)
    names.check(K, P, 6)
    assert names.of(1, 5) == "beta 0" and names.of(2, 3 * 3 + 1) == "acme 1"


@pytest.mark.parametrize("tier", ["resident", "cached", "disk"])
def test_a_path_of_an_added_memory_is_fetched_from_every_tier(folder, tier):
    blocks = add(folder, "acme", 2)
    path = (4, 4 * 3 + 1, (4 * 3 + 1) * 3 + 2)
    with MemoryBank.open(folder, tiers=tier, memory_budget=1 << 20) as bank:
        assert bank.prefetch(path).wait()
        for _ in range(2):
            found = bank.fetch(path)
            assert [one.cluster for one in found.report.blocks] == list(path)
            found.release()
        bank.block(2, path[1])
        assert bank.fetch(path).report.blocks[1].source == "blocked"
        with pytest.raises(PathError, match="0 to 4"):
            bank.fetch((5, 15, 45))
    assert len(blocks[3]) == 18


def test_a_part_of_the_bank_has_the_files_of_its_subtrees(folder):
    add(folder, "acme", 2)
    config = read(folder).config
    files = Part.of(None, [4]).files(config)
    levels = [name for name in files if level_of(name) is not None]
    assert levels == [
        "level-1-00000-of-00001.safetensors",
        "level-1-acme-00000-of-00001.safetensors",
        "level-2-acme-00001-of-00002.safetensors",
        "level-3-acme-00001-of-00002.safetensors",
    ]
    for name in expected_files(config):
        if name not in files:
            (folder / name).unlink()
    with MemoryBank.open(folder, part=Part.of(None, [4])) as bank:
        sources = [one.source for one in bank.fetch((4, 12, 36)).report.blocks]
        assert "absent" not in sources
        assert bank.fetch((0, 0, 0)).report.blocks[2].source == "absent"


def test_a_bank_with_added_memories_is_quantised_like_any(tmp_path, make):
    folder = tmp_path / "memory"
    config = make.config((4, 2), K, hidden=32)
    folder.mkdir()
    rng = np.random.default_rng(0)
    levels = [rng.standard_normal((K**level, 4)).astype(np.float32) for level in (1, 2)]
    ClusterTree(levels).save(folder / "tree.safetensors")
    make.bank(folder, config)
    new = config.with_added([Added("acme", 2)])
    blocks = _blocks(new, "acme", 1)
    part = [levels[0][:2], levels[1][:6]]
    tree = ClusterTree(levels).with_added([AddedTree(part)]).added_bytes(0)
    extend.add(folder, "acme", 2, lambda level: [blocks[level]], tree)
    quantize_bank(folder, tmp_path / "packed", 8)
    with MemoryBank.open(tmp_path / "packed") as bank:
        bank.verify()
        assert bank.config.added == (Added("acme", 2),)
        assert bank.fetch((4, 14)).report.blocks[1].bytes == bank.config.block_bytes(2)
    files = read_manifest(tmp_path / "packed").files
    assert "tree-acme.safetensors" in files and "level-2-acme-00001-of-00002.safetensors" in files


def test_an_edit_of_a_bank_with_added_memories_keeps_its_version(folder):
    add(folder, "acme")
    with BankEdit(folder) as edit:
        edit.set_blocked([(1, 3), (3, 35)])
    table = json.loads((folder / "manifest.json").read_text())
    assert table["format_version"] == 2
    assert read(folder).blocked == {(1, 3), (3, 35)}


def test_the_reader_in_the_document_reads_added_blocks_too(folder):
    blocks = add(folder, "acme", 2)
    text = (ROOT / "docs" / "format.md").read_text()
    space: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), space)
    for level, rows in blocks.items():
        first = 3 * K ** (level - 1)
        for number, row in enumerate(rows):
            found = space["read_block"](folder, level, first + number)
            np.testing.assert_array_equal(found.reshape(-1), from_storage(row, "bfloat16"))
    for key in read(folder).config.to_dict():
        assert f"`{key}`" in text
    for name in ("level-{l}-{name}-", "tree-{name}.safetensors", "`roots`", "`radius`"):
        assert name in text


# ---- taking one off --------------------------------------------------------------------


def test_dropping_what_was_added_last_gives_the_old_bank_to_the_byte(folder):
    before = _files(folder)
    add(folder, "acme", 2)
    extend.drop(folder, "acme")
    after = _files(folder)
    # Only its form may differ: names.json is the test's own here.
    assert {name for name in before if before[name] != after[name]} <= {
        "names.json",
        "manifest.json",
    }
    assert set(after) == set(before)
    assert ClusterNames.load(folder).levels[0] == ("base 0", "base 1", "base 2")


def test_dropping_one_moves_the_others_up(folder):
    add(folder, "acme", 2)
    beta = add(folder, "beta", 1, seed=2)
    with BankEdit(folder) as edit:
        edit.set_blocked([(2, 4), (2, 3 * 3), (3, 5 * 9 + 1), (1, 5)])
        edit.remove_blocks([(2, 5 * 3 + 1), (2, 3 * 3 + 1)])
    beta[2] = beta[2].copy()
    beta[2][1] = 0
    tree = (folder / "tree-beta.safetensors").read_bytes()
    extend.drop(folder, "acme")
    reader = read(folder)
    assert reader.config.added == (Added("beta", 1),)
    _check_blocks(reader, "beta", beta)
    assert reader.blocked == {(2, 4), (3, 3 * 9 + 1), (1, 3)}
    assert reader.blocked.removed == {(2, 3 * 3 + 1)}
    assert ClusterNames.load(folder).of(1, 3) == "beta 0"
    assert (folder / "tree-beta.safetensors").read_bytes() == tree
    assert not list(folder.glob("*acme*"))
    with MemoryBank.open(folder, check_blocks=True) as bank:
        bank.verify()
    with pytest.raises(InputError, match="no added memory acme; it has beta"):
        extend.drop(folder, "acme")


# ---- all or nothing --------------------------------------------------------------------


def main(folder: str, action: str, kill_at: str) -> None:
    """Add or drop in a process of its own, which is killed at a step."""

    def step(name: str) -> None:
        if name == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if action == "add":
        add(Path(folder), "beta", 1, seed=2, step=step)
    else:
        extend.drop(folder, "acme", step=step)


@pytest.mark.parametrize("action", ["add", "drop"])
@pytest.mark.parametrize("at", STEPS)
def test_a_kill_leaves_the_old_bank_or_the_new_one(folder, action, at):
    acme = add(folder, "acme", 1)
    add(folder, "gamma", 1, seed=3) if action == "drop" else None
    old = read_manifest(folder).revision
    code = (
        f"from tests.bank.test_bank_extend import main; main({str(folder)!r}, {action!r}, {at!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    with MemoryBank.open(folder) as bank:
        new = bank.revision != old
        assert new == (at in ("apply", "rename"))
        names = [one.name for one in bank.config.added]
    if action == "add":
        assert names == (["acme", "beta"] if new else ["acme"])
        _check_blocks(read(folder), "acme", acme)
    else:
        assert names == (["gamma"] if new else ["acme", "gamma"])
    with BankEdit(folder) as edit:  # who edits next brings it to its end
        edit.set_blocked([])
    with MemoryBank.open(folder, check_blocks=True) as bank:
        bank.verify()
    add(folder, "delta", 1, seed=4)  # and sweeps up what was left
    listed = {*read_manifest(folder).files, "manifest.json"}
    assert {path.name for path in folder.iterdir()} == listed


def test_a_failure_while_it_writes_leaves_nothing(folder):
    before = _files(folder)
    config = read(folder).config.with_added([Added("acme", 1)])
    blocks = _blocks(config, "acme", 1)
    wrong = {
        "no more rows": lambda level: [blocks[level][:-1]],
        r"\(48,\)": lambda level: [blocks[1]],
        "float32": lambda level: [blocks[level].astype(np.float32)],
    }
    for found, rows in wrong.items():
        with pytest.raises(FormatError, match=found):
            extend.add(folder, "acme", 1, rows, b"")
        assert _files(folder) == before


def test_bad_names_and_banks_are_refused(folder, tmp_path, make, monkeypatch):
    add(folder, "acme")
    before = _files(folder)
    config, blocks = read(folder).config, iter(())
    with pytest.raises(InputError, match="acme already"):
        extend.add(folder, "acme", 1, lambda level: blocks, b"")
    for name in ("", "A", "a b", "a/b", "x" * 33, "ä"):
        with pytest.raises(ConfigError, match="a-z, 0-9 and -"):
            extend.check_new(folder, config, name)
    for roots in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="roots"):
            Added("x", roots)
    monkeypatch.setattr(extend.os, "access", lambda *_: False)
    with pytest.raises(FormatError, match="cannot be written"):
        add(folder, "beta")
    monkeypatch.undo()
    monkeypatch.setattr(extend.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(FormatError, match="9 are free"):
        add(folder, "beta")
    monkeypatch.undo()
    assert _files(folder) == before
    bare = make.bank(tmp_path / "bare" / "memory")
    with pytest.raises(InputError, match="no tree"):
        extend.check_new(bare.folder, bare.config, "acme")


# ---- the config ------------------------------------------------------------------------


def test_a_config_without_added_memories_is_written_as_before(make):
    config = make.config((4, 2), 3)
    assert "added" not in config.to_dict() and config.to_dict()["format_version"] == 1
    more = config.with_added([Added("acme", 2)])
    table = json.loads(json.dumps(more.to_dict()))
    assert table["added"] == [{"name": "acme", "roots": 2}] and table["format_version"] == 2
    assert MemoryConfig.from_dict(table) == more
    assert more.with_added([]) == config
    assert more.added_roots() == {"acme": range(3, 5)}
    with pytest.raises(ConfigError, match="format_version is 1, but with 1 added"):
        replace(more, format_version=1)


@pytest.mark.parametrize(
    ("added", "found"),
    [
        ("acme", "expected a list"),
        ([{"name": "acme"}], "objects with name and roots"),
        ([{"name": "acme", "roots": 1}] * 2, "may be there once"),
        ([{"name": "acme", "roots": 2**40}], "roots"),
        ([{"name": "../x", "roots": 1}], "a-z"),
        ([7], "objects"),
    ],
)
def test_added_memories_that_cannot_be_are_refused(make, added, found):
    with pytest.raises(ConfigError, match=found):
        MemoryConfig.from_dict(
            {**make.config((4, 2), 3).to_dict(), "added": added} | {"format_version": 2}
        )


def test_files_cover_all_clusters_once(make):
    config = make.config((4, 2, 1), 3).with_added([Added("a", 2), Added("00000-of-00001", 1)])
    for level in (1, 2, 3):
        found = shards(config, level)
        clusters = [c for shard in found for c in range(shard.first, shard.first + shard.rows)]
        assert clusters == list(range(config.clusters(level)))
    names = expected_files(config)
    assert len(set(names)) == len(names)
    assert all(level_of(name) is not None for name in names if name.startswith("level-"))
