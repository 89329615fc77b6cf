"""Each bad input that a bank may meet, one by one: a clear line, and nothing lost.

``test_bank_fuzz`` throws thousands of others at it. Where a user would meet one on the command
line, it is tried there too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from mlx_hiermem.bank.layout import shards
from mlx_hiermem.bank.manifest import write_manifest
from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.bank.stored import StoredLayout
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import ConfigError, FormatError
from tests.bank.attacking import bank_commands, command, open_refused, refused, verify
from tests.bank.mutations import redo_checksums, reseal, split

ROOT = Path(__file__).parents[2]
LEVEL1 = "level-1-00000-of-00001.safetensors"
FIRST, SECOND = (f"level-2-0000{number}-of-00002.safetensors" for number in (0, 1))
FILES = ["config.json", "manifest.json", "generic.safetensors", "checksums.safetensors", LEVEL1]
FILES += [SECOND, "blocked.json"]


@pytest.fixture(autouse=True)
def no_hang():
    """A read that waits for ever (of a FIFO) fails after a minute."""

    def late(*_):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def bank(even_bank):
    return even_bank


def _swap(one, other):
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


# ---- files in the wrong place ----------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((LEVEL1, FIRST), f"{LEVEL1}: its metadata says level '2', its name '1'"),
        ((FIRST, SECOND), f"{FIRST}: its metadata says first_cluster '2', its name '0'"),
    ],
)
def test_swapped_shards(bank, capsys, names, message, sealed):
    _swap(*(bank.folder / name for name in names))
    if sealed:
        reseal(bank.folder, list(names))
    open_refused(bank.folder, message)
    bank_commands(capsys, bank.folder, message)


def test_swapped_shards_whose_headers_and_manifest_were_mended(bank, capsys):
    (header, _), (other, _) = (split((bank.folder / n).read_bytes()) for n in (LEVEL1, FIRST))
    _swap(bank.folder / LEVEL1, bank.folder / FIRST)
    for name, text in ((LEVEL1, header), (FIRST, other)):
        _, numbers = split((bank.folder / name).read_bytes())
        data = len(text).to_bytes(8, "little") + text + numbers
        (bank.folder / name).write_bytes(data)
    reseal(bank.folder, [LEVEL1, FIRST])
    message = "block [01] of level [12] was altered: its sha256 is not that of checksums.saf"
    verify(bank.folder, message)
    bank_commands(capsys, bank.folder, message, "verify")
    open_refused(bank.folder, message, check_blocks=True)  # level 1 is read at once
    with MemoryBank.open(bank.folder, check_blocks=True, tiers="disk") as opened:
        with refused(bank.folder, message):
            opened.fetch((0, 0))
        opened.generic()  # and the bank can be used on


def test_shard_of_another_bank(bank, capsys, tmp_path, make):
    other = make.bank(tmp_path / "other", bank.config, seed=5)
    shutil.copyfile(other.folder / SECOND, bank.folder / SECOND)
    # Sizes and headers are the same: opening does not read the blocks.
    verify(bank.folder, f"{SECOND}: altered: sha256 is")
    bank_commands(capsys, bank.folder, f"{SECOND}: altered", "verify")
    with MemoryBank.open(bank.folder, check_blocks=True) as opened:
        opened.fetch((0, 1))
        with refused(bank.folder, "memory: block 3 of level 2 was altered"):
            opened.fetch((1, 3))
        opened.fetch((0, 0))
        opened.block(2, 3)
        opened.fetch((1, 3))  # a blocked block is not read


def test_check_blocks_on_the_command_line(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    memory = folder / "memory"
    for path in memory.glob("level-2-*"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        data[4096] ^= 1  # of its first block
        path.write_bytes(data)
    for number in range(9):  # wherever the text would lead
        arguments = ["--path", f"{number // 3},{number}", "--max-tokens", "1", "--prompt", "gold"]
        if number % 3 == 0:
            message = f"block {number} of level 2 was altered"
            generate = ("generate", "--model", str(folder), "--check-blocks", *arguments)
            command(capsys, folder, message, *generate)


@pytest.mark.parametrize("same_config", [True, False])
def test_manifest_of_another_revision(bank, capsys, tmp_path, make, same_config):
    config = bank.config if same_config else make.config((2, 2), hidden=16)
    other = make.bank(tmp_path / "other", config, seed=5)
    (other.folder / "blocked.json").write_text('{"blocked": [[1, 1]]}\n')
    write_manifest(other.folder)
    shutil.copyfile(other.folder / "manifest.json", bank.folder / "manifest.json")
    message = "altered: sha256 is|changed: .* manifest.json says|truncated: .* manifest.json says"
    open_refused(bank.folder, message)
    bank_commands(capsys, bank.folder, message)


def test_two_names_for_one_file(bank):
    (bank.folder / SECOND).unlink()
    os.link(bank.folder / FIRST, bank.folder / SECOND)
    reseal(bank.folder, [SECOND])
    open_refused(bank.folder, f"{SECOND}: its metadata says first_cluster '0', its name '2'")
    (bank.folder / SECOND).unlink()
    (bank.folder / SECOND).symlink_to(FIRST)
    open_refused(bank.folder, f"{SECOND}: its metadata says first_cluster '0', its name '2'")


# ---- headers and numbers that lie ------------------------------------------------------


@pytest.mark.parametrize("name", [LEVEL1, SECOND, "generic.safetensors", "checksums.safetensors"])
@pytest.mark.parametrize("length", [0, 1, 8, -1, 1, 2**31, 2**63, 2**64 - 8, 2**64 - 1])
def test_header_that_lies_about_its_length(bank, capsys, name, length):
    data = (bank.folder / name).read_bytes()
    if length in (1, -1):  # almost right
        length += int.from_bytes(data[:8], "little")
    (bank.folder / name).write_bytes(length.to_bytes(8, "little") + data[8:])
    reseal(bank.folder, [name])
    open_refused(bank.folder, rf"{name}: ", check_blocks=True)
    bank_commands(capsys, bank.folder, rf"{name}: ", "verify")


@pytest.mark.parametrize("shape", [[2**63, 384], [2**63 - 1, 384], [2, 2**63], [2**32, 2**31]])
@pytest.mark.parametrize("name", [SECOND, "checksums.safetensors"])
def test_header_that_claims_2_to_the_63(bank, capsys, name, shape):
    header, numbers = split((bank.folder / name).read_bytes())
    table = json.loads(header)
    entry = table["blocks" if name == SECOND else "level2"]
    entry["shape"], entry["data_offsets"] = shape, [0, min(2**64 - 1, 2 * shape[0] * shape[1])]
    text = json.dumps(table).encode()
    (bank.folder / name).write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    reseal(bank.folder, [name])
    open_refused(bank.folder, f"{name}: ", check_blocks=True)
    bank_commands(capsys, bank.folder, f"{name}: ", "verify")


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": [2**63, 2]},
        {"ranks": [2, 2**31 - 1]},
        {"ranks": [2, 10**4000]},
        {"ranks": [1] * 70, "levels": 70},
        {"ranks": [2] + [0] * 100_000, "levels": 100_001},
        {"branching": 2**63},
        {"branching": 2**31 - 1},
        {"branching": 2**30},
        {"branching": 10**4000},
        {"levels": 2**63},
        {"layers": [2**63]},
        {"layers": [0, 2**31 - 1]},
        {"shape": {"num_hidden_layers": 2**63}},
        {"shape": {"num_hidden_layers": 10**9}},
        {"shape": {"hidden_size": 2**63}},
        {"shape": {"hidden_size": 10**4000}},
        {"shape": {"hidden_size": 10**4000, "head_dim": None}},
        {"shape": {"hidden_size": "32", "head_dim": None}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_config_that_claims_2_to_the_63(bank, capsys, change):
    values = json.loads((bank.folder / "config.json").read_text())
    values["base_anchor"]["shape"] |= change.pop("shape", {})
    (bank.folder / "config.json").write_text(json.dumps({**values, **change}))
    reseal(bank.folder, ["config.json"])
    message = r"config\.json"
    with pytest.raises((ConfigError, FormatError)) as error:
        MemoryBank.open(bank.folder)
    open_refused(bank.folder, message, type(error.value))
    bank_commands(capsys, bank.folder, message)


def _poke(config, folder, level, cluster, part, value):
    """Put ``value`` (bytes) at the start of a part of a block, and make all checksums agree."""
    layout = StoredLayout(config)
    strip = next(strip for strip in layout.strips if strip.part == part)
    where = strip.start * layout.ranks[level][1]
    if cluster is None:
        name, rows = "generic.safetensors", [layout.block_bytes(one) for one in layout.ranks]
        row = list(layout.ranks).index(level)
    else:
        shard = next(s for s in shards(config, level) if 0 <= cluster - s.first < s.rows)
        name, rows, row = (
            shard.name,
            [layout.block_bytes(level)] * shard.rows,
            cluster - shard.first,
        )
    data = bytearray((folder / name).read_bytes())
    starts = np.cumsum([len(data) - sum(rows), *rows]).tolist()
    data[starts[row] + where : starts[row] + where + len(value)] = value
    (folder / name).write_bytes(data)
    reseal(folder, [name])
    blocks = [bytes(data[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    redo_checksums(folder, name, blocks)


NOT_FINITE = [
    ("bfloat16", None, 0, b"\xc0\x7f"),
    ("bfloat16", None, 0, b"\x80\xff"),
    ("float32", None, 0, np.float32("nan").tobytes()),
    ("float32", None, 0, np.float32("-inf").tobytes()),
    ("float16", None, 0, np.float16("nan").tobytes()),
    ("float16", None, 0, np.float16("inf").tobytes()),
    ("bfloat16", "affine", 1, b"\xc0\x7f"),
    ("bfloat16", "affine", 2, b"\x80\x7f"),
    ("float32", "affine", 1, np.float32("inf").tobytes()),
    ("bfloat16", "mxfp4", 1, b"\xff"),
    ("bfloat16", "nvfp4", 1, b"\x7f"),
    ("bfloat16", "nvfp4", 1, b"\xff"),
    ("bfloat16", "mxfp8", 1, b"\xff"),
    ("bfloat16", "mxfp8", 0, b"\x7f"),
]


@pytest.mark.parametrize(("dtype", "mode", "part", "value"), NOT_FINITE)
@pytest.mark.parametrize("cluster", [2, None])
def test_blocks_that_are_not_finite(tmp_path, make, capsys, dtype, mode, part, value, cluster):
    folder = tmp_path / "memory"
    made = make.bank(folder, make.config((2, 1), dtype=dtype, hidden=32))
    if mode is not None:
        folder = tmp_path / "packed"
        quantize_bank(made.folder, folder, 8 if mode == "mxfp8" else 4, mode)
        with MemoryBank.open(folder) as opened:
            made.config = opened.config
    _poke(made.config, folder, 2, cluster, part, value)
    what = "the generic memory's block" if cluster is None else "block 2"
    message = f"{folder.name}: {what} of level 2 holds NaN or infinite numbers"
    verify(folder, message)
    bank_commands(capsys, folder, message, "verify")
    with MemoryBank.open(folder, check_blocks=True) as opened:
        opened.fetch((0, 0))
        with refused(folder, message):
            opened.generic() if cluster is None else opened.fetch((1, 2))
        opened.fetch((0, 1))
    if mode is None:
        with refused(folder, "holds NaN or infinite numbers"):
            quantize_bank(folder, tmp_path / "again", 4)


def test_quantize_of_nan_leaves_nothing(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    config = MemoryConfig.load(folder / "memory" / "config.json")
    _poke(config, folder / "memory", 2, 8, 0, np.float32("nan").tobytes())
    arguments = ["bank", "quantize", "--model", str(folder), "--mlx-path", str(tmp_path / "out")]
    command(capsys, folder, "of level 2 holds NaN or infinite numbers", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    arguments[-1] = str(folder)
    command(capsys, folder, "exists already", *arguments)


# ---- what is not a file of the folder --------------------------------------------------


def _outside(path, outside):
    path.symlink_to(outside)


def _chain(path, outside):
    (path.parent / "one").symlink_to(outside)
    (path.parent / "two").symlink_to("one")
    path.symlink_to("two")


def _loop(path, outside):
    (path.parent / "loop").symlink_to(path.name)
    path.symlink_to("loop")


def _folder_link(path, outside):
    (path.parent / "away").symlink_to(outside.parent)
    path.symlink_to(Path("away") / outside.name)


def _socket(path, outside):
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path has at most about a hundred characters
        server.bind(path.name)
        os.chdir(here)


NO_FILES = {
    "link out": (_outside, "is a link to .*, outside of the folder"),
    "chain of links out": (_chain, "is a link to .*, outside of the folder"),
    "link through a folder": (_folder_link, "is a link to .*, outside of the folder"),
    "loop": (_loop, "cannot be read"),
    "zeros": (lambda path, _: path.symlink_to("/dev/zero"), "is a link to /dev/zero, outside"),
    "fifo": (lambda path, _: os.mkfifo(path), "is not a regular file"),
    "socket": (_socket, "is not a regular file"),
    "folder": (lambda path, _: path.mkdir(), "is not a regular file"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", [*FILES, ".edit.json"])
def test_what_is_not_a_file_of_the_folder(bank, capsys, tmp_path, name, kind):
    make_it, message = NO_FILES[kind]
    outside = tmp_path / "elsewhere" / "outside"
    outside.parent.mkdir()
    if name == ".edit.json":
        outside.write_text('{"files": ["manifest.json"]}')
    else:
        (bank.folder / name).rename(outside)
    make_it(bank.folder / name, outside)
    open_refused(bank.folder, rf"{name}: {message}")
    bank_commands(capsys, bank.folder, message, "verify")


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_not_a_file_in_the_folder_of_a_level(bank, capsys, tmp_path, kind):
    make_it, message = NO_FILES[kind]
    disk, outside = tmp_path / "disk", tmp_path / "elsewhere" / "outside"
    disk.mkdir()
    outside.parent.mkdir()
    for name in (FIRST, SECOND):
        (bank.folder / name).rename(disk / name)
    with MemoryBank.open(bank.folder, folders={2: disk}) as opened:
        opened.fetch((1, 3))
    (disk / SECOND).rename(outside)
    make_it(disk / SECOND, outside)
    open_refused(bank.folder, f"disk/{SECOND}: {message}", folders={2: disk})
    options = ["--level-folder", f"2={disk}"]
    command(capsys, disk, message, "bank", "inspect", "--bank", str(bank.folder), *options)


def test_a_tree_that_is_a_link_out(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    tree = folder / "memory" / "tree.safetensors"
    tree.rename(tmp_path / "tree")
    tree.symlink_to(tmp_path / "tree")
    generate = ["generate", "--model", str(folder), "--prompt", "gold"]
    command(capsys, folder, "tree.safetensors: is a link to .*, outside", *generate)
