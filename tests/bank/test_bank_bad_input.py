"""Folders that are not a bank as docs/format.md tells it: one line that names the file."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_hiermem.bank.header import build_header
from mlx_hiermem.bank.manifest import read_manifest, write_manifest
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import ConfigError, FormatError, HierMemError

SHARD = "level-2-00001-of-00002.safetensors"


def _refused(folder, message, kind=FormatError):
    with pytest.raises(kind, match=message) as error:
        MemoryBank.open(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def _rewrite(path, dtype="bfloat16", shape=(2, 48), tensor="blocks", metadata=None, rest=None):
    """A file with another header; ``rest`` defaults to as many zeros as the header says."""
    metadata = metadata or {"format": "mlx", "level": "2", "first_cluster": "2"}
    head = build_header(tensor, dtype, shape, metadata)
    size = int(np.prod(shape)) * (4 if dtype == "float32" else 2)
    path.write_bytes(head + (bytes(size) if rest is None else rest))


def _header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_missing_folder(tmp_path):
    _refused(tmp_path / "none", "none: no such folder; expected the memory folder of a model")


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "generic.safetensors", SHARD])
def test_missing_file(bank, name):
    (bank.folder / name).unlink()
    _refused(bank.folder, f"{name}: no such file; .*again")


def test_file_not_listed(bank):
    hidden = bank.folder / f".{SHARD}"
    (bank.folder / SHARD).rename(hidden)
    write_manifest(bank.folder)
    hidden.rename(bank.folder / SHARD)
    _refused(bank.folder, f"manifest.json: does not list {SHARD}, which config.json asks for")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 4096, -1])
def test_truncated_shard(bank, keep):
    path = bank.folder / SHARD
    path.write_bytes(path.read_bytes()[:keep])
    _refused(bank.folder, f"{SHARD}: truncated: ")


def test_truncated_while_open(bank):
    with MemoryBank.open(bank.folder) as opened:
        path = bank.folder / SHARD
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - 10)
        opened.fetch((1, 2))
        with pytest.raises(FormatError, match=f"{SHARD}: truncated: found 86 of the 96 bytes"):
            opened.fetch((1, 3))


def test_longer_shard(bank):
    with open(bank.folder / SHARD, "ab") as file:
        file.write(b"more")
    _refused(bank.folder, f"{SHARD}: too long: ")


@pytest.mark.parametrize("name", ["config.json", "generic.safetensors", SHARD])
@pytest.mark.parametrize("where", [0.3, 0.999])
def test_flipped_bit_is_found_by_verify(bank, name, where):
    with MemoryBank.open(bank.folder) as opened:
        path = bank.folder / name
        data = bytearray(path.read_bytes())
        data[int(where * len(data))] ^= 1
        path.write_bytes(data)
        with pytest.raises(FormatError, match=f"{name}: altered: sha256 is .* says") as error:
            opened.verify()
    assert "\n" not in str(error.value)


def test_verify_names_a_file_that_went_or_shrank(bank):
    (bank.folder / "tree.safetensors").write_bytes(b"centroids")
    write_manifest(bank.folder)
    with MemoryBank.open(bank.folder) as opened:
        (bank.folder / "tree.safetensors").write_bytes(b"centroid")
        with pytest.raises(FormatError, match="tree.safetensors: truncated: 8 bytes, .* says 9"):
            opened.verify()
        (bank.folder / "tree.safetensors").unlink()
        with pytest.raises(FormatError, match="tree.safetensors: no such file"):
            opened.verify()
    _refused(bank.folder, "tree.safetensors: no such file")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 260), value=st.integers(0, 255))
def test_flipped_header_bytes_never_get_past_as_another_error(bank, position, value):
    path = bank.folder / SHARD
    data = path.read_bytes()
    try:
        altered = bytearray(data)
        altered[position] = value
        path.write_bytes(altered)
        try:
            with MemoryBank.open(bank.folder) as opened:
                # Only what does not change the meaning (spaces, the "format") may pass.
                np.testing.assert_array_equal(
                    np.array(opened.fetch((1, 3)).blocks[1].view(_uint16())), bank.stored[2][3]
                )
        except FormatError as error:
            assert SHARD in str(error)
            assert "\n" not in str(error)
    finally:
        path.write_bytes(data)


def _uint16():
    import mlx.core as mx

    return mx.uint16


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["manifest.json", "config.json"]),
    cut=st.integers(0, 2000),
    insert=st.binary(max_size=6),
)
def test_altered_json_never_gets_past_as_another_error(bank, name, cut, insert):
    path = bank.folder / name
    data = path.read_bytes()
    try:
        path.write_bytes(data[:cut] + insert + data[cut + len(insert) :])
        try:
            MemoryBank.open(bank.folder).close()
        except HierMemError as error:
            assert "\n" not in str(error)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "float16"}, "holds float16, but config.json says dtype bfloat16"),
        ({"dtype": "float32"}, "holds float32, but config.json says dtype bfloat16"),
        ({"shape": (2, 24)}, r"shape is \(2, 24\), but config.json .* asks for \(2, 48\)"),
        ({"shape": (4, 48)}, r"shape is \(4, 48\), but config.json .* asks for \(2, 48\)"),
        ({"shape": (96,)}, r"shape is \(96,\), but"),
        ({"tensor": "weights"}, "holds tensors 'weights', expected only 'blocks'"),
        (
            {"metadata": {"level": "2", "first_cluster": "0"}},
            "metadata says first_cluster '0', its name '2'",
        ),
        ({"metadata": {"level": "3"}}, "metadata says level '3', its name '2'"),
        ({"rest": b""}, "truncated: 4096 bytes, its header says 4288"),
    ],
)
def test_header_that_contradicts_config_or_place(bank, kwargs, message):
    _rewrite(bank.folder / SHARD, **kwargs)
    assert SHARD in _refused(bank.folder, message)


def _set(entry, key, value):
    return lambda table: table[entry].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("blocks", "dtype", "I8"), "blocks is 'I8', expected one of BF16, F16, F32, U8"),
        (_set("blocks", "dtype", ["BF16"]), "expected one of BF16"),
        (_set("blocks", "shape", [2, -48]), "not lists of sizes"),
        (_set("blocks", "shape", [2, True]), "not lists of sizes"),
        (_set("blocks", "shape", [1] * 10_000), "not lists of sizes"),
        (_set("blocks", "shape", [2**62, 2**62]), "data_offsets of blocks are"),
        (_set("blocks", "data_offsets", [0, 190]), r"expected \[0, 192\]"),
        (_set("blocks", "data_offsets", [2, 194]), r"expected \[0, 192\]"),
        (_set("blocks", "data_offsets", [0]), "not lists of sizes"),
        (_set("__metadata__", "level", 2), "__metadata__ is not an object of strings"),
        (lambda table: table.update(blocks=[]), "blocks is not an object"),
        (lambda table: table.update(more={}), "expected only 'blocks'"),
        (lambda table: table.pop("__metadata__"), "metadata says level 'None'"),
    ],
)
def test_header_that_contradicts_itself(bank, change, message):
    _header(bank.folder / SHARD, change)
    assert SHARD in _refused(bank.folder, message)


@pytest.mark.parametrize(
    "text",
    [b"[1]", b"null", b"{", b"\xff\xfe", b"[" * 200_000, b""],
)
def test_header_that_is_no_object(bank, text):
    data = len(text).to_bytes(8, "little") + text + bytes(400)
    (bank.folder / SHARD).write_bytes(data)
    _refused(bank.folder, f"{SHARD}: ")


def test_header_that_names_a_tensor_twice(bank):
    data = (bank.folder / SHARD).read_bytes()
    text = data[8:4096].rstrip()
    entry = text[text.index(b'"blocks"') : -1]  # JSON readers differ in which one they take
    text = (text[:-1] + b", " + entry + b"}").ljust(4088)
    (bank.folder / SHARD).write_bytes(data[:8] + text + data[4096:])
    _refused(bank.folder, f"{SHARD}: not a safetensors file: its header is not valid JSON")


def test_header_that_claims_to_be_huge(bank):
    (bank.folder / SHARD).write_bytes((2**63).to_bytes(8, "little") + bytes(4280))
    _refused(bank.folder, f"{SHARD}: not a safetensors file: header of 9223372036854775808 bytes")


def test_shards_that_were_swapped(bank):
    other = bank.folder / "level-2-00000-of-00002.safetensors"
    (bank.folder / SHARD).rename(bank.folder / "x")
    other.rename(bank.folder / SHARD)
    (bank.folder / "x").rename(other)
    _refused(bank.folder, "metadata says first_cluster '2', its name '0'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [3, 1]}, r"asks for \(2, 24\)"),
        ({"ranks": [3, 0]}, "generic.safetensors: shape is"),
        ({"ranks": [3, 2, 1], "levels": 3}, "manifest.json: does not list level-3-"),
        ({"branching": 3}, "does not list level-2-00000-of-00003"),
        ({"dtype": "float16"}, "says dtype float16"),
        ({"layers": [0]}, r"shape is \(2, 72\), but config.json"),
    ],
)
def test_config_that_contradicts_the_files(bank, change, message):
    values = json.loads((bank.folder / "config.json").read_text())
    (bank.folder / "config.json").write_text(json.dumps({**values, **change}))
    _refused(bank.folder, message)


def test_config_that_was_edited_without_effect_on_shapes(bank):
    values = json.loads((bank.folder / "config.json").read_text())
    values["base_anchor"]["name"] = "another"
    (bank.folder / "config.json").write_text(json.dumps(values))
    _refused(bank.folder, "config.json: (truncated|changed): .* manifest.json says")


@pytest.mark.parametrize(
    "change", [{"base_anchor": None}, {"ranks": [2**30, 2]}, {"rank": 3}, {"format_version": 2}]
)
def test_config_that_is_unusable(bank, change):
    values = json.loads((bank.folder / "config.json").read_text())
    (bank.folder / "config.json").write_text(json.dumps({**values, **change}))
    _refused(bank.folder, "config.json: memory config: ", ConfigError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": "0" * 64}, "revision is '0000"),
        ({"format_version": 3}, "format_version is 3, expected 1 or 2; update mlx_hiermem"),
        ({"format_version": 2}, "format_version is 2, but its files are those of 1"),
        ({"files": []}, "files is not an object"),
        ({"more": 1}, "exactly format_version, revision and files"),
        ({"files": {"../secret": {"bytes": 1, "sha256": "0" * 64}}}, "names '../secret'"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "names '/etc/passwd'"),
        ({"files": {"a\nb": {"bytes": 1, "sha256": "0" * 64}}}, "expected a relative name"),
        ({"files": {"x": {"bytes": -1, "sha256": "0" * 64}}}, "the entry of x"),
        ({"files": {"x": {"bytes": 1, "sha256": "0"}}}, "the entry of x"),
    ],
)
def test_manifest_that_is_wrong(bank, change, message):
    path = bank.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    _refused(bank.folder, f"manifest.json: .*{message}")


def test_link_out_of_the_folder(bank, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (bank.folder / SHARD).rename(outside)
    (bank.folder / SHARD).symlink_to(outside)
    _refused(bank.folder, f"{SHARD}: is a link to .*outside of the folder")
    (bank.folder / SHARD).unlink()
    (bank.folder / SHARD).symlink_to(bank.folder / SHARD)
    _refused(bank.folder, f"{SHARD}: cannot be read")
    (bank.folder / SHARD).unlink()
    (bank.folder / SHARD).mkdir()
    _refused(bank.folder, f"{SHARD}: is not a regular file")


def test_folder_that_is_itself_a_link_and_links_inside_are_fine(bank, tmp_path):
    (bank.folder / SHARD).rename(bank.folder / "moved")
    (bank.folder / SHARD).symlink_to("moved")
    link = tmp_path / "link"
    link.symlink_to(bank.folder)
    with MemoryBank.open(link) as opened:
        opened.fetch((1, 3))


def test_snapshot_of_the_hub_cache(bank, tmp_path):
    # The Hub's client keeps files in blobs/ and makes snapshots of links to them.
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / "0123abcd" / "memory"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(bank.folder.iterdir())):
        shutil.copy(path, repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../../blobs/{number}")
    with MemoryBank.open(snapshot) as opened:
        opened.fetch((1, 3))
        assert len(opened.verify()) == 6
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(bank.folder / SHARD)
    _refused(snapshot, "outside of the folder")


def test_manifest_in_another_order_has_the_same_revision(bank):
    path = bank.folder / "manifest.json"
    table = json.loads(path.read_text())
    table["files"] = dict(reversed(table["files"].items()))
    path.write_text(json.dumps(table))
    assert read_manifest(bank.folder).revision == bank.revision


def test_manifest_round_trip(bank):
    manifest = read_manifest(bank.folder)
    assert write_manifest(bank.folder) == manifest
    assert MemoryConfig.load(bank.folder / "config.json") == bank.config
