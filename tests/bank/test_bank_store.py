"""Opening a bank and fetching from it."""

from __future__ import annotations

import json
import os
import tempfile

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hiermem.bank.cache import BlockCache
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.bank.tiers import DEFAULT_BYTES, plan_tiers
from mlx_hiermem.errors import BudgetError, FormatError, InputError, PathError


def _bits(array):
    kind = mx.uint32 if array.dtype == mx.float32 else mx.uint16
    return np.array(array.view(kind))


def _stored_bits(stored):
    return stored.view(np.uint32 if stored.dtype.itemsize == 4 else np.uint16)


def _leaves(config):
    for leaf in range(config.clusters(config.levels)):
        yield [
            leaf // config.branching ** (config.levels - level)
            for level in range(1, config.levels + 1)
        ]


@st.composite
def _shapes(draw):
    ranks = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    layers = draw(st.sampled_from([None, (1,)]))
    return {"ranks": ranks, "branching": draw(st.integers(2, 4)), "dtype": dtype, "layers": layers}


@settings(max_examples=40, deadline=None)
@given(shape=_shapes(), seed=st.integers(0, 2**31), budget_factor=st.floats(1, 12) | st.none())
def test_what_is_written_is_fetched_bit_for_bit(make, shape, seed, budget_factor):
    layers = shape.pop("layers")
    config = make.config(**shape)
    if layers:
        config = type(config).from_dict({**config.to_dict(), "layers": layers})
    largest = max(config.block_bytes(level) for level in config.memory_levels)
    budget = None if budget_factor is None else int(largest * budget_factor)
    with tempfile.TemporaryDirectory() as folder:
        written = make.bank(folder, config, seed)
        with MemoryBank.open(folder, memory_budget=budget) as bank:
            assert bank.config == config
            assert bank.revision == written.revision
            for path in _leaves(config):
                fetched = bank.fetch(path)
                assert len(fetched.blocks) == len(config.memory_levels)
                assert bank.bytes_held <= bank.memory_budget
                for level, block, part in zip(
                    config.memory_levels, fetched.blocks, fetched.report.blocks, strict=True
                ):
                    assert block.shape == (config.block_size(level),)
                    assert block.dtype == getattr(mx, config.dtype)
                    expected = written.stored[level][path[level - 1]]
                    np.testing.assert_array_equal(_bits(block), _stored_bits(expected))
                    assert (part.level, part.cluster) == (level, path[level - 1])
                    assert part.bytes == config.block_bytes(level) == block.nbytes
                    assert (part.source == "resident") == (level in bank.resident_levels)
            generic = bank.generic()
            together = np.concatenate([_bits(block) for block in generic.blocks])
            np.testing.assert_array_equal(together, _stored_bits(written.generic))


def test_report(bank):
    with MemoryBank.open(bank.folder, tiers={2: "cached"}) as opened:
        first, again = opened.fetch((1, 2)).report, opened.fetch((1, 2)).report
        generic = opened.generic().report
    assert [block.source for block in first.blocks] == ["resident", "disk"]
    assert [block.source for block in again.blocks] == ["resident", "cached"]
    sizes = [bank.config.block_bytes(1), bank.config.block_bytes(2)]
    assert [block.bytes for block in again.blocks] == sizes
    assert first.bytes == again.bytes == generic.bytes == sum(sizes) == 2 * bank.config.fetch_size()
    assert all(block.ms > 0 for block in first.blocks)
    assert first.ms >= sum(block.ms for block in first.blocks)
    assert [(block.level, block.cluster) for block in generic.blocks] == [(1, None), (2, None)]
    as_json = json.loads(json.dumps(first.to_dict()))
    assert set(as_json) == {"bytes", "ms", "blocks"}
    assert set(as_json["blocks"][0]) == {"level", "cluster", "bytes", "ms", "source", "blocked"}


def test_one_read_per_level_and_none_when_cached(bank, monkeypatch):
    reads = []
    preadv = os.preadv

    def counted(fd, buffers, offset, flags=0):
        reads.append(sum(len(buffer) for buffer in buffers))
        return preadv(fd, buffers, offset, flags)

    with MemoryBank.open(bank.folder, tiers={1: "cached", 2: "cached"}) as opened:
        monkeypatch.setattr(os, "preadv", counted)
        opened.fetch((1, 3))
        assert reads == [bank.config.block_bytes(1), bank.config.block_bytes(2)]
        opened.fetch((1, 3))
        assert len(reads) == 2


def test_the_block_used_longest_ago_is_dropped(bank):
    small = bank.config.block_bytes(2)
    budget = bank.config.block_bytes(1) + 2 * small
    with MemoryBank.open(bank.folder, memory_budget=budget) as opened:
        sources = []
        for leaf in (0, 1, 0, 2, 3, 0):
            sources.append([b.source for b in opened.fetch((leaf // 2, leaf)).report.blocks])
            assert opened.bytes_held <= budget
        assert sources == [
            ["disk", "disk"],
            ["cached", "disk"],
            ["cached", "cached"],
            ["disk", "disk"],  # level 1 is larger than what was there: all but it is dropped
            ["cached", "disk"],
            ["disk", "disk"],
        ]


@settings(deadline=None)
@given(
    budget=st.integers(10, 60),
    uses=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 10)), max_size=60),
)
def test_cache_is_an_lru_under_its_budget(budget, uses):
    sizes = {}
    cache, model = BlockCache(budget), []  # model: keys, the one used last at the end
    for key, size in uses:
        size = sizes.setdefault(key, size)
        if cache.get(key) is None:
            cache.make_room(size)
            assert cache.bytes + size <= budget
            cache.put(key, f"block {key}", size)
            while sum(sizes[k] for k in model) + size > budget:
                model.pop(0)
        else:
            assert cache.get(key) == f"block {key}"
            model.remove(key)
        model.append(key)
        assert cache.bytes == sum(sizes[k] for k in model) <= budget
        assert len(cache) == len(model)
        assert all(k in cache for k in model)


def test_blocked_blocks_are_zeros_and_are_not_read(bank):
    with MemoryBank.open(bank.folder, tiers={2: "cached"}, blocked=[(1, 0)]) as opened:
        before = [np.array(block.view(mx.uint16)) for block in opened.fetch((0, 1)).blocks]
        assert not before[0].any() and before[1].any()
        opened.block(2, np.int64(1))
        assert opened.blocked == frozenset({(1, 0), (2, 1)})
        fetched = opened.fetch((0, 1))
        for block, level in zip(fetched.blocks, (1, 2), strict=True):
            assert block.shape == (bank.config.block_size(level),)
            assert block.dtype == mx.bfloat16
            assert not np.array(block.view(mx.uint16)).any()
        assert fetched.report.bytes == 0
        assert [part.source for part in fetched.report.blocks] == ["blocked", "blocked"]
        assert all(part.blocked and part.bytes == 0 for part in fetched.report.blocks)
        assert opened.bytes_held == bank.config.block_bytes(1) * 2  # the cached one is dropped
        opened.unblock(1, 0)
        opened.unblock(2, 1)
        opened.unblock(2, 0)  # was not blocked
        again = opened.fetch((0, 1))
        np.testing.assert_array_equal(_bits(again.blocks[0]), bank.stored[1][0])
        np.testing.assert_array_equal(_bits(again.blocks[1]), before[1])
        assert opened.blocked == frozenset()
    for wrong in ((1,), 1, (1, 2), "10"):
        with pytest.raises(PathError):
            MemoryBank.open(bank.folder, blocked=[wrong])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((0,), "has 1 ids, expected 3"),
        ((0, 0, 0, 0), "has 4 ids, expected 3"),
        ((2, 0, 0), "cluster '2' of level 1 does not exist; its clusters are 0 to 1"),
        ((0, -1, 0), "cluster '-1' of level 2 does not exist; its clusters are 0 to 3"),
        ((0, 1, 8), "cluster '8' of level 3 does not exist"),
        ((0, 2, 4), "cluster 2 of level 2 is not a child of cluster 0 of level 1; .* 0 to 1"),
        ((1, 2, 6), "cluster 6 of level 3 is not a child of cluster 2 of level 2; .* 4 to 5"),
        ((0, 1, 2.0), "cluster '2.0' of level 3 does not exist"),
        ((0, True, 2), "cluster 'True' of level 2 does not exist"),
        ((0, None, 2), "cluster 'None' of level 2"),
        ("012", "expected 3 cluster ids"),
        (5, "expected 3 cluster ids"),
    ],
)
def test_a_path_outside_of_the_tree_is_refused(tmp_path, make, path, message):
    make.bank(tmp_path, make.config((2, 0, 1), 2))
    with MemoryBank.open(tmp_path) as opened, pytest.raises(PathError, match=message) as error:
        opened.fetch(path)
    assert "\n" not in str(error.value)


def test_paths_may_be_numpy_and_need_the_levels_without_memory(tmp_path, make):
    written = make.bank(tmp_path, make.config((2, 0, 1), 2))
    with MemoryBank.open(tmp_path) as opened:
        fetched = opened.fetch(np.array([1, 2, 5]))
        assert [part.level for part in fetched.report.blocks] == [1, 3]
        json.dumps(fetched.report.to_dict())
        np.testing.assert_array_equal(_bits(fetched.blocks[1]), written.stored[3][5])
        with pytest.raises(PathError, match="level '2' has no memory; .* are 1, 3"):
            opened.block(2, 0)
        with pytest.raises(PathError, match="cluster '8' of level 3 does not exist"):
            opened.block(3, 8)


def test_shallow_levels_are_placed_first(make):
    config = make.config((4, 2, 1), 2, "float32")  # blocks of 384, 192, 96; levels of 768
    block = [config.block_bytes(level) for level in (1, 2, 3)]
    total = [size * 2**level for level, size in enumerate(block, 1)]
    assert block == [384, 192, 96] and total == [768, 768, 768]

    def tiers(budget, by_hand=None):
        return "".join(tier[0] for tier in plan_tiers(config, budget, by_hand).of.values())

    assert tiers(384) == "ccc"
    assert tiers(768 + 191) == "ccc"  # level 1, but not a block of level 2 beside it
    assert tiers(768 + 192) == "rcc"
    assert tiers(2 * 768 + 95) == "rcc"
    assert tiers(2 * 768 + 96) == "rrc"
    assert tiers(3 * 768 - 1) == "rrc"
    assert tiers(3 * 768) == "rrr"
    assert tiers(None) == "rdd"
    assert plan_tiers(config, 2 * 768 + 100).cache == 100
    assert plan_tiers(config, None).budget == 768 and plan_tiers(config, None).cache == 0
    # By hand, and the rest around it.
    assert tiers(768 + 192, {3: "resident"}) == "dcr"
    assert tiers(768 + 384, {3: "resident"}) == "ccr"
    assert tiers(2 * 768 + 96, {2: "disk"}) == "rdr"
    assert tiers(0, dict.fromkeys((1, 2, 3), "disk")) == "ddd"
    assert tiers(None, {1: "cached"}) == "cdd"
    assert plan_tiers(config, None, {1: "cached"}).cache == DEFAULT_BYTES
    assert plan_tiers(config, None, {1: "cached"}).why[1] == "chosen by hand"
    for budget, by_hand in (
        (383, None),
        (0, None),
        (-1, dict.fromkeys((1, 2, 3), "disk")),
        (767, {1: "resident", 2: "disk", 3: "disk"}),
        (768 + 191, {1: "resident", 2: "cached"}),
        (1e9, None),
    ):
        with pytest.raises(BudgetError, match="memory budget: .* give"):
            plan_tiers(config, budget, by_hand)
    with pytest.raises(InputError, match="tier of level 2: 'ram' is none; give one of resident"):
        plan_tiers(config, None, {2: "ram"})
    with pytest.raises(PathError, match="level '4' has no memory"):
        plan_tiers(config, None, {4: "disk"})


@settings(deadline=None)
@given(
    ranks=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    budget=st.integers(0, 5000),
    by_hand=st.dictionaries(st.integers(1, 4), st.sampled_from(["resident", "cached", "disk"])),
)
def test_a_plan_never_exceeds_its_budget(make, ranks, budget, by_hand):
    config = make.config(ranks, 2)
    by_hand = {level: tier for level, tier in by_hand.items() if level in config.memory_levels}
    try:
        plan = plan_tiers(config, budget, by_hand)
    except BudgetError:
        return
    assert list(plan.of) == list(plan.why) == list(config.memory_levels)
    assert by_hand.items() <= plan.of.items()
    resident = sum(config.block_bytes(one) * config.clusters(one) for one in plan.resident)
    assert resident + plan.cache == plan.budget == budget
    cached = [config.block_bytes(one) for one, tier in plan.of.items() if tier == "cached"]
    assert plan.cache >= max(cached, default=0)
    placed = [plan.of[level] == "resident" for level in plan.of if level not in by_hand]
    assert placed == sorted(placed, reverse=True)  # the shallow ones first


def test_without_a_budget_a_large_level_1_stays_on_disk(make):
    small = make.config((1, 1), 16, hidden=64)
    large = make.config((2**15, 1), 16, hidden=64)
    assert plan_tiers(small, None).resident == (1,)
    assert plan_tiers(large, None).resident == ()


def test_a_budget_too_small_names_the_sizes(bank):
    need = bank.config.block_bytes(1)
    with pytest.raises(BudgetError, match=f"{need - 1} bytes cannot hold .* level 1 .{need} bytes"):
        MemoryBank.open(bank.folder, memory_budget=need - 1)
    with MemoryBank.open(bank.folder, memory_budget=need) as opened:
        opened.fetch((0, 0))
        assert opened.bytes_held <= need
    with pytest.raises(PathError, match="level '3' has no memory"):
        MemoryBank.open(bank.folder, tiers={3: "resident"})


def test_verify_reports_each_file_and_progress(bank):
    steps = []
    with MemoryBank.open(bank.folder) as opened:
        results = opened.verify(steps.append)
    names = {path.name for path in bank.folder.iterdir()} - {"manifest.json"}
    assert {result["file"] for result in results} == names
    assert all(result["ok"] for result in results)
    assert sum(steps) == sum((bank.folder / name).stat().st_size for name in names)


def test_inspect(tmp_path, make):
    config = make.config((2, 0, 1), 2)
    make.bank(tmp_path, config)
    with MemoryBank.open(tmp_path, blocked=[(3, 1)]) as opened:
        seen = json.loads(json.dumps(opened.inspect()))
    assert seen["fetch_size"] == config.fetch_size() and seen["bank_size"] == config.bank_size()
    assert [row["tier"] for row in seen["levels"]] == ["resident", "none", "disk"]
    assert seen["levels"][2] == {
        "level": 3,
        "clusters": 8,
        "rank": 1,
        "block_size": 24,
        "block_bytes": 48,
        "total_bytes": 384,
        "dtype": "bfloat16",
        "shards": 2,
        "tier": "disk",
        "blocked": 1,
        "removed": 0,
        "present_bytes": 384,
        "why": "no budget: the page cache serves it",
        "folder": str(tmp_path),
    }
    assert sum(row["total_bytes"] for row in seen["levels"]) == 2 * config.bank_size()


def _open_fds(folder):
    # The folder of descriptors is /proc/self/fd on Linux, /dev/fd on macOS; fstat works on both.
    inodes = {path.stat().st_ino for path in folder.iterdir()}
    count = 0
    for fd in range(256):
        try:
            count += os.fstat(fd).st_ino in inodes
        except OSError:
            continue
    return count


def test_a_bank_that_nobody_closed(bank):
    """It is closed with its last reference, but not while the interpreter ends: without modules."""
    opened = MemoryBank.open(bank.folder)
    opened.__del__(lambda: True)
    opened.fetch((0, 1))
    opened.__del__(lambda: False)
    with pytest.raises(FormatError, match="the bank was closed"):
        opened.fetch((0, 1))


def test_files_are_closed(bank):
    assert _open_fds(bank.folder) == 0
    with MemoryBank.open(bank.folder) as opened:
        assert _open_fds(bank.folder) == 4
    assert _open_fds(bank.folder) == 0
    opened.close()
    with pytest.raises(FormatError, match="the bank was closed"):
        opened.fetch((0, 0))
    dropped = MemoryBank.open(bank.folder)
    del dropped
    assert _open_fds(bank.folder) == 0
    with pytest.raises(BudgetError) as error:
        MemoryBank.open(bank.folder, memory_budget=1)
    assert _open_fds(bank.folder) == 0  # although the traceback still holds the bank
    assert error.traceback


def test_an_open_bank_survives_being_replaced(bank, make):
    with MemoryBank.open(bank.folder, tiers={1: "disk"}) as opened:
        make.bank(bank.folder, seed=9)
        np.testing.assert_array_equal(_bits(opened.fetch((1, 3)).blocks[1]), bank.stored[2][3])
        with pytest.raises(FormatError, match="altered"):
            opened.verify()
