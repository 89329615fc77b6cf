"""Quantised banks: what is fetched, how few bytes are read, and what is written."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mlx_hiermem.bank import quantize, slots
from mlx_hiermem.bank.dtypes import from_storage
from mlx_hiermem.bank.parts import Part
from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.config import DTYPE_BYTES
from mlx_hiermem.errors import FormatError
from mlx_hiermem.quantization import MODES, Quantization
from tests.bank.reading import counted

EVERY = [
    Quantization(bits, group_size, mode)
    for mode, (known, sizes) in MODES.items()
    for bits in known
    for group_size in sizes
]


def _packed(folder, written, packing):
    """Quantise a bank of ``make``; what it was, what it is, and where."""
    folder = Path(folder)
    report = quantize_bank(
        written.folder, folder / "packed", packing.bits, packing.mode, packing.group_size
    )
    assert report["quantization"] == packing.to_dict()
    return SimpleNamespace(
        folder=folder / "packed", written=written, packing=packing, report=report
    )


def _again(rows, dtype, packing):
    """One matrix (rank, width) float32, packed and unpacked by MLX alone: (rank * width,)."""
    matrix, options = mx.array(rows).astype(dtype), packing.to_dict()
    # Twice the rows: MLX on a CPU cannot pack an odd number of nvfp4's groups.
    parts = mx.quantize(mx.concatenate([matrix, matrix]), **options)
    return mx.dequantize(*parts, **options, dtype=dtype)[: len(rows)].reshape(-1)


def _expected(packed, path):
    """What a fetch has to give, by the formula: matrix by matrix the packed rows of all levels.

    ``path`` None: the generic memory; an id None: zeros.
    """
    config, dtype = packed.written.config, getattr(mx, packed.written.config.dtype)
    width = config.anchor_shape().hidden_size
    blocks, start = {}, 0
    for level in config.memory_levels:
        size = config.block_size(level)
        if path is None:
            stored = packed.written.generic[start : start + size]
        else:
            stored = packed.written.stored[level][path[level - 1] or 0]
        blocks[level] = from_storage(stored, config.dtype)
        start += size
    joined = []
    for number in range(3 * len(config.memory_layers())):
        for level, block in blocks.items():
            size = config.ranks[level - 1] * width
            rows = block[number * size : (number + 1) * size].reshape(-1, width)
            if path is not None and path[level - 1] is None:
                joined.append(mx.zeros((size,), dtype))
            else:
                joined.append(_again(rows, dtype, packed.packing))
    return mx.concatenate(joined)


def _path(config, leaf):
    k, p = config.branching, config.levels
    return [leaf // k ** (p - level) for level in range(1, p + 1)]


def _bits(array):
    return np.array(array.view(mx.uint32 if array.dtype.size == 4 else mx.uint16))


def _same(memory, packed, path):
    expected = _expected(packed, path)
    joined = getattr(memory, "joined", memory)
    assert joined.dtype == expected.dtype
    np.testing.assert_array_equal(_bits(joined), _bits(expected))


@pytest.fixture
def deep(tmp_path, make):
    """A bank of three levels with 3, 9 and 27 clusters, packed into 4 bits, on disk."""
    written = make.bank(tmp_path / "memory", make.config((4, 2, 1), 3, hidden=64))
    return _packed(tmp_path, written, Quantization(4, 64))


DISK = "disk"


# ---- what is fetched -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("packing", EVERY, ids=str)
def test_a_fetch_is_what_mlx_unpacks(tmp_path, make, packing, dtype):
    config = make.config((3, 0, 2), 2, dtype, hidden=2 * packing.group_size)
    packed = _packed(tmp_path, make.bank(tmp_path / "memory", config), packing)
    with MemoryBank.open(packed.folder) as bank:
        assert bank.config.packing == packing
        for leaf in (0, 5, 7):
            _same(bank.fetch(_path(config, leaf)), packed, _path(config, leaf))
        _same(bank.generic(), packed, None)


@st.composite
def _shapes(draw):
    packing = draw(st.sampled_from(EVERY))
    ranks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any))
    shape = {
        "ranks": ranks,
        "branching": draw(st.integers(2, 3)),
        "dtype": draw(st.sampled_from(list(DTYPE_BYTES))),
        "hidden": packing.group_size * draw(st.integers(1, 3)),
        "layers": draw(st.integers(1, 3)),
    }
    return packing, shape


@settings(max_examples=25)
@given(case=_shapes(), seed=st.integers(0, 2**31), shares=st.booleans(), data=st.data())
def test_any_shape_is_fetched_by_the_formula_and_reads_its_bytes(make, case, seed, shares, data):
    packing, shape = case
    config = make.config(**shape)
    leaves = st.lists(st.integers(0, config.clusters(config.levels) - 1), min_size=1, max_size=4)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        packed = _packed(folder, make.bank(Path(folder, "memory"), config, seed), packing)
        if not shares:
            patch.setattr(slots.Slot, "_check_shares", lambda slot: False)
        with MemoryBank.open(packed.folder, tiers=DISK) as bank:
            last = dict.fromkeys(config.memory_levels)
            for leaf in data.draw(leaves):
                path = _path(config, leaf)
                with counted() as reads:
                    memory = bank.fetch(path)
                here = {level: path[level - 1] for level in config.memory_levels}
                read = [level for level, cluster in here.items() if last[level] != cluster]
                assert reads == [bank.config.block_bytes(level) for level in read]
                last = here
                _same(memory, packed, path)


@pytest.mark.parametrize("width, layers, rank", [(16, 1, 1), (48, 1, 1), (16, 3, 3), (48, 1, 5)])
def test_an_odd_number_of_groups_of_16(tmp_path, make, width, layers, rank):
    """MLX on a CPU (0.32) packs and unpacks nvfp4 by two groups at a time."""
    config = make.config((rank,), 2, hidden=width, layers=layers)
    packed = _packed(tmp_path, make.bank(tmp_path / "memory", config), Quantization(4, 16, "nvfp4"))
    with MemoryBank.open(packed.folder) as bank:
        for leaf in (0, 1):
            _same(bank.fetch((leaf,)), packed, (leaf,))


@pytest.mark.parametrize(
    "width, bits, expected",
    [(16, 4, "nvfp4/16"), (48, 4, "nvfp4/16"), (32, 4, "4-bit affine/32"),
     (64, 4, "4-bit affine/64"), (64, 8, "8-bit affine/64")],
)  # fmt: skip
def test_the_width_decides_how(tmp_path, make, width, bits, expected):
    config = make.config((2, 2), hidden=width)
    written = make.bank(tmp_path / "memory", config)
    packing = Quantization.of(
        quantize_bank(written.folder, tmp_path / "packed", bits)["quantization"]
    )
    assert str(packing) == expected
    packed = SimpleNamespace(written=written, packing=packing)
    with MemoryBank.open(tmp_path / "packed") as bank:
        _same(bank.fetch((1, 3)), packed, (1, 3))


def test_fewer_bytes_are_read_by_the_formula(tmp_path, make):
    config = make.config((4, 2), 2, hidden=128, layers=3)
    written = make.bank(tmp_path / "memory", config)
    for bits, mode, row in (
        (8, None, 128 + 2 * 2 * 2),  # 128 numbers, 2 groups with scale and bias in bfloat16
        (4, None, 64 + 2 * 2 * 2),
        (3, None, 48 + 2 * 2 * 2),
        (4, "mxfp4", 64 + 4),  # 4 groups with a scale of one byte
        (4, "nvfp4", 64 + 8),
        (8, "mxfp8", 128 + 4),
    ):
        folder = tmp_path / f"{bits}-{mode}"
        report = quantize_bank(written.folder, folder, bits, mode)
        sizes = [3 * 3 * rank * row for rank in (4, 2)]
        with MemoryBank.open(folder, tiers=DISK) as bank, counted() as reads:
            memory = bank.fetch((1, 2))
            assert reads == sizes == [block.bytes for block in memory.report.blocks]
            assert memory.report.bytes == bank.inspect()["fetch_bytes"] == sum(sizes)
            assert bank.bytes_held == 0
        assert report["bytes"] == 2 * sizes[0] + 4 * sizes[1]
        assert report["bytes_before"] == 2 * config.bank_size()


# ---- everything that a bank does -------------------------------------------------------


def test_slots_are_given_back_at_once_and_nothing_in_use_changes(deep):
    """Numbers of a quantised bank are unpacked into an array of their own; readers outlive it."""
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        waiting = []
        for leaf in range(27):
            path = _path(bank.config, leaf)
            memory = bank.fetch(path)
            assert not memory.lent
            waiting.append((path, memory.joined, memory.joined + 0))  # the second is lazy
        assert bank.slots_made == 1
        for path, memory, lazy in waiting:
            _same(memory, deep, path)
            _same(lazy, deep, path)


def test_only_levels_whose_cluster_changed_are_read(deep):
    with MemoryBank.open(deep.folder, tiers=DISK) as bank, counted() as reads:
        sizes = [bank.config.block_bytes(level) for level in (1, 2, 3)]
        for path, changed in (
            ((0, 0, 0), [1, 2, 3]),
            ((0, 0, 1), [3]),
            ((0, 2, 6), [2, 3]),
            ((0, 2, 6), []),
        ):
            reads.clear()
            memory = bank.fetch(path)
            assert reads == [sizes[level - 1] for level in changed]
            _same(memory, deep, path)


def test_batches_generic_and_prefetch(deep):
    with MemoryBank.open(deep.folder, tiers=DISK) as bank, counted() as reads:
        leaves = (0, 1, 0, 26, 5)
        paths = [_path(bank.config, leaf) for leaf in leaves]
        memories = bank.fetch_many(paths)
        assert len(reads) == len({(level, path[level]) for path in paths for level in range(3)})
        for path, memory in zip(paths, memories, strict=True):
            _same(memory, deep, path)
        assert memories[0].joined is memories[2].joined
        _same(bank.generic(), deep, None)
        reads.clear()
        assert bank.prefetch((1, 3, 10)).wait(10)
        assert len(reads) == 3
        memory = bank.fetch((1, 3, 10))
        assert len(reads) == 3
        assert {block.source for block in memory.report.blocks} == {"prefetched"}
        _same(memory, deep, (1, 3, 10))


def test_blocked_blocks_are_zeros(deep):
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        for blocked in (False, True, False):
            (bank.block if blocked else bank.unblock)(2, 1)
            memory = bank.fetch((0, 1, 4))
            _same(memory, deep, (0, None if blocked else 1, 4))
            assert memory.blocks[1].any().item() != blocked
    with MemoryBank.open(deep.folder, blocked=[(1, 0), (2, 1), (3, 4)]) as bank, counted() as reads:
        assert not bank.fetch((0, 1, 4)).joined.any().item()
        assert not reads


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_blocked_blocks_are_zeros_in_other_modes(tmp_path, make, mode):
    bits = MODES[mode][0][0]
    written = make.bank(tmp_path / "memory", make.config((3, 2), hidden=32))
    packed = _packed(tmp_path, written, Quantization(bits, MODES[mode][1][0], mode))
    with MemoryBank.open(packed.folder, blocked=[(1, 1)]) as bank:
        _same(bank.fetch((1, 2)), packed, (None, 2))


def test_a_part_of_a_bank(deep):
    for name in deep.folder.glob("level-[23]-0000[02]-*"):
        name.unlink()
    with MemoryBank.open(deep.folder, part=Part(subtrees=(1,))) as bank:
        _same(bank.fetch((1, 4, 12)), deep, (1, 4, 12))
        _same(bank.fetch((0, 0, 0)), deep, (0, None, None))
    with MemoryBank.open(deep.folder, part=Part(levels=(2,), subtrees=(1,))) as bank:
        _same(bank.fetch((1, 4, 12)), deep, (None, 4, None))


def test_resident_and_cached_levels_hold_the_fewer_bytes(deep):
    with MemoryBank.open(
        deep.folder, tiers={1: "resident", 2: "cached", 3: "cached"}
    ) as bank, counted() as reads:  # fmt: skip
        level_1, level_2, level_3 = map(bank.config.block_bytes, (1, 2, 3))
        assert bank.bytes_held == 3 * level_1 < deep.written.config.block_bytes(1)
        for sources in (["resident", "disk", "disk"], ["resident", "cached", "cached"]):
            bank._pool.clear()  # so that no slot has kept anything
            memory = bank.fetch((1, 4, 12))
            assert [block.source for block in memory.report.blocks] == sources
            assert reads == [level_2, level_3]
            _same(memory, deep, (1, 4, 12))
        assert bank.bytes_held == 3 * level_1 + level_2 + level_3
    budget = 3 * level_1 + 9 * level_2 + level_3
    with MemoryBank.open(deep.folder, memory_budget=budget) as bank:
        assert bank.resident_levels == (1, 2)
        for leaf in range(27):
            path = _path(bank.config, leaf)
            _same(bank.fetch(path), deep, path)
            assert bank.bytes_held <= budget


def test_blocks_are_checked_when_they_are_first_read(deep):
    with MemoryBank.open(deep.folder, tiers=DISK, check_blocks=True) as bank:
        for leaf in (0, 26):
            _same(bank.fetch(_path(bank.config, leaf)), deep, _path(bank.config, leaf))
        assert bank.verify()
    path = next(deep.folder.glob("level-3-00001-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of cluster 17
    path.write_bytes(data)
    with MemoryBank.open(deep.folder, tiers=DISK, check_blocks=True) as bank:
        _same(bank.fetch((1, 5, 16)), deep, (1, 5, 16))
        with pytest.raises(FormatError, match="block 17 of level 3 was altered"):
            bank.fetch((1, 5, 17))
        with pytest.raises(FormatError, match="level-3-00001.* altered"):
            bank.verify()


def test_where_memory_cannot_be_shared_it_is_copied(deep, monkeypatch):
    monkeypatch.setattr(slots.Slot, "_check_shares", lambda slot: False)
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        for leaf in (0, 1, 26, 0):
            path = _path(bank.config, leaf)
            _same(bank.fetch(path), deep, path)
        assert bank.slots_made == 1


def test_memory_does_not_grow(deep):
    process = psutil.Process()
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:

        def many(count):
            for number in range(count):
                bank.fetch(_path(bank.config, number * 11 % 27))
            return mx.get_active_memory(), process.memory_info().rss

        active, resident = many(400)
        active_after, resident_after = many(2000)
        assert bank.slots_made == 1
    assert active_after == active
    assert resident_after - resident < 5e6


# ---- what is written -------------------------------------------------------------------


def test_the_files_say_what_they_hold(deep):
    config = json.loads((deep.folder / "config.json").read_text())
    before = deep.written.config.to_dict()
    assert config == json.loads(json.dumps({**before, "quantization": deep.packing.to_dict()}))
    row = 32 + 2 + 2
    for name, shape in (
        ("level-1-00000-of-00001.safetensors", [3, 2 * 3 * 4 * row]),
        ("level-3-00002-of-00003.safetensors", [9, 2 * 3 * 1 * row]),
    ):
        with safe_open(deep.folder / name, "numpy") as file:
            blocks = file.get_slice("blocks")
            assert blocks.get_dtype() == "U8" and blocks.get_shape() == shape
    with MemoryBank.open(deep.folder) as bank:
        assert bank.revision == deep.report["revision"] != deep.written.revision
        assert bank.inspect()["quantization"] == deep.packing.to_dict()
        assert bank.inspect()["bank_bytes"] == deep.report["bytes"]


def test_the_error_is_that_of_the_numbers(tmp_path, make):
    config = make.config((3, 2), hidden=64)
    written = make.bank(tmp_path / "memory", config)
    for packing in (Quantization(8, 64), Quantization(2, 32), Quantization(4, 16, "nvfp4")):
        folder = tmp_path / str(packing).replace("/", "-")
        packed = _packed(folder, written, packing)
        exact, again = [], []
        blocks = [block for level in (1, 2) for block in written.stored[level]]
        blocks += np.split(written.generic, [config.block_size(1)])
        for block in blocks:
            rows = from_storage(block, config.dtype).reshape(-1, 64)
            exact.append(rows.reshape(-1))
            again.append(np.array(_again(rows, mx.bfloat16, packing).astype(mx.float32)))
        exact, again = (np.concatenate(one).astype(np.float64) for one in (exact, again))
        expected = np.sqrt(np.mean((exact - again) ** 2) / np.mean(exact**2))
        assert packed.report["error"] == pytest.approx(expected, rel=1e-4)
        assert 0 < expected < {8: 0.01, 4: 0.15, 2: 0.5}[packing.bits]


def test_pieces_and_progress(deep, tmp_path, monkeypatch):
    """In however small pieces it is packed: the same files, and every byte is told of once."""
    told = []
    monkeypatch.setattr(quantize, "_CHUNK_NUMBERS", 4000)
    again = quantize_bank(
        deep.written.folder, tmp_path / "again", 4, progress=lambda *one: told.append(one)
    )
    assert again["revision"] == deep.report["revision"]
    assert len(told) > 5
    assert {total for total, _ in told} == {sum(count for _, count in told)}
    assert told[0][0] == again["bytes_before"]


def test_a_bank_of_zeros_stays_zeros(tmp_path, make):
    """Memories start so; the error has nothing to be compared with."""
    config = make.config((2, 1), hidden=64)
    zeros = {level: 0 * rows for level, rows in make.rows(config).items()}
    write_bank(tmp_path / "memory", config, zeros, 0 * make.generic(config))
    for mode, (bits, sizes) in MODES.items():
        report = quantize_bank(tmp_path / "memory", tmp_path / mode, bits[-1], mode, sizes[0])
        assert report["error"] == 0
        with MemoryBank.open(tmp_path / mode) as bank:
            assert not bank.fetch((1, 3)).joined.any().item()


def test_what_routes_and_what_is_blocked_comes_along(tmp_path, make):
    folder = tmp_path / "memory"
    extra = {
        "tree.safetensors": b"tree",
        "encoder.safetensors": b"numbers",
        "encoder/config.json": b"{}",
        "blocked.json": b'{"blocked": [[1, 0], [2, 3]]}',
    }
    for name, data in extra.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    written = make.bank(folder, make.config((3, 2), hidden=64))
    packed = _packed(tmp_path, written, Quantization(8, 64))
    for name, data in extra.items():
        assert (packed.folder / name).read_bytes() == data
    with MemoryBank.open(packed.folder) as bank:
        assert bank.verify()
        assert bank.blocked == {(1, 0), (2, 3)}
        _same(bank.fetch((0, 1)), packed, (None, 1))
        _same(bank.fetch((1, 3)), packed, (1, None))
        _same(bank.fetch((1, 2)), packed, (1, 2))
