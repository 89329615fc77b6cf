"""Which files a bank has, and how they are written."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mlx_hiermem.bank import files, layout, writer
from mlx_hiermem.bank.checksums import CHECKSUMS
from mlx_hiermem.bank.dtypes import to_storage
from mlx_hiermem.bank.layout import expected_files, shards
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.errors import ConfigError, FormatError

ANCHOR_160M = {
    "num_hidden_layers": 35,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "head_dim": 32,
}


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_shards_of_the_papers_160m_bank(make):
    config = make.config((256, 64, 16, 0), 16)
    config = type(config)(ranks=(256, 64, 16, 0), base_anchor={"shape": ANCHOR_160M})
    assert [s.name for s in shards(config, 1)] == ["level-1-00000-of-00001.safetensors"]
    assert [(s.first, s.rows) for s in shards(config, 2)] == [(16 * i, 16) for i in range(16)]
    assert [(s.first, s.rows) for s in shards(config, 3)] == [(256 * i, 256) for i in range(16)]
    assert shards(config, 4) == ()
    assert len(expected_files(config)) == 2 + 1 + 16 + 16


@settings(deadline=None)
@given(
    branching=st.integers(2, 5),
    levels=st.integers(1, 4),
    rank=st.integers(1, 3),
    rows_in_a_shard=st.integers(1, 40),
)
def test_shards_cover_each_level_and_stay_in_their_subtree(
    make, branching, levels, rank, rows_in_a_shard
):
    config = make.config((rank,) * levels, branching)
    most = config.block_size(1) * rows_in_a_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MAX_SHARD_SIZE", most)
        parts = {level: shards(config, level) for level in config.memory_levels}
    for level, part in parts.items():
        clusters = [c for s in part for c in range(s.first, s.first + s.rows)]
        assert clusters == list(range(config.clusters(level)))
        assert [s.index for s in part] == list(range(len(part)))
        assert {s.count for s in part} == {len(part)}
        assert all(0 < s.rows * config.block_size(level) <= most for s in part)
        subtree = branching ** (level - 1)
        if level > 1:
            assert all(s.first // subtree == (s.first + s.rows - 1) // subtree for s in part)
            assert len(part) % branching == 0


def test_sizes_that_no_file_can_hold_are_refused(make):
    with pytest.raises(ConfigError, match="a shard holds at most 2147483647"):
        shards(make.config((2**20,), 2, hidden=2048), 1)
    with pytest.raises(ConfigError, match="would have 100000 shards"):
        shards(make.config((1, 1), 100_000), 2)


def test_a_shard_cut_further_is_read_back(tmp_path, make, monkeypatch):
    config = make.config((2, 1, 1), 3)
    monkeypatch.setattr(layout, "MAX_SHARD_SIZE", 2 * config.block_size(1))
    written = make.bank(tmp_path, config)
    assert len(shards(config, 3)) == 3 * 3
    with MemoryBank.open(tmp_path) as bank:
        for leaf in range(27):
            blocks = bank.fetch((leaf // 9, leaf // 3, leaf)).blocks
            np.testing.assert_array_equal(
                np.array(blocks[2].view(mx.uint16)), written.stored[3][leaf]
            )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_files_are_plain_safetensors(tmp_path, make, dtype):
    config = make.config((2, 1), 2, dtype)
    written = make.bank(tmp_path, config)
    path = tmp_path / "level-2-00001-of-00002.safetensors"
    arrays, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx", "level": "2", "first_cluster": "2"}
    assert set(arrays) == {"blocks"}
    assert arrays["blocks"].dtype == getattr(mx, dtype)
    kind = mx.uint32 if dtype == "float32" else mx.uint16
    expected = written.stored[2][2:4].view(np.uint32 if dtype == "float32" else np.uint16)
    np.testing.assert_array_equal(np.array(arrays["blocks"].view(kind)), expected)
    with safe_open(path, "numpy") as file:
        assert list(file.keys()) == ["blocks"]
        assert file.get_slice("blocks").get_shape() == [2, config.block_size(2)]
    data = path.read_bytes()
    assert (8 + int.from_bytes(data[:8], "little")) % 4096 == 0
    generic = mx.load(str(tmp_path / "generic.safetensors"))["generic"]
    assert generic.shape == (config.fetch_size(),)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 27), max_size=8), stored=st.booleans())
def test_a_stream_of_any_chunks_writes_the_same_bank(make, tmp_path_factory, cuts, stored):
    config = make.config((1, 0, 1), 3)
    folder = tmp_path_factory.mktemp("bank")
    rows = make.rows(config)
    revision = write_bank(folder / "whole", config, rows, make.generic(config))
    source = to_storage(rows[3], "bfloat16") if stored else rows[3]
    stream = (chunk for chunk in np.split(source, sorted(cuts)))
    levels = {1: rows[1], 3: stream}
    assert write_bank(folder / "stream", config, levels, make.generic(config)) == revision
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_CHUNK_BYTES", 5 * 4 * config.block_size(3))  # not a shard's rows
        assert write_bank(folder / "again", config, rows, make.generic(config)) == revision


def test_writing_holds_a_few_chunks_only(tmp_path, make):
    config = make.config((1, 64), 16, "float32", hidden=64)  # level 2: 25 MB
    rows = make.rows(make.config((1,), 16, "float32", hidden=64))
    chunk = np.ones((1, config.block_size(2)), np.float32)
    stream = (chunk * number for number in range(256))
    generic = make.generic(config)
    tracemalloc.start()
    write_bank(tmp_path, config, {1: rows[1], 2: stream}, generic)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 256 * chunk.nbytes > 25e6
    assert peak < 2e6


def test_manifest_lists_what_is_there_and_the_revision_follows(tmp_path, make):
    (tmp_path / "encoder").mkdir(parents=True)
    (tmp_path / "encoder" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tree.safetensors").write_bytes(b"tree")
    (tmp_path / ".DS_Store").write_bytes(b"hidden")
    written = make.bank(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    others = {CHECKSUMS, "tree.safetensors", "encoder/model.safetensors"}
    expected = {*expected_files(written.config), *others}
    assert set(manifest["files"]) == expected
    lines = ""
    for name in sorted(expected):
        data = (tmp_path / name).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        assert manifest["files"][name] == {"bytes": len(data), "sha256": sha256}
        lines += f"{sha256}  {name}\n"
    assert manifest["revision"] == hashlib.sha256(lines.encode()).hexdigest() == written.revision
    assert json.loads((tmp_path / "config.json").read_text())["ranks"] == [3, 2]


def test_each_file_is_synced_then_renamed_and_the_manifest_is_last(tmp_path, make, monkeypatch):
    steps = []
    replace, fsync = os.replace, os.fsync

    def synced(fd):
        steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def renamed(source, target):
        steps.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", renamed)
    written = make.bank(tmp_path)
    assert steps.pop(0) == "folder"  # an older manifest would be gone by now
    assert steps[::3] == ["file"] * (len(steps) // 3)
    assert steps[2::3] == ["folder"] * (len(steps) // 3)
    assert set(steps[1::3]) == {*expected_files(written.config), CHECKSUMS, "manifest.json"}
    assert steps[-2] == "manifest.json"


def test_a_write_that_breaks_off_leaves_no_bank(tmp_path, make):
    config = make.config((2, 1), 3)
    make.bank(tmp_path, config)  # an older bank is there
    rows = make.rows(config, seed=5)

    def broken():
        yield rows[2][:4]
        raise KeyboardInterrupt

    before = (tmp_path / "level-2-00001-of-00003.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_bank(tmp_path, config, {1: rows[1], 2: broken()}, make.generic(config))
    assert "manifest.json" not in _names(tmp_path)
    assert not [name for name in _names(tmp_path) if name.endswith(".partial")]
    # The shard that was being written has not touched the file of its name.
    assert (tmp_path / "level-2-00001-of-00003.safetensors").read_bytes() == before
    with pytest.raises(FormatError, match="manifest.json: no such file"):
        MemoryBank.open(tmp_path)
    make.bank(tmp_path, config)
    MemoryBank.open(tmp_path).close()


def test_a_first_write_that_breaks_off_leaves_whole_files_only(tmp_path, make):
    config = make.config((2, 1), 3)
    rows = make.rows(config)

    def broken():
        yield rows[2][:4]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_bank(tmp_path, config, {1: rows[1], 2: broken()}, make.generic(config))
    assert _names(tmp_path) == [
        "level-1-00000-of-00001.safetensors",
        "level-2-00000-of-00003.safetensors",
    ]


def test_a_full_disk_is_one_line(tmp_path, make, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FormatError, match="cannot be written .No space left on device.") as error:
        make.bank(tmp_path)
    assert "\n" not in str(error.value)
    assert _names(tmp_path) == []


def test_files_of_a_bank_of_another_shape_go(tmp_path, make):
    make.bank(tmp_path, make.config((2, 1), 3))
    (tmp_path / ".level-2-00000-of-00009.safetensors.partial").write_bytes(b"killed")
    (tmp_path / "notes.txt").write_text("stays")
    config = make.config((2, 0), 2)
    make.bank(tmp_path, config)
    expected = {*expected_files(config), CHECKSUMS, "manifest.json", "notes.txt"}
    assert set(_names(tmp_path)) == expected


def _wrong(make, kind):
    config = make.config()
    rows, generic = make.rows(config), make.generic(config)
    if kind == "levels":
        del rows[2]
    elif kind == "array":
        rows[2] = rows[2][:3]
    elif kind == "few":
        rows[2] = iter([rows[2][:3]])
    elif kind == "many":
        rows[2] = iter([rows[2], rows[2][:1]])
    elif kind == "width":
        rows[2] = iter([rows[2][:, :-1]])
    elif kind == "flat":
        rows[2] = iter([rows[2][0]])
    elif kind == "dtype":
        rows[2] = rows[2].astype(np.float64)
    elif kind == "generic":
        generic = generic[:-1]
    return config, rows, generic


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("levels", r"levels \[1\], but the config has memory at levels \[1, 2\]"),
        ("array", r"level 2 is given as \(3, 48\), expected \(4, 48\)"),
        ("few", r"level-2-00001-of-00002.safetensors: given 1 rows, expected 2"),
        ("many", r"level 2: given more rows than its 4 clusters"),
        ("width", r"level-2-00000-of-00002.safetensors: given \(2, 47\) as rows"),
        ("flat", r"level 2: given \(48,\), expected arrays"),
        ("dtype", r"float64 cannot be stored as bfloat16"),
        ("generic", r"generic memory is given as \(119,\), expected \(120,\)"),
    ],
)
def test_arrays_that_contradict_the_config_are_refused(tmp_path, make, kind, message):
    config, rows, generic = _wrong(make, kind)
    with pytest.raises(FormatError, match=message) as error:
        write_bank(tmp_path / "memory", config, rows, generic)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "memory" / "manifest.json").exists()


@pytest.mark.parametrize("target", ["../secret", "inside"])
def test_a_link_is_no_part_of_a_bank(tmp_path, make, target):
    folder = tmp_path / "memory"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "inside").write_text("x")
    (folder / "tree.safetensors").symlink_to(target)
    with pytest.raises(FormatError, match="tree.safetensors: is a link; put the file itself"):
        make.bank(folder)
    assert not (folder / "manifest.json").exists()
