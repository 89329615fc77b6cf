"""Slots: what a fetch reads, where it puts it, and that nothing in use is ever written."""

from __future__ import annotations

import os
import tempfile
import threading

import mlx.core as mx
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hiermem.bank import files, slots
from mlx_hiermem.bank.dtypes import from_storage
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.errors import FormatError
from mlx_hiermem.memories.layout import JoinedLayout
from tests.bank.reading import counted

DISK = {1: "disk", 2: "disk", 3: "disk"}


def _numbers(array):
    return np.array(array.astype(mx.float32))


def _path(config, leaf):
    k, p = config.branching, config.levels
    return [leaf // k ** (p - level) for level in range(1, p + 1)]


def _joined(written, path):
    """What a fetch has to give, by the formula: rows of all levels side by side, per matrix."""
    config = written.config
    layers = len(config.memory_layers())
    blocks = [
        from_storage(written.stored[level][path[level - 1]], config.dtype).reshape(
            layers, 3, config.ranks[level - 1], -1
        )
        for level in config.memory_levels
    ]
    return np.concatenate(blocks, axis=2).reshape(-1)


@pytest.fixture
def deep(tmp_path, make):
    """A bank of three levels with 3, 9 and 27 clusters."""
    return make.bank(tmp_path / "memory", make.config((4, 2, 1), 3))


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    waits=st.booleans(),
    pieces=st.sampled_from([1024, 5]),
    data=st.data(),
)
def test_a_fetch_is_the_blocks_joined_matrix_by_matrix(make, ranks, dtype, waits, pieces, data):
    config = make.config(ranks, 3, dtype)
    leaves = st.lists(st.integers(0, 3 ** len(ranks) - 1), min_size=1, max_size=6)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        written = make.bank(folder, config)
        if waits:  # nothing is taken from the page cache alone: threads read
            patch.setattr(os, "RWF_NOWAIT", 0, raising=False)
        patch.setattr(files, "_MOST_PIECES", pieces)
        patch.setattr(files, "_READ_LIMIT", 7 if pieces == 5 else 1 << 30)
        with MemoryBank.open(folder, tiers=dict.fromkeys(config.memory_levels, "disk")) as bank:
            for leaf in data.draw(leaves):
                path = _path(config, leaf)
                fetched = bank.fetch(path)
                assert fetched.joined.dtype == getattr(mx, dtype)
                np.testing.assert_array_equal(_numbers(fetched.joined), _joined(written, path))
                layout = JoinedLayout(config, config.anchor_shape())
                whole = layout.join([block[None] for block in fetched.blocks])
                assert mx.array_equal(fetched.joined[None], whole)
                if data.draw(st.booleans()):
                    fetched.release()


def test_only_levels_whose_cluster_changed_are_read(deep):
    sizes = [deep.config.block_bytes(level) for level in (1, 2, 3)]
    with MemoryBank.open(deep.folder, tiers=DISK) as bank, counted() as reads:
        bank.fetch((0, 0, 0)).release()
        assert reads == sizes
        for path, changed in (
            ((0, 0, 1), [3]),
            ((0, 2, 6), [2, 3]),
            ((1, 3, 9), [1, 2, 3]),
            ((1, 3, 9), []),
        ):
            reads.clear()
            fetched = bank.fetch(path)
            assert reads == [sizes[level - 1] for level in changed]
            sources = ["disk" if level in changed else "kept" for level in (1, 2, 3)]
            assert [block.source for block in fetched.report.blocks] == sources
            assert fetched.report.bytes_read == sum(reads)
            np.testing.assert_array_equal(_numbers(fetched.joined), _joined(deep, path))
            fetched.release()
        bank.block(3, 9)
        np.testing.assert_array_equal(
            _numbers(bank.fetch((1, 3, 9)).blocks[2]), np.zeros(deep.config.block_size(3))
        )
        assert bank.slots_made == 1


def test_blocking_and_unblocking_change_a_slot_that_is_reused(deep):
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        for blocked in (False, True, False):
            (bank.block if blocked else bank.unblock)(2, 1)
            fetched = bank.fetch((0, 1, 4))
            assert (not _numbers(fetched.blocks[1]).any()) == blocked
            assert fetched.report.blocks[1].source == ("blocked" if blocked else "disk")
            fetched.release()


# ---- a slot in use is never written ----------------------------------------------------


def test_a_slot_in_use_is_never_written(deep):
    """Lazy readers of every kind outlive many fetches, and still see what they were made from."""
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        waiting = []
        for leaf in range(27):
            path = _path(deep.config, leaf)
            memory = bank.fetch(path).joined
            expected = _joined(deep, path)
            waiting.append((memory * 2, expected * 2))  # lazy, and only it refers to memory
            waiting.append((memory.reshape(-1, 4)[3:9], expected.reshape(-1, 4)[3:9]))
            waiting.append((memory, expected))
        assert bank.slots_made == 27
        for lazy, expected in waiting:
            np.testing.assert_array_equal(_numbers(lazy), expected)


def test_releasing_too_early_would_be_seen(deep):
    """The test above can fail: this is what happens to who breaks the rule."""
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        first = bank.fetch((0, 0, 0))
        if not first.lent:
            pytest.skip("this backend cannot share memory: nothing can be overwritten")
        lazy = first.joined + 0
        first.release()
        bank.fetch((2, 8, 26))
        np.testing.assert_array_equal(_numbers(lazy), _joined(deep, (2, 8, 26)))


def test_a_slot_is_given_back_once(deep):
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        one = bank.fetch((0, 0, 0))
        one.release()
        two = bank.fetch((1, 3, 9))
        one.release()  # it is the slot of ``two`` by now
        three = bank.fetch((2, 8, 26))
        np.testing.assert_array_equal(_numbers(two.joined), _joined(deep, (1, 3, 9)))
        np.testing.assert_array_equal(_numbers(three.joined), _joined(deep, (2, 8, 26)))
        assert bank.slots_made == 2


def test_the_slot_that_holds_most_is_taken(deep):
    with MemoryBank.open(deep.folder, tiers=DISK) as bank, counted() as reads:
        two = [bank.fetch((0, 0, 0)), bank.fetch((2, 8, 26))]
        for memory in two:
            memory.release()
        reads.clear()
        bank.fetch((0, 0, 1)).release()
        bank.fetch((2, 8, 25)).release()
        assert reads == [deep.config.block_bytes(3)] * 2


def test_where_memory_cannot_be_shared_it_is_copied(deep, monkeypatch):
    monkeypatch.setattr(slots.Slot, "_check_shares", lambda slot: False)
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        memories = [(leaf, bank.fetch(_path(deep.config, leaf))) for leaf in (0, 1, 26)]
        for leaf, memory in memories:
            assert not memory.lent
            expected = _joined(deep, _path(deep.config, leaf))
            np.testing.assert_array_equal(_numbers(memory.joined), expected)
        assert bank.slots_made == 1
        # In a batch a slot is free again before the next memory is filled.
        paths = [_path(deep.config, leaf) for leaf in (0, 26, 1, 13, 0, 25)]
        for path, memory in zip(paths, bank.fetch_many(paths), strict=True):
            np.testing.assert_array_equal(_numbers(memory.joined), _joined(deep, path))


def test_the_view_shares_memory_on_this_backend(deep):
    """Where it does not, fetches copy: a backend that changes so should be noticed."""
    with MemoryBank.open(deep.folder) as bank:
        assert bank.fetch((0, 0, 0)).lent or mx.default_device() != mx.Device(mx.cpu)


def test_memory_does_not_grow_and_nothing_is_traced_again(tmp_path, make):
    written = make.bank(tmp_path, make.config((8, 4, 2), 3, hidden=64))
    traces = []

    def compute(memory, x):
        traces.append(memory.shape)
        return (memory.reshape(-1, 64) @ x).sum()

    compiled, x = mx.compile(compute), mx.ones((64, 2), mx.bfloat16)
    process = psutil.Process()
    with MemoryBank.open(tmp_path, tiers=DISK) as bank:

        def many(count):
            for number in range(count):
                memory = bank.fetch(_path(written.config, number * 11 % 27))
                if number % 20 == 0:
                    mx.eval(compiled(memory.joined, x))
                memory.release()
            return mx.get_active_memory(), process.memory_info().rss

        active, resident = many(1000)
        for _ in range(9):
            active_after, resident_after = many(1000)
        assert bank.slots_made == 1
    assert len(traces) == 1
    assert active_after == active
    assert resident_after - resident < 5e6


# ---- batches ---------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(leaves=st.lists(st.integers(0, 26), min_size=1, max_size=8))
def test_a_batch_reads_each_distinct_block_once(make, leaves):
    config = make.config((4, 2, 1), 3)
    with tempfile.TemporaryDirectory() as folder:
        written = make.bank(folder, config)
        with MemoryBank.open(folder, tiers=DISK) as bank, counted() as reads:
            paths = [_path(config, leaf) for leaf in leaves]
            for again in range(2):
                reads.clear()
                memories = bank.fetch_many(paths)
                distinct = {(level, path[level - 1]) for path in paths for level in (1, 2, 3)}
                if not again:
                    assert len(reads) == len(distinct)
                    assert sum(reads) == sum(config.block_bytes(level) for level, _ in distinct)
                for path, memory in zip(paths, memories, strict=True):
                    np.testing.assert_array_equal(_numbers(memory.joined), _joined(written, path))
                    assert memory.report.bytes == 2 * config.fetch_size()
                for memory in memories:
                    memory.release()
            assert bank.slots_made <= 2 * len(set(leaves))


def test_a_shared_memory_is_free_when_all_have_released_it(deep):
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        one, two = bank.fetch_many([(0, 0, 0), (0, 0, 0)])
        one.release()
        one.release()
        other = bank.fetch((2, 8, 26))
        np.testing.assert_array_equal(_numbers(two.joined), _joined(deep, (0, 0, 0)))
        two.release()
        other.release()
        assert bank.slots_made == 2
        assert {block.source for block in two.report.blocks} == {"batch"}


# ---- prefetch --------------------------------------------------------------------------


def test_prefetch_is_found_by_the_fetch(deep):
    with MemoryBank.open(deep.folder, tiers=DISK) as bank, counted() as reads:
        ahead = bank.prefetch((1, 3, 10))
        assert bank.prefetch((1, 3, 10)) is ahead
        assert not bank.uses
        assert ahead.wait(10) and ahead.done
        assert len(reads) == 3
        fetched = bank.fetch((1, 3, 10))
        assert len(reads) == 3
        assert [block.source for block in fetched.report.blocks] == ["prefetched"] * 3
        np.testing.assert_array_equal(_numbers(fetched.joined), _joined(deep, (1, 3, 10)))
        assert bank.uses == {(1, 1): 1, (2, 3): 1, (3, 10): 1}


def test_prefetch_leaves_a_memory_in_use_alone(deep):
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        used = bank.fetch((0, 0, 0))
        lazy = used.joined * 1
        for leaf in range(1, 27):
            bank.prefetch(_path(deep.config, leaf)).wait(10)
        np.testing.assert_array_equal(_numbers(lazy), _joined(deep, (0, 0, 0)))
        used.release()


def test_a_fetch_of_another_path_does_not_wait_for_a_prefetch(deep, monkeypatch):
    """The prefetch hangs in its read; the fetch of another path comes through, and is right."""
    held, preadv = threading.Event(), os.preadv

    def slow(fd, buffers, offset, flags=0):
        if threading.current_thread().name.startswith("prefetch"):
            held.wait(30)
        return preadv(fd, buffers, offset, flags)

    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        bank.fetch((0, 0, 0)).release()
        monkeypatch.setattr(os, "preadv", slow)
        ahead = bank.prefetch((1, 3, 10))
        for leaf in (0, 5, 26):
            memory = bank.fetch(_path(deep.config, leaf))
            expected = _joined(deep, _path(deep.config, leaf))
            np.testing.assert_array_equal(_numbers(memory.joined), expected)
            assert not ahead.done
            if leaf != 26:
                memory.release()
        held.set()
        assert ahead.wait(10)
        np.testing.assert_array_equal(_numbers(memory.joined), expected)
        memory = bank.fetch((1, 3, 11))  # may be in the slot that the prefetch has left
        np.testing.assert_array_equal(_numbers(memory.joined), _joined(deep, (1, 3, 11)))


def test_a_fetch_waits_for_the_prefetch_of_its_path(deep, monkeypatch):
    held, preadv = threading.Event(), os.preadv

    def slow(fd, buffers, offset, flags=0):
        if threading.current_thread().name.startswith("prefetch"):
            held.wait(30)
        return preadv(fd, buffers, offset, flags)

    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        monkeypatch.setattr(os, "preadv", slow)
        ahead = bank.prefetch((1, 3, 10))
        threading.Timer(0.2, held.set).start()
        memory = bank.fetch((1, 3, 10))
        assert ahead.done  # nobody writes to the slot any more
        np.testing.assert_array_equal(_numbers(memory.joined), _joined(deep, (1, 3, 10)))


def test_a_prefetch_that_fails_leaves_the_error_to_the_fetch(deep):
    path = deep.folder / "level-3-00000-of-00003.safetensors"
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        os.truncate(path, path.stat().st_size - 1)
        assert bank.prefetch((0, 2, 8)).wait(10)
        with pytest.raises(FormatError, match="truncated"):
            bank.fetch((0, 2, 8))
        memory = bank.fetch((0, 2, 7))
        np.testing.assert_array_equal(_numbers(memory.joined), _joined(deep, (0, 2, 7)))


# ---- a disk that goes away -------------------------------------------------------------


@pytest.mark.parametrize("waits", [False, True])
def test_a_file_that_cannot_be_read_ends_one_request_only(deep, monkeypatch, waits):
    if waits:
        monkeypatch.setattr(os, "RWF_NOWAIT", 0, raising=False)
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        bank.fetch((0, 0, 0)).release()
        # What a file system that is gone gives: the descriptor is there, and no read works.
        file = bank._reader._files[3][0]
        folder = os.open(deep.folder, os.O_RDONLY)
        os.dup2(folder, file.fd)
        os.close(folder)
        hidden = deep.folder.rename(deep.folder.with_name("gone"))
        for _ in range(3):
            with pytest.raises(FormatError, match="level-3-00000.*: cannot be read"):
                bank.fetch((0, 0, 1))
        memory = bank.fetch((2, 8, 26))  # another file
        np.testing.assert_array_equal(_numbers(memory.joined), _joined(deep, (2, 8, 26)))
        hidden.rename(deep.folder)  # the disk is back
        memory = bank.fetch((0, 0, 1))
        np.testing.assert_array_equal(_numbers(memory.joined), _joined(deep, (0, 0, 1)))


def test_a_disk_that_answers_everything_with_an_error(deep, monkeypatch):
    """As a disk that was pulled out does: not even a name is found or missing."""

    def failing(call):
        def fail(path, *arguments, **options):
            if str(path).startswith(str(deep.folder)):
                raise OSError(5, "Input/output error", str(path))
            return call(path, *arguments, **options)

        return fail

    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        expected = _numbers(bank.fetch((0, 0, 1)).joined)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("stat", "lstat", "open", "readlink", "listdir"):
                patch.setattr(os, name, failing(getattr(os, name)))
            patch.setattr(os, "preadv", failing_read)
            for _ in range(3):
                with pytest.raises(FormatError, match="cannot be read") as error:
                    bank.fetch((0, 0, 1))
                assert "\n" not in str(error.value)
            with pytest.raises(FormatError):
                MemoryBank.open(deep.folder)
        np.testing.assert_array_equal(_numbers(bank.fetch((0, 0, 1)).joined), expected)


def failing_read(*_):
    raise OSError(5, "Input/output error")


def test_what_a_failed_read_has_overwritten_is_read_again(deep):
    path = deep.folder / "level-3-00000-of-00003.safetensors"
    size = deep.config.block_bytes(3)
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        bank.fetch((0, 0, 0)).release()
        os.truncate(path, path.stat().st_size - 8 * size + size // 2)  # in the midst of block 1
        with pytest.raises(FormatError, match="truncated"):
            bank.fetch((0, 0, 1))
        memory = bank.fetch((0, 0, 0))
        np.testing.assert_array_equal(_numbers(memory.joined), _joined(deep, (0, 0, 0)))


def test_no_thread_reads_on_after_an_error(deep, monkeypatch):
    """One level fails at once, the others take long: the error comes when all have ended."""
    monkeypatch.setattr(os, "RWF_NOWAIT", 0, raising=False)
    preadv, reading = os.preadv, []

    def slow(fd, buffers, offset, flags=0):
        if sum(map(len, buffers)) == deep.config.block_bytes(1):
            raise OSError(5, "Input/output error")
        reading.append(fd)
        threading.Event().wait(0.2)
        done = preadv(fd, buffers, offset, flags)
        reading.remove(fd)
        return done

    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        monkeypatch.setattr(os, "preadv", slow)
        with pytest.raises(FormatError, match="level-1-.*cannot be read .Input/output error."):
            bank.fetch((0, 0, 1))
        assert not reading
        monkeypatch.setattr(os, "preadv", preadv)
        memory = bank.fetch((0, 0, 1))
        np.testing.assert_array_equal(_numbers(memory.joined), _joined(deep, (0, 0, 1)))


def test_a_disk_that_comes_back_with_another_bank_is_refused(deep, make):
    with MemoryBank.open(deep.folder, tiers=DISK) as bank:
        file = bank._reader._files[3][0]
        folder = os.open(deep.folder, os.O_RDONLY)
        os.dup2(folder, file.fd)
        os.close(folder)
        gone = deep.folder.rename(deep.folder.with_name("gone"))
        with pytest.raises(FormatError, match="cannot be read"):
            bank.fetch((0, 0, 1))
        gone.rename(deep.folder)
        make.bank(deep.folder, deep.config, seed=5)
        with pytest.raises(FormatError, match="was changed since the bank was opened"):
            bank.fetch((0, 0, 1))
