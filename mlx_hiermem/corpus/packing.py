"""Which piece of which window goes into which sequence: planned from lengths and leaves alone.

A window is cut into pieces of T tokens, the last one shorter; what fits into one sequence is never
cut, since its end would then be learned without its beginning. Sequences hold pieces of one leaf
only (section 3 of the paper). Notable: best-fit decreasing (Ding et al. 2024, "Fewer truncations
improve language modeling") keeps the rooms left in the open sequences as the bits of one integer,
so that the smallest room that is large enough is found with a shift and a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Pieces that are planned between two calls of a progress function; also bounds Python's lists.
_STEP = 1 << 17


@dataclass(frozen=True)
class Pieces:
    """Windows cut into pieces.

    Attributes:
        windows: (P,) int64: the window that each piece is of.
        starts: (P,) int64: its first token, counted from the window's.
        lengths: (P,) int64: its tokens.
    """

    windows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Sequences of pieces.

    Attributes:
        pieces: (P,) int64: the pieces' numbers, sequence after sequence, in their order there.
        starts: (N + 1,) int64: sequence i holds ``pieces[starts[i] : starts[i + 1]]``.
        leaves: (N,) int64: ascending.
    """

    pieces: np.ndarray
    starts: np.ndarray
    leaves: np.ndarray

    @property
    def sequences(self) -> int:
        """N, the number of sequences."""
        return len(self.leaves)

    def places(self, lengths: np.ndarray, length: int) -> np.ndarray:
        """Where each of ``pieces`` goes in the flattened (N, T) tokens: (P,) int64."""
        sizes = lengths[self.pieces]
        before = np.cumsum(sizes) - sizes  # tokens of all pieces in front of it
        counts = np.diff(self.starts)
        first = np.repeat(before[self.starts[:-1]], counts)
        return before - first + np.repeat(np.arange(self.sequences) * length, counts)


def cut(lengths: np.ndarray, length: int) -> Pieces:
    """Cut windows of ``lengths`` (W,) tokens into pieces of ``length`` tokens and a rest."""
    counts = -(-lengths // length)
    windows = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(windows)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = number * length
    return Pieces(windows, starts, np.minimum(lengths[windows] - starts, length))


def best_fit(
    lengths: np.ndarray,
    leaves: np.ndarray,
    length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Best-fit decreasing within each leaf: the longest piece first, into the smallest room.

    Args:
        lengths: (P,) tokens of each piece, 1 to ``length``.
        leaves: (P,) the leaf of each.
        length: T.
        progress: called with the pieces planned so far and their number.

    Of equal pieces the first goes first, so the same input gives the same plan.
    """
    sequence = np.empty(len(lengths), np.int64)
    # A piece that fills a sequence needs no search.
    full = np.flatnonzero(lengths == length)
    sequence[full] = np.arange(len(full))
    short = np.flatnonzero(lengths != length)
    short = short[np.lexsort((-lengths[short], leaves[short]))]

    last = len(full) - 1  # the sequence opened last
    current = None
    rooms = 0  # bit r: some open sequence of this leaf has room for r tokens more
    open_with: dict[int, list[int]] = {}  # room -> the sequences that have it
    for start in range(0, len(short), _STEP):
        chosen = short[start : start + _STEP]
        placed = []
        for size, leaf in zip(lengths[chosen].tolist(), leaves[chosen].tolist(), strict=True):
            if leaf != current:
                current, rooms, open_with = leaf, 0, {}
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                stack = open_with[room]
                found = stack.pop()
                if not stack:
                    rooms ^= 1 << room
                room -= size
            else:
                last = found = last + 1
                room = length - size
            placed.append(found)
            if room:
                stack = open_with.setdefault(room, [])
                if not stack:
                    rooms |= 1 << room
                stack.append(found)
        sequence[chosen] = placed
        if progress is not None:
            progress(len(full) + start + len(chosen), len(lengths))
    # Within a sequence the longer piece comes first, as it was placed first.
    return _plan(np.concatenate([full, short]), sequence, leaves)


def next_fit(lengths: np.ndarray, leaves: np.ndarray, length: int) -> Plan:
    """Within each leaf in the given order: what does not fit any more opens the next sequence.

    Args:
        lengths: (P,) tokens of each piece, 1 to ``length``.
        leaves: (P,) the leaf of each.
        length: T.
    """
    order = np.argsort(leaves, kind="stable")
    sequence = np.empty(len(lengths), np.int64)
    last, room, current = -1, 0, None
    placed = []
    for size, leaf in zip(lengths[order].tolist(), leaves[order].tolist(), strict=True):
        if leaf != current or size > room:
            last, room, current = last + 1, length, leaf
        room -= size
        placed.append(last)
    sequence[order] = placed
    return _plan(order, sequence, leaves)


def _plan(order: np.ndarray, sequence: np.ndarray, leaves: np.ndarray) -> Plan:
    """The plan of pieces that were placed in ``order``, each into its ``sequence``."""
    # By leaf, then by sequence; pieces of one sequence stay in the order of placing.
    order = order[np.lexsort((sequence[order], leaves[order]))]
    first = np.flatnonzero(np.diff(sequence[order], prepend=-1))
    starts = np.append(first, len(order))
    return Plan(order.astype(np.int64), starts, leaves[order[first]].astype(np.int64))
