"""Rows with their optimizer state in a file: no record that a checkpoint refers to is overwritten.

A record is one row's values and moments. A row that is written for the first time after a
checkpoint goes to a record of its own, so the checkpoint's stays as it was (shadow paging); the old
record is free again once the next checkpoint is safe. So a run that is killed at any moment finds
the rows of its last checkpoint, and a checkpoint costs what has changed, not what there is.

Only rows that were written take room, whatever the size of the bank.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import FormatError, TrainingError

# One call may not be asked for more than 2 GiB (an error on macOS, a short count on Linux).
_LIMIT = 1 << 30


class RecordFile:
    """The records of one level. ``read`` and ``write`` may be called from another thread.

    Args:
        path: of the file; made if missing.
        record: numbers (float32) in a record.
        rows: rows of the level.

    Attributes:
        places: (rows,) int64: the record of each row, -1 for a row that was never written.
    """

    def __init__(self, path: Path, record: int, rows: int) -> None:
        self.path = path
        self.record_bytes = 4 * record
        self.places = np.full(rows, -1, np.int64)
        self._moved: dict[int, int] = {}  # row -> its record in the last checkpoint
        self._free: list[int] = []
        self._count = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        except OSError as error:
            raise TrainingError(f"{path}: cannot be opened ({error.strerror})") from None

    def target(self, row: int) -> int:
        """The record that ``row`` is to be written to; from then on it is the row's place."""
        if row not in self._moved:
            self._moved[row] = int(self.places[row])
            if self._free:
                self.places[row] = self._free.pop()
            else:
                self.places[row] = self._count
                self._count += 1
        return int(self.places[row])

    def read(self, record: int, out: np.ndarray) -> None:
        """Fill ``out`` (contiguous float32) from the start of a record."""
        buffer, offset = memoryview(out).cast("B"), record * self.record_bytes
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done : done + _LIMIT]], offset + done)
            except OSError as error:
                raise TrainingError(f"{self.path}: cannot be read ({error.strerror})") from None
            if count == 0:
                raise FormatError(
                    f"{self.path}: truncated: no record {record}; the run's files were changed, "
                    "start again or restore them"
                )
            done += count

    def write(self, record: int, values: np.ndarray) -> None:
        """Write a whole record (contiguous float32)."""
        buffer, offset = memoryview(values).cast("B"), record * self.record_bytes
        done = 0
        while done < len(buffer):
            try:
                done += os.pwrite(self._fd, buffer[done : done + _LIMIT], offset + done)
            except OSError as error:
                raise TrainingError(
                    f"{self.path}: cannot be written ({error.strerror}); check the folder and free "
                    "space"
                ) from None

    def sync(self) -> None:
        """Bring what was written to the disk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise TrainingError(
                f"{self.path}: cannot be written ({error.strerror}); check the folder and free "
                "space"
            ) from None

    def committed(self) -> None:
        """A checkpoint with the present ``places`` is safe: what the one before held is free."""
        self._free += [record for record in self._moved.values() if record >= 0]
        self._moved.clear()

    def restore(self, places: np.ndarray) -> None:
        """Go back to the places of a checkpoint; records that it does not know are free."""
        used = places[places >= 0]
        self._count = int(used.max(initial=-1)) + 1
        if os.fstat(self._fd).st_size < self._count * self.record_bytes:
            raise FormatError(
                f"{self.path}: truncated: fewer than the {self._count} records of the checkpoint; "
                "the run's files were changed, start again or restore them"
            )
        free = np.ones(self._count, bool)
        free[used] = False
        self._free = np.flatnonzero(free)[::-1].tolist()
        self._moved.clear()
        self.places = places.astype(np.int64)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
