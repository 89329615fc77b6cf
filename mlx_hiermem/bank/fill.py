"""Filling a slot: for each level a copy from memory or one read of the file, reads in parallel.

A read first takes what the system's page cache has, in the calling thread, where that is as fast as
memory is; what the disk has to be waited for is read by as many threads as levels, so that the
disk sees all reads at once, while this thread copies what is in memory already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np

from ..errors import FormatError
from .checksums import digest
from .reader import BlockReader
from .slots import GENERIC_KEY, ZEROS, Key, Slot
from .stored import StoredLayout


@dataclass(frozen=True)
class Request:
    """What a memory is to hold.

    Attributes:
        clusters: for each level with memory the cluster; None: the generic memory's block.
        keys: for each level with memory the key of what its rows shall be.
        blocked: levels whose block is blocked.
    """

    clusters: Mapping[int, int | None]
    keys: Mapping[int, Key]
    blocked: frozenset[int] = frozenset()


@dataclass
class Step:
    """What brings one level's block into a slot.

    Attributes:
        level, key: of the block; key as in ``slots``.
        source: as in ``BlockReport``.
        stored: (bytes,) uint8 to copy from, or the slot whose rows to copy; None: nothing, or a
            read.
        ms: time that it took.
    """

    level: int
    key: Key
    source: str
    stored: np.ndarray | Slot | None = None
    ms: float = 0.0

    @property
    def cluster(self) -> int | None:
        """The cluster to read; None for the generic memory's block."""
        return self.key if isinstance(self.key, int) else None


class Filler:
    """Fills slots from memory and from the files of a reader.

    Args:
        check: compare the checksum of each block when it is first read, and refuse what is not
            finite.

    Raises:
        FormatError: ``check`` is asked of a bank without checksums.
    """

    def __init__(self, reader: BlockReader, layout: StoredLayout, check: bool = False) -> None:
        self._reader = reader
        self._layout = layout
        self.checks = check
        self._checked: set[tuple[int, Key]] = set()
        self._threads: ThreadPoolExecutor | None = None
        if check and reader.checksums is None:
            raise FormatError(
                f"{reader.folder}: has no checksums of its blocks to compare; add them with "
                "`mlx_hiermem bank checksums`, or open it without checking"
            )

    def fill(
        self, slot: Slot, steps: Sequence[Step], cancelled: threading.Event | None = None
    ) -> None:
        """Bring the blocks of ``steps`` into ``slot``. Any thread, one at a time for each slot.

        Args:
            cancelled: when set, levels whose read has not begun are left out.

        Raises:
            FormatError: a file was truncated or cannot be read, or a block is not what its checksum
                says. Levels that failed are not in ``slot.held``; all threads have ended.
        """
        steps = [step for step in steps if step.source not in ("kept", "prefetched")]
        reads = [step for step in steps if step.source == "disk"]
        copies = [step for step in steps if step.source != "disk"]
        for step in steps:
            slot.held.pop(step.level, None)

        def stopped() -> bool:
            return cancelled is not None and cancelled.is_set()

        waiting: list[tuple[Step, int]] = []
        for step in reads:
            if stopped():
                return
            done = self._read_cached(slot, step)
            if done < self._layout.block_bytes(step.level):
                waiting.append((step, done))
        if stopped():
            return
        # The shortest reads first, so that this thread has the longest left, or the copies.
        waiting.sort(key=lambda one: self._layout.block_bytes(one[0].level) - one[1])
        here = waiting[-1:] if not copies else []
        failures: list[BaseException] = []
        futures = [self._submit(slot, *one) for one in waiting[: len(waiting) - len(here)]]
        tasks: list[Callable[[], object]] = [partial(self._copy, slot, step) for step in copies]
        tasks += [partial(self._wait, slot, *one) for one in here]
        for task in (*tasks, *(future.result for future in futures)):
            try:
                task()
            except BaseException as error:  # all threads have to be done with the slot first
                failures.append(error)
        if failures:
            raise failures[0]

    def _copy(self, slot: Slot, step: Step) -> None:
        """Bring a block that is in memory."""
        start = perf_counter()
        if step.key == ZEROS:
            self._layout.clear(slot.bytes, step.level)
        elif isinstance(step.stored, Slot):
            self._layout.copy(step.stored.bytes, slot.bytes, step.level)
        else:
            assert step.stored is not None
            self._layout.put(slot.bytes, step.level, step.stored)
        self._done(slot, step, start)

    def _read_cached(self, slot: Slot, step: Step) -> int:
        """Read what is there without waiting; how many bytes that was."""
        start = perf_counter()
        done = self._reader.read_into(
            step.level, step.cluster, slot.pieces(step.level), cached_only=True
        )
        if done == self._layout.block_bytes(step.level):
            self.check(step.level, step.key, slot)
            self._done(slot, step, start)
        else:
            step.ms += (perf_counter() - start) * 1e3
        return done

    def _submit(self, slot: Slot, step: Step, done: int) -> Future[None]:
        if self._threads is None:
            levels = len(self._layout.ranks)
            self._threads = ThreadPoolExecutor(levels, thread_name_prefix="fetch")
        return self._threads.submit(self._wait, slot, step, done)

    def _wait(self, slot: Slot, step: Step, done: int) -> None:
        """Read the rest of a block, behind the first ``done`` bytes."""
        start = perf_counter()
        self._reader.read_rest(step.level, step.cluster, slot.pieces(step.level), done)
        self.check(step.level, step.key, slot)
        self._done(slot, step, start)

    def _done(self, slot: Slot, step: Step, start: float) -> None:
        step.ms += (perf_counter() - start) * 1e3
        slot.held[step.level] = step.key

    def check(self, level: int, key: Key, slot: Slot) -> None:
        """Check a block that was read into ``slot``, if that is asked for and was not done yet.

        Raises:
            FormatError: its checksum differs, or it holds what is not finite.
        """
        if self.checks and (level, key) not in self._checked:
            self.check_stored(level, key, slot.pieces(level), self._layout.take(slot.bytes, level))

    def check_stored(
        self, level: int, key: Key, pieces: Sequence[memoryview], block: np.ndarray
    ) -> None:
        """As :meth:`check`, of the bytes of a block in pieces and at a stretch, (bytes,) uint8."""
        check_block(self._reader, self._layout, level, key, pieces, block)
        self._checked.add((level, key))

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()


def check_block(
    reader: BlockReader,
    layout: StoredLayout,
    level: int,
    key: Key,
    pieces: Sequence[memoryview],
    block: np.ndarray,
) -> None:
    """Raise FormatError unless a block has its checksum (if the bank has them) and is finite."""
    generic = key == GENERIC_KEY
    name = "the generic memory's block" if generic else f"block {key}"
    where = f"{reader.place(level)}: {name} of level {level}"
    if (checksums := reader.checksums) is not None:
        row = reader.config.memory_levels.index(level) if generic else key
        expected = checksums["generic" if generic else f"level{level}"][row].tobytes()
        if digest(pieces) != expected:
            raise FormatError(
                f"{where} was altered: its sha256 is not that of checksums.safetensors; download "
                "the bank again, or block it"
            )
    if not layout.finite(block):
        raise FormatError(
            f"{where} holds NaN or infinite numbers; train or download the bank again, or block it"
        )
