"""The result of one subtree: its files are the bank's, and damage is named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hiermem.anchors import load_anchor
from mlx_hiermem.bank import layout
from mlx_hiermem.bank.dtypes import to_storage
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import ConfigError, FormatError
from mlx_hiermem.memories import attach
from mlx_hiermem.training.fingerprints import anchor_bytes, anchor_sha256, tree_sha256
from mlx_hiermem.training.subtree import FILE, read_rows, read_subtree, write_subtree
from tests.tiny import write_tiny_anchor

SHAPE = {
    "num_hidden_layers": 1, "hidden_size": 2, "intermediate_size": 4, "num_attention_heads": 1,
    "head_dim": 2,
}  # fmt: skip
FACTS = {
    "anchor_sha256": "a" * 64, "tree_sha256": "b" * 64, "corpus_revision": "c" * 64,
    "settings": {"seed": 1, "clip": float("inf"), "freeze": ("a", "b"), "dtype": None},
}  # fmt: skip


def memory_config(ranks=(2, 1, 3), dtype: str = "float32", branching: int = 3) -> MemoryConfig:
    return MemoryConfig(
        ranks=ranks, branching=branching, dtype=dtype, base_anchor={"name": "x", "shape": SHAPE}
    )


def bank_rows(config: MemoryConfig, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        level: rng.standard_normal((config.clusters(level), config.block_size(level))).astype("f4")
        for level in config.memory_levels
    }


def rows_of(rows: dict[int, np.ndarray], subtree: int, branching: int, chunk: int = 2):
    """level -> the rows of a subtree, in pieces of ``chunk``."""

    def of_level(level: int) -> Iterator[np.ndarray]:
        width = branching ** (level - 1)
        mine = rows[level][subtree * width : (subtree + 1) * width]
        for start in range(0, len(mine), chunk):
            yield mine[start : start + chunk]

    return of_level


def write(folder: Path, config: MemoryConfig, subtree: int = 1, **facts):
    rows = rows_of(bank_rows(config), subtree, config.branching)
    return write_subtree(folder, config, subtree, rows, **{**FACTS, **facts})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("ranks", [(2, 1, 3), (0, 1, 2), (2, 0, 1), (3, 0, 0)])
@pytest.mark.parametrize("pieces", [False, True])
def test_the_deeper_files_are_those_of_the_whole_bank(tmp_path, monkeypatch, dtype, ranks, pieces):
    config = memory_config(ranks, dtype)
    if pieces:  # so that a subtree of level 3 has 9 rows in several shards
        monkeypatch.setattr(layout, "MAX_SHARD_SIZE", 4 * config.block_size(3) or 100)
    rows = bank_rows(config)
    write_bank(tmp_path / "bank", config, rows, np.zeros(config.fetch_size(), np.float32))
    found = []
    for subtree in range(3):
        counted = []
        result = write_subtree(
            tmp_path / str(subtree), config, subtree, rows_of(rows, subtree, 3),
            progress=counted.append, **FACTS,
        )  # fmt: skip
        assert result == read_subtree(tmp_path / str(subtree))
        assert set(os.listdir(result.folder)) == {FILE, *result.files}
        assert sum(counted) == sum(3 ** (level - 1) for level in config.memory_levels)
        for name in result.files:
            result.verify(name)
            if name != "level-1-row.safetensors":
                found.append(name)
                assert (result.folder / name).read_bytes() == (
                    tmp_path / "bank" / name
                ).read_bytes()
        if ranks[0]:
            (part,) = result.files_of(1)
            stored = to_storage(rows[1][subtree : subtree + 1], dtype)
            assert np.array_equal(read_rows(result, part), stored)
            values = mx.load(str(result.folder / part.name))["blocks"]
            assert values.shape == (1, config.block_size(1))
    bank = {path.name for path in (tmp_path / "bank").glob("level-[23]-*")}
    assert sorted(found) == sorted(bank)
    assert not pieces or not ranks[2] or len(bank) > 3 * 2


def test_the_facts_come_back_as_json_holds_them(tmp_path):
    result = write(tmp_path, memory_config())
    assert result.subtree == 1 and result.config == memory_config()
    assert result.settings == {"seed": 1, "clip": "inf", "freeze": ["a", "b"], "dtype": None}
    assert (result.anchor_sha256, result.tree_sha256) == ("a" * 64, "b" * 64)
    assert result.corpus_revision == "c" * 64


def test_storage_arrays_are_taken_as_they_are(tmp_path):
    config = memory_config((1,), "bfloat16")
    bits = np.arange(config.block_size(1), dtype=np.uint16)[None]
    result = write_subtree(tmp_path, config, 0, lambda level: [bits], **FACTS)
    assert np.array_equal(read_rows(result, result.files_of(1)[0]), bits)


@pytest.mark.parametrize("count", [0, 2, 4, 5])
def test_rows_that_do_not_fit_leave_no_result(tmp_path, count):
    config = memory_config((0, 1))
    write(tmp_path, config)
    rows = np.zeros((count, config.block_size(2)), np.float32)
    with pytest.raises(FormatError, match="rows"):
        write_subtree(tmp_path, config, 1, lambda level: [rows], **FACTS)
    assert not (tmp_path / FILE).exists()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(FormatError, match="no such file; the run has not come to its end"):
        read_subtree(tmp_path)


def test_rows_of_a_wrong_width_and_a_wrong_subtree(tmp_path):
    config = memory_config((1,))
    with pytest.raises(FormatError, match=r"given \(1, 5\) as rows"):
        write_subtree(tmp_path, config, 0, lambda level: [np.zeros((1, 5), np.float32)], **FACTS)
    for subtree in (-1, 3):
        with pytest.raises(ConfigError, match=f"subtree {subtree}: expected .* 0 to 2"):
            write(tmp_path, config, subtree)


def test_a_file_of_another_length_or_content_is_named(tmp_path):
    result = write(tmp_path, memory_config())
    name = "level-2-00001-of-00003.safetensors"
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=f"{name}: truncated"):
        read_subtree(tmp_path)
    (tmp_path / name).write_bytes(whole + b"x")
    with pytest.raises(FormatError, match=f"{name}: changed"):
        read_subtree(tmp_path)
    (tmp_path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    read_subtree(tmp_path)
    with pytest.raises(FormatError, match=f"{name}: altered"):
        result.verify(name)
    (tmp_path / name).unlink()
    with pytest.raises(FormatError, match=f"{name}: no such file"):
        read_subtree(tmp_path)


def test_a_file_of_another_subtree_is_noticed(tmp_path):
    config = memory_config()
    write(tmp_path / "a", config, 1)
    write(tmp_path / "b", config, 2)
    row = "level-1-row.safetensors"
    (tmp_path / "a" / row).write_bytes((tmp_path / "b" / row).read_bytes())
    with pytest.raises(FormatError, match="first_cluster '2', its name '1'"):
        read_subtree(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"subtree": 3}, "subtree 3: expected a cluster of level 1"),
        ({"subtree": "1"}, "subtree is '1', expected an integer"),
        ({"subtree": True}, "expected an integer"),
        ({"anchor_sha256": "A" * 64}, "anchor_sha256 is"),
        ({"tree_sha256": None}, "tree_sha256 is 'None'"),
        ({"corpus_revision": 5}, "corpus_revision is '5'"),
        ({"settings": []}, "settings is not an object"),
        ({"memory_config": {}}, "ranks is missing"),
        ({"memory_config": {"ranks": [1]}}, "base_anchor is null"),
        ({"files": {}}, "files does not list exactly the 5 files"),
        ({"files": []}, "files does not list exactly"),
        ({"more": 1}, "missing or unknown: more"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path, monkeypatch, change, words):
    config = memory_config()
    monkeypatch.setattr(layout, "MAX_SHARD_SIZE", 4 * config.block_size(3))
    write(tmp_path, config)
    table = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**table, **change}))
    with pytest.raises(FormatError) as error:
        read_subtree(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff", '{"format_version": 1}'])
def test_a_damaged_table_is_one_line(tmp_path, text):
    write(tmp_path, memory_config())
    (tmp_path / FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=FILE) as error:
        read_subtree(tmp_path)
    assert "\n" not in str(error.value)


def test_an_entry_that_is_none_is_named(tmp_path):
    write(tmp_path, memory_config((1,)))
    table = json.loads((tmp_path / FILE).read_text())
    for entry in (None, {}, {"bytes": -1.5, "sha256": "a" * 64}, {"bytes": 1, "sha256": "x"}):
        table["files"]["level-1-row.safetensors"] = entry
        (tmp_path / FILE).write_text(json.dumps(table))
        with pytest.raises(FormatError, match="the entry of level-1-row.safetensors is not"):
            read_subtree(tmp_path)


# ---- fingerprints ------------------------------------------------------------------------


def test_the_fingerprint_of_an_anchor_is_that_of_its_numbers(tmp_path):
    anchor = write_tiny_anchor(tmp_path, seed=0)
    counted: list[int] = []
    sha256 = anchor_sha256(anchor, counted.append)
    assert sum(counted) == anchor_bytes(anchor) and len(sha256) == 64
    assert anchor_sha256(load_anchor(tmp_path)[0]) == sha256
    assert anchor_sha256(mx.load(str(tmp_path / "model.safetensors"))) == sha256
    shape = {name: getattr(anchor.args, name) for name in SHAPE}
    config = MemoryConfig(ranks=(1,), base_anchor={"name": "x", "shape": shape})
    assert anchor_sha256(attach(anchor, config)) == sha256
    anchor.freeze()
    assert anchor_sha256(anchor) == sha256
    assert anchor_sha256(write_tiny_anchor(tmp_path, seed=1)) != sha256


def test_the_fingerprint_does_not_depend_on_the_width_but_on_everything_else():
    half = {"w": mx.array([[1.5, -2.0]], mx.bfloat16), "v": mx.array([3.0], mx.float16)}
    wide = {name: value.astype(mx.float32) for name, value in reversed(half.items())}
    sha256 = anchor_sha256(half)
    assert anchor_sha256(wide) == sha256
    for other in (
        {**wide, "w": mx.array([[1.5], [-2.0]])},
        {**wide, "w": mx.array([[1.5, 2.0]])},
        {"w": wide["w"], "u": wide["v"]},
        {**wide, "more": mx.array([0.0])},
    ):
        assert anchor_sha256(other) != sha256
    packed = {"w": mx.array([2**24 + 1], mx.uint32)}
    assert anchor_sha256(packed) != anchor_sha256({"w": mx.array([2**24], mx.uint32)})
    assert anchor_sha256({"w": mx.array([1], mx.uint32)}) != anchor_sha256({"w": mx.array([1.0])})


def test_the_fingerprint_of_a_tree_is_that_of_its_file(tmp_path):
    (tmp_path / "tree.safetensors").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert tree_sha256(tmp_path) == expected
