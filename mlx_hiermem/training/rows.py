"""The bank in training: rows with their optimizer state, under a budget of bytes.

The cost of a step follows the rows that it touches, never the size of the bank, which may be larger
than memory: rows live in files (``rowfile.py``), those used last stay in memory up to the budget,
and a row that was never visited exists nowhere: its start values follow from the seed.

Notable: files are read and written by one thread that touches only NumPy, in the order in which it
is asked to; so a row that is on its way to its file can be asked for again, and the next batch's
rows are read while this one computes. The generic memory is one more row of each level, GENERIC.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import MemoryConfig
from ..errors import BudgetError
from ..memories import GENERIC
from .adamw import adamw
from .rowfile import RecordFile

#: (level, cluster); the cluster of the generic memory is GENERIC.
Key = tuple[int, int]


@dataclass
class _Row:
    data: np.ndarray  # (3, s_l) float32: values, first and second moments
    dirty: bool = False


class BankRows:
    """All rows of a bank in training. ``gather`` a batch's rows, differentiate, ``update`` them.

    Args:
        config: the memory config; levels of rank 0 have no rows.
        start: (level, cluster) -> start values (s_l,) float32; called on a thread of its own.
        folder: where the rows' files are; without one all rows stay in memory.
        budget: bytes that rows and their state may take in memory; None: no bound.

    Attributes:
        steps: level -> (k^l + 1,) int64, how often each row was updated; the last is generic.
        bytes: of the rows in memory now, those on their way in and out included.
    """

    def __init__(
        self,
        config: MemoryConfig,
        start: Callable[[int, int], np.ndarray],
        folder: Path | None = None,
        budget: int | None = None,
        anchor: object = None,
    ) -> None:
        self.config = config
        self.budget = budget if folder is not None else None
        self.levels = config.memory_levels
        self.sizes = {level: config.block_size(level, anchor) for level in self.levels}
        self.steps = {
            level: np.zeros(config.clusters(level) + 1, np.int64) for level in self.levels
        }
        self.bytes = 0
        self._start = start
        self._rows: OrderedDict[Key, _Row] = OrderedDict()  # the one used last at the end
        self._reading: dict[Key, Future[_Row]] = {}
        self._writing: list[tuple[Future[None], int]] = []
        self._pinned: set[Key] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._files: dict[int, RecordFile] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for level in self.levels:
                path = folder / f"rows-{level}.bin"
                self._files[level] = RecordFile(
                    path, 3 * self.sizes[level], config.clusters(level) + 1
                )

    # ---- a batch -----------------------------------------------------------------------

    def ids(self, leaves: np.ndarray, use_generic: np.ndarray) -> np.ndarray:
        """(B, levels with memory) int64: each sequence's row at each level.

        Args:
            leaves: (B,) cluster ids at the deepest level.
            use_generic: (B,) bool: sequences that use the generic memory.
        """
        k, depth = self.config.branching, self.config.levels
        ids = np.stack([leaves // k ** (depth - level) for level in self.levels], axis=1)
        return np.where(use_generic[:, None], GENERIC, ids)

    def gather(self, ids: np.ndarray) -> list[np.ndarray]:
        """The values of a batch's rows: for each level (B, s_l), or (1, s_l) if all are the same.

        Raises:
            BudgetError: the budget cannot hold the batch's rows.
        """
        if (ids == ids[0]).all():
            ids = ids[:1]
        self._pinned = set(self.keys(ids))
        return [
            np.stack([self._row((level, cluster)).data[0] for cluster in column.tolist()])
            for level, column in zip(self.levels, ids.T, strict=True)
        ]

    def prefetch(self, ids: np.ndarray) -> None:
        """Start to read the rows that a batch will need, as far as they fit beside this one's."""
        wanted = self.keys(ids)
        self._pinned |= set(wanted)
        for key in wanted:
            if key not in self._rows and key not in self._reading:
                if not self._make_room(self._row_bytes(key)):
                    return
                self._submit(key)

    def keys(self, ids: np.ndarray) -> list[Key]:
        """The distinct rows of (B, levels) ids, in the order of levels and clusters."""
        return [
            (level, cluster)
            for level, column in zip(self.levels, ids.T, strict=True)
            for cluster in np.unique(column).tolist()
        ]

    def update(
        self,
        gradients: Mapping[Key, np.ndarray],
        learning_rate: float,
        weight_decay: float,
        scale: float = 1.0,
    ) -> None:
        """AdamW on the rows that have a gradient; the others do not change.

        Args:
            gradients: (s_l,) float32 each; of a row that several sequences used, the sum.
            scale: every gradient is multiplied by this first (clipping).
        """
        self._pinned = set()
        for key in sorted(gradients):
            level, cluster = key
            self._pinned = {key}
            row = self._row(key)
            self.steps[level][cluster] += 1
            row.dirty = True
            adamw(
                row.data,
                gradients[key],
                int(self.steps[level][cluster]),
                learning_rate,
                weight_decay,
                scale,
            )
        self._pinned = set()

    def values(self, level: int, clusters: Iterable[int]) -> Iterator[np.ndarray]:
        """The values of rows one after the other, (s_l,) float32, past the cache."""
        for cluster in clusters:
            row = self._rows.get((level, cluster))
            yield (
                self._thread.submit(self._values, level, cluster).result()
                if (row is None)
                else row.data[0]
            )

    # ---- checkpoints -------------------------------------------------------------------

    def flush(self) -> dict[str, np.ndarray]:
        """Bring all rows to their files, safely; returns what a checkpoint has to hold of them.

        Only a run with files can do that. :meth:`committed` must follow once the checkpoint is
        safe, and no update may come between.
        """
        for key, row in self._rows.items():
            if row.dirty:
                self._write(key, row)
                row.dirty = False
        while self._writing:
            self._finish_write()
        for file in self._files.values():
            file.sync()
        state = {f"places-{level}": file.places for level, file in self._files.items()}
        return state | {f"steps-{level}": self.steps[level] for level in self.levels}

    def committed(self) -> None:
        """The checkpoint with what :meth:`flush` gave is safe."""
        for file in self._files.values():
            file.committed()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go back to what a checkpoint holds."""
        self._rows.clear()
        self.bytes = 0
        for level, file in self._files.items():
            file.restore(state[f"places-{level}"])
            self.steps[level] = state[f"steps-{level}"].astype(np.int64)

    def close(self) -> None:
        """Stop the thread and close the files."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()

    # ---- rows in memory ----------------------------------------------------------------

    def _row_bytes(self, key: Key) -> int:
        return 12 * self.sizes[key[0]]

    def _row(self, key: Key) -> _Row:
        """The row, in memory, as the one used last."""
        if key in self._rows:
            self._rows.move_to_end(key)
            return self._rows[key]
        if key not in self._reading:
            if not self._make_room(self._row_bytes(key)):
                needed = sum(map(self._row_bytes, self._pinned))
                raise BudgetError(
                    f"a memory budget of {self.budget:,} bytes cannot hold the rows that one batch "
                    f"uses with their optimizer state, {needed:,} bytes; give --memory-budget more "
                    "(a lower --batch-size needs less, in a new run)"
                )
            self._submit(key)
        row = self._reading.pop(key).result()
        self._rows[key] = row
        return row

    def _submit(self, key: Key) -> None:
        """Have the thread bring a row in; its bytes count from now on."""
        self.bytes += self._row_bytes(key)
        self._reading[key] = self._thread.submit(self._load, *key)

    def _load(self, level: int, cluster: int) -> _Row:
        file = self._files.get(level)
        if file is not None and file.places[cluster] >= 0:
            data = np.empty((3, self.sizes[level]), np.float32)
            file.read(int(file.places[cluster]), data)
        else:
            data = np.zeros((3, self.sizes[level]), np.float32)
            data[0] = self._start(level, cluster)
        return _Row(data)

    def _values(self, level: int, cluster: int) -> np.ndarray:
        file = self._files.get(level)
        if file is None or file.places[cluster] < 0:
            return self._start(level, cluster)
        values = np.empty(self.sizes[level], np.float32)
        file.read(int(file.places[cluster]), values)
        return values

    def _make_room(self, nbytes: int) -> bool:
        """Give up rows used longest ago until ``nbytes`` more fit; pinned rows stay."""
        if self.budget is None:
            return True
        while self._writing and self._writing[0][0].done():
            self._finish_write()
        while self.bytes + nbytes > self.budget:
            key = next((key for key in self._rows if key not in self._pinned), None)
            if key is not None:
                row = self._rows.pop(key)
                if row.dirty:
                    self._write(key, row)
                else:
                    self.bytes -= self._row_bytes(key)
            elif self._writing:
                self._finish_write()
            elif not self._drop_reading():
                return False
        return True

    def _drop_reading(self) -> bool:
        """Give up a row that was read ahead and is not pinned any more."""
        key = next((key for key in self._reading if key not in self._pinned), None)
        if key is None:
            return False
        self._reading.pop(key).result()
        self.bytes -= self._row_bytes(key)
        return True

    def _write(self, key: Key, row: _Row) -> None:
        """Have the thread write a row back; a row given up counts until it is written."""
        level, cluster = key
        file = self._files[level]
        record = file.target(cluster)
        given_up = 0 if key in self._rows else self._row_bytes(key)
        self._writing.append((self._thread.submit(file.write, record, row.data), given_up))

    def _finish_write(self) -> None:
        written, given_up = self._writing.pop(0)
        written.result()
        self.bytes -= given_up
