"""Reading ahead: a path that will probably be wanted is read into a free slot in the background.

Only one at a time: a newer one takes the place of an older one. A thread of its own writes bytes,
and nothing else; MLX arrays, the cache and the pool stay with the thread that owns the bank.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from .fill import Filler, Step
from .slots import Key, Slot, SlotPool


class Prefetch:
    """A path that is being read, or was; made by ``MemoryBank.prefetch``.

    Attributes:
        path: its cluster ids.
        wanted: for each level with memory the key of its block.
        slot: where it is read to.
        levels: those that are brought; the others were in the slot already.
    """

    def __init__(
        self, path: Sequence[int], wanted: Mapping[int, Key], slot: Slot, steps: Sequence[Step]
    ) -> None:
        self.path = tuple(path)
        self.wanted = dict(wanted)
        self.slot = slot
        self.levels = {step.level for step in steps if step.source != "kept"}
        self.cancelled = threading.Event()
        self.future: Future[None] | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is read any more: all is there, it was cancelled, or it failed."""
        return self.future is not None and self.future.done()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done; whether it is, after ``timeout`` seconds at most.

        An error of reading is not raised here: the fetch that comes tries again and tells it.
        """
        return self.future is None or not wait([self.future], timeout).not_done


class Prefetcher:
    """The one prefetch of a bank. For the thread that owns the bank."""

    def __init__(self, filler: Filler, pool: SlotPool) -> None:
        self._filler = filler
        self._pool = pool
        self._thread: ThreadPoolExecutor | None = None
        self._current: Prefetch | None = None
        self._leaving: list[Prefetch] = []  # cancelled, but their thread may still write

    def start(
        self, path: Sequence[int], wanted: Mapping[int, Key], slot: Slot, steps: Sequence[Step]
    ) -> Prefetch:
        """Begin to read the blocks of ``steps`` into ``slot``; an older prefetch was dropped."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        prefetch = self._current = Prefetch(path, wanted, slot, steps)
        prefetch.future = self._thread.submit(self._filler.fill, slot, steps, prefetch.cancelled)
        return prefetch

    def claim(self, wanted: Mapping[int, Key]) -> Prefetch | None:
        """The prefetch, done, if it is of just these blocks; its slot is the caller's then.

        Any other is dropped: what it has read is found in the pool.
        """
        current = self._current
        if current is None or current.wanted != wanted:
            self.drop()
            return None
        self._current = None
        current.wait()
        return current

    def same(self, wanted: Mapping[int, Key]) -> Prefetch | None:
        """The prefetch, if it is of just these blocks."""
        return self._current if self._current and self._current.wanted == wanted else None

    def drop(self) -> None:
        """Cancel the prefetch, without waiting, and give back the slots that nobody writes."""
        if self._current is not None:
            self._current.cancelled.set()
            self._leaving.append(self._current)
            self._current = None
        for prefetch in [one for one in self._leaving if one.done]:
            self._leaving.remove(prefetch)
            self._pool.give_back(prefetch.slot)

    def close(self) -> None:
        """Cancel, and wait for the thread."""
        self.drop()
        if self._thread is not None:
            self._thread.shutdown()
