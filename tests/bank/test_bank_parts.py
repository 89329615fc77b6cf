"""A bank opened in part, levels in other folders, and blocks that are checked when first read."""

from __future__ import annotations

import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.bank.layout import expected_files
from mlx_hiermem.bank.manifest import write_manifest
from mlx_hiermem.bank.parts import Part
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.errors import ConfigError, FormatError, PathError

SHARD = "level-2-00001-of-00003.safetensors"


@pytest.fixture
def deep(tmp_path, make):
    """A bank of three levels with 3, 9 and 27 clusters, float32."""
    return make.bank(tmp_path / "memory", make.config((4, 2, 1), 3, "float32"))


def _path(leaf):
    return leaf // 9, leaf // 3, leaf


def _keep(folder, part, config):
    """Remove the level files that ``part`` does not need."""
    for name in set(expected_files(config)) - set(part.files(config)):
        (folder / name).unlink()


@given(
    levels=st.none() | st.sets(st.sampled_from([1, 2, 3])),
    subtrees=st.none() | st.sets(st.integers(0, 2)),
)
def test_the_files_of_a_part_are_those_of_its_blocks(make, levels, subtrees):
    config = make.config((4, 2, 1), 3)
    part = Part.of(levels, subtrees)
    wanted = {"config.json", "generic.safetensors"}
    for level in (1, 2, 3):
        for cluster in range(3**level):
            inside = levels is None or level in levels
            if level > 1 and subtrees is not None:
                inside = inside and cluster // 3 ** (level - 1) in subtrees
            assert part.has(config, level, cluster) == inside
            if inside:
                shard = cluster // 3 ** (level - 1)
                wanted.add(
                    "level-1-00000-of-00001.safetensors"
                    if level == 1
                    else f"level-{level}-{shard:05}-of-00003.safetensors"
                )
    assert set(part.files(config)) == wanted
    assert part.whole == (levels is None and subtrees is None)


@pytest.mark.parametrize(
    "part",
    [Part((1,)), Part((1, 2)), Part((2, 3), (1,)), Part(None, (0, 2)), Part((3,), ()), Part()],
    ids=str,
)
@pytest.mark.parametrize("tiers", ["disk", "resident", "cached"])
def test_absent_blocks_are_zeros_and_the_others_are_there(deep, part, tiers):
    _keep(deep.folder, part, deep.config)
    with MemoryBank.open(deep.folder, part=part, tiers=tiers) as bank:
        for leaf in range(27):
            fetched = bank.fetch(_path(leaf))
            for level, block, told in zip(
                (1, 2, 3), fetched.blocks, fetched.report.blocks, strict=True
            ):
                cluster = _path(leaf)[level - 1]
                here = part.has(deep.config, level, cluster)
                expected = deep.stored[level][cluster] if here else 0 * deep.stored[level][0]
                np.testing.assert_array_equal(np.array(block), expected)
                assert (told.source == "absent") == (not here)
                assert told.bytes == (deep.config.block_bytes(level) if here else 0)
            fetched.release()
        assert {file["file"] for file in bank.verify()} == {
            "checksums.safetensors",
            *part.files(deep.config),
        }
        rows = bank.inspect()["levels"]
        for row in rows:
            clusters = [c for c in range(row["clusters"]) if part.has(deep.config, row["level"], c)]
            assert row["present_bytes"] == len(clusters) * row["block_bytes"]
    if not part.whole and part.files(deep.config) != Part().files(deep.config):
        with pytest.raises(FormatError, match="no such file; the bank is not complete"):
            MemoryBank.open(deep.folder)


def test_a_part_that_is_not_of_the_bank(deep):
    for part, says in (
        (Part((4,)), "level '4' has no memory"),
        (Part(None, (3,)), "cluster '3' of level 1 does not exist; its clusters are 0 to 2"),
        (Part(None, (-1,)), "cluster '-1' of level 1"),
    ):
        with pytest.raises(PathError, match=says):
            MemoryBank.open(deep.folder, part=part)


# ---- other folders ---------------------------------------------------------------------


@pytest.fixture
def elsewhere(deep, tmp_path):
    """The files of level 3, on "another disk"."""
    folder = tmp_path / "external"
    folder.mkdir()
    for path in deep.folder.glob("level-3-*"):
        shutil.move(path, folder)
    return folder


def test_a_level_may_lie_in_another_folder(deep, elsewhere):
    with MemoryBank.open(deep.folder, folders={3: elsewhere}, tiers="disk") as bank:
        for leaf in (0, 13, 26):
            blocks = bank.fetch(_path(leaf)).blocks
            np.testing.assert_array_equal(np.array(blocks[2]), deep.stored[3][leaf])
        assert len(bank.verify()) == 2 + 1 + 1 + 3 + 3
        assert [row["folder"] for row in bank.inspect()["levels"]] == [
            str(deep.folder),
            str(deep.folder),
            str(elsewhere),
        ]


def test_another_folder_that_is_wrong(deep, elsewhere):
    with pytest.raises(FormatError, match="level-3-00000-of-00003.safetensors: no such file"):
        MemoryBank.open(deep.folder)
    with pytest.raises(FormatError, match="nowhere: no such folder"):
        MemoryBank.open(deep.folder, folders={3: elsewhere / "nowhere"})
    with pytest.raises(ConfigError, match="folder of level 4: the bank has memory at levels 1, 2"):
        MemoryBank.open(deep.folder, folders={3: elsewhere, 4: elsewhere})
    path = elsewhere / "level-3-00000-of-00003.safetensors"
    outside = elsewhere.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(FormatError, match="is a link to .* outside of the folder"):
        MemoryBank.open(deep.folder, folders={3: elsewhere})


def test_the_other_folder_goes_away_and_comes_back(deep, elsewhere):
    with MemoryBank.open(deep.folder, folders={3: elsewhere}, tiers="disk") as bank:
        for file in bank._reader._files[3]:  # no read of that disk works any more
            fd = os.open(elsewhere, os.O_RDONLY)
            os.dup2(fd, file.fd)
            os.close(fd)
        gone = elsewhere.rename(elsewhere.with_name("gone"))
        with pytest.raises(FormatError, match="external/level-3-00001.*: cannot be read"):
            bank.fetch(_path(13))
        bank.block(3, 13)
        assert bank.fetch(_path(13)).report.blocks[2].blocked
        bank.unblock(3, 13)
        gone.rename(elsewhere)
        np.testing.assert_array_equal(np.array(bank.fetch(_path(13)).blocks[2]), deep.stored[3][13])


# ---- checked blocks --------------------------------------------------------------------


def _flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("tiers", ["disk", "cached"])
def test_a_block_that_was_altered_is_found_when_it_is_first_read(deep, tiers):
    _flip(deep.folder / SHARD, -1)  # cluster 5, the last one of the subtree
    with MemoryBank.open(deep.folder, check_blocks=True, tiers=tiers) as bank:
        for leaf in (0, 9, 12):
            bank.fetch(_path(leaf))
        for _ in range(2):
            with pytest.raises(FormatError, match="block 5 of level 2 was altered: its sha256"):
                bank.fetch(_path(15))
        with pytest.raises(FormatError, match="block 5 of level 2 was altered"):
            bank.fetch_many([_path(0), _path(15)])
        bank.block(2, 5)
        bank.fetch(_path(15))
    with MemoryBank.open(deep.folder, tiers=tiers) as bank:
        bank.fetch(_path(15))  # nobody asked
    with pytest.raises(FormatError, match="block 5 of level 2 was altered"):
        MemoryBank.open(deep.folder, check_blocks=True, tiers={2: "resident"})


def test_each_block_is_checked_once(deep, monkeypatch):
    from mlx_hiermem.bank import fill

    checked = []
    digest = fill.digest
    monkeypatch.setattr(fill, "digest", lambda pieces: checked.append(1) or digest(pieces))
    with MemoryBank.open(deep.folder, check_blocks=True, tiers="disk") as bank:
        for leaf in (0, 1, 26, 0, 1, 26):
            bank.fetch(_path(leaf))
        assert len(checked) == 2 + 2 + 3
        bank.generic()
        bank.generic()
        assert len(checked) == 10


def test_checks_need_checksums(deep):
    (deep.folder / "checksums.safetensors").unlink()
    write_manifest(deep.folder)
    with MemoryBank.open(deep.folder) as bank:
        bank.fetch(_path(0))
        bank.verify()
    with pytest.raises(FormatError, match="has no checksums of its blocks"):
        MemoryBank.open(deep.folder, check_blocks=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_that_are_not_finite_are_found(tmp_path, make, value, dtype):
    from mlx_hiermem.bank.writer import write_bank

    config = make.config((2, 1), 2, dtype)
    rows = make.rows(config)
    rows[2][3, 7] = value
    write_bank(tmp_path, config, rows, make.generic(config))
    says = "block 3 of level 2 holds NaN or infinite numbers"
    with MemoryBank.open(tmp_path) as bank:
        assert not mx.isfinite(bank.fetch((1, 3)).joined).all()
        with pytest.raises(FormatError, match=says):
            bank.verify()
    with MemoryBank.open(tmp_path, check_blocks=True) as bank:
        bank.fetch((1, 2))
        with pytest.raises(FormatError, match=says):
            bank.fetch((1, 3))


def test_a_manifest_of_another_revision_is_found_at_once(deep, tmp_path, make):
    other = make.bank(tmp_path / "other", deep.config, seed=1)
    shutil.copy(other.folder / "manifest.json", deep.folder)
    with pytest.raises(FormatError, match="checksums.safetensors: altered: .* another revision"):
        MemoryBank.open(deep.folder)
