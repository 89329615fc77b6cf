"""How the bytes of a stored block are cut, and where they go in a buffer that joins all levels.

A block is a sequence of matrices of (rank, width), one behind the other; joined, each matrix holds
the rows of all levels one behind the other, level 1 first. A quantised row has parts (packed
numbers, scales, biases); the parts of all matrices lie together, so that each part of the joined
memory is one array that MLX can unpack in one call. What the matrices mean only ``memories`` knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ..config import MemoryConfig
from .dtypes import all_finite


@dataclass(frozen=True)
class Strip:
    """Consecutive matrices whose rows have equally many bytes.

    Attributes:
        part: 0 numbers (packed, if quantised), 1 scales, 2 biases.
        count: how many matrices.
        row_bytes: bytes of one row of this part.
        start: bytes of one row of everything before it; times the rank, where it starts.
    """

    part: int
    count: int
    row_bytes: int
    start: int


class StoredLayout:
    """The strips of a config's blocks.

    Attributes:
        strips: in the order of a stored block.
        row_bytes: bytes that one unit of rank takes in all strips together.
        ranks: for each level with memory (first row, rank) in the joined matrices.
        rank: R, the sum of the ranks.
        nbytes: of the joined memory.
    """

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config
        rows = config.row_parts()
        self.strips: list[Strip] = []
        start = 0
        for part in range(len(rows[0])):
            for row_bytes, same in groupby(parts[part] for parts in rows):
                count = len(list(same))
                self.strips.append(Strip(part, count, row_bytes, start))
                start += count * row_bytes
        self.row_bytes = start
        self.ranks: dict[int, tuple[int, int]] = {}
        first = 0
        for level in config.memory_levels:
            self.ranks[level] = (first, config.ranks[level - 1])
            first += config.ranks[level - 1]
        self.rank = first
        self.nbytes = first * start

    def block_bytes(self, level: int) -> int:
        """Bytes of one stored block."""
        return self.ranks[level][1] * self.row_bytes

    def rows_of(self, buffer: np.ndarray, level: int) -> Iterator[np.ndarray]:
        """A level's rows in a joined buffer (nbytes,) uint8: (count, rank * row_bytes) per
        strip."""
        first, rank = self.ranks[level]
        for strip in self.strips:
            begin = strip.start * self.rank
            size = strip.count * self.rank * strip.row_bytes
            joined = buffer[begin : begin + size].reshape(strip.count, -1)
            yield joined[:, first * strip.row_bytes : (first + rank) * strip.row_bytes]

    def pieces(self, buffer: np.ndarray, level: int) -> list[memoryview]:
        """Where a level's stored bytes go in a joined buffer, piece by piece, in stored order."""
        return [memoryview(row) for rows in self.rows_of(buffer, level) for row in rows]

    def put(self, buffer: np.ndarray, level: int, block: np.ndarray) -> None:
        """Copy a stored block, (bytes,) uint8, into a joined buffer."""
        rank = self.ranks[level][1]
        for strip, rows in zip(self.strips, self.rows_of(buffer, level), strict=True):
            begin = strip.start * rank
            size = strip.count * rank * strip.row_bytes
            rows[:] = block[begin : begin + size].reshape(rows.shape)

    def take(self, buffer: np.ndarray, level: int) -> np.ndarray:
        """A copy of a level's block, (bytes,) uint8, out of a joined buffer."""
        return np.concatenate([rows.reshape(-1) for rows in self.rows_of(buffer, level)])

    def copy(self, source: np.ndarray, target: np.ndarray, level: int) -> None:
        """Copy a level's rows from one joined buffer to another."""
        for theirs, ours in zip(
            self.rows_of(source, level), self.rows_of(target, level), strict=True
        ):
            ours[:] = theirs

    def clear(self, buffer: np.ndarray, level: int) -> None:
        """Zero a level's rows: zero bytes are zeros in every dtype and quantisation."""
        for rows in self.rows_of(buffer, level):
            rows[:] = 0

    def finite(self, block: np.ndarray) -> bool:
        """Whether a stored block, (bytes,) uint8, or several of one rank (n, bytes), is free of NaN
        and infinite numbers; of a quantised block its scales and biases are looked at."""
        block = block.reshape(-1, block.shape[-1])
        rank = block.shape[-1] // self.row_bytes
        packing = self.config.packing
        for strip in self.strips:
            mode = None if packing is None else packing.mode
            begin = strip.start * rank
            part = block[:, begin : begin + strip.count * rank * strip.row_bytes]
            # Neither E4M3 (codes of mxfp8, scales of nvfp4) nor E8M0 (scales of mxfp4 and mxfp8)
            # has infinities; the first has two NaNs, the second one. Other codes are always finite.
            if (mode, strip.part) in (("mxfp8", 0), ("nvfp4", 1)):
                bad = (part & 0x7F) == 0x7F
            elif mode in ("mxfp4", "mxfp8") and strip.part == 1:
                bad = part == 0xFF
            elif mode is not None and strip.part == 0:
                continue
            else:
                if not all_finite(np.ascontiguousarray(part), self.config.dtype):
                    return False
                continue
            if bad.any():
                return False
        return True
