"""Media: how fast a bank is read from, at the speed of this machine or throttled to another.

A throttled medium takes as long for each read as its speed says, reads of several threads one after
the other, as one disk would. The bytes are really read besides, from the page cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.errors import InputError


@dataclass(frozen=True)
class Medium:
    """``name``, and ``speed`` in bytes per second; None: as fast as this machine's own."""

    name: str
    speed: float | None

    @classmethod
    def parse(cls, text: str) -> Medium:
        """``NAME=SPEED`` with a speed in GB/s.

        Raises:
            InputError: it is none.
        """
        name, _, speed = text.partition("=")
        try:
            found = float(speed)
        except ValueError:
            found = 0.0
        if not name.strip() or not 0 < found < 1e4:
            raise InputError(
                f"--media: {text[:40]!r} is none; give NAME=SPEED in GB/s, such as flash=1.5"
            )
        return cls(name.strip(), found * 1e9)


class Turn:
    """The timeline of one medium."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._free = 0.0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> float:
        """When a read of ``nbytes`` that is asked for now would be done."""
        with self._lock:
            self._free = max(self._free, time.perf_counter()) + nbytes / self._speed
            return self._free


class ThrottledReader(BlockReader):
    """A reader whose levels lie on media of other speeds; see :meth:`throttle`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._turns: dict[int, Turn] = {}

    def throttle(self, turns: Mapping[int, Turn | None]) -> None:
        """For some levels the timeline of their medium; None: this machine's own disk."""
        self._turns = {level: turn for level, turn in turns.items() if turn is not None}

    def read_into(
        self,
        level: int,
        cluster: int | None,
        pieces: Sequence[memoryview],
        cached_only: bool = False,
    ) -> int:
        if level in self._turns and cached_only:
            return 0  # nothing of a medium is in memory
        return super().read_into(level, cluster, pieces, cached_only)

    def read_rest(
        self, level: int, cluster: int | None, pieces: Sequence[memoryview], done: int
    ) -> None:
        turn = self._turns.get(level)
        ready = turn.take(sum(map(len, pieces)) - done) if turn else 0.0
        super().read_rest(level, cluster, pieces, done)
        time.sleep(max(0.0, ready - time.perf_counter()))
