"""Packed sequences, each with the leaf of its cluster path: in memory, or on disk.

What is on disk stays there: a batch reads its own rows and nothing else, and no file is held open
in between, so that a corpus may have more shards than a process may have files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FormatError, TrainingError
from .packing import cut, next_fit


@dataclass(frozen=True)
class TokenShard:
    """A file that holds the tokens of some sequences.

    Attributes:
        path: the file.
        offset: where its numbers start, in bytes.
        sequences: rows in it.
    """

    path: Path
    offset: int
    sequences: int


class ShardedTokens:
    """(N, T) token ids in files, taken by row as from an array.

    Args:
        shards: the files, in order.
        length: T.
        dtype: of the numbers in the files.
    """

    ndim = 2

    def __init__(self, shards: Sequence[TokenShard], length: int, dtype: np.dtype) -> None:
        self.shards = tuple(shards)
        self.dtype = np.dtype(dtype)
        # (shards + 1,): the first row of each shard.
        self._starts = np.cumsum([0, *(shard.sequences for shard in self.shards)])
        self.shape = (int(self._starts[-1]), length)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray | int) -> np.ndarray:
        """Rows by their numbers: (T,) for one, (B, T) for an array of them; a slice is (n, T).

        Raises:
            IndexError: a number is out of range.
            FormatError: a file is gone, or shorter than it was when the corpus was opened.
        """
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(len(self)))
        wanted = np.asarray(indices)
        if wanted.dtype.kind not in "iu" and wanted.size:
            raise IndexError(f"sequences are taken by integers, not by {wanted.dtype}")
        wanted = wanted.astype(np.int64)
        rows = np.atleast_1d(wanted)
        rows = np.where(rows < 0, rows + len(self), rows)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"a sequence out of range: the corpus has {len(self)}")
        length = self.shape[1]
        found = np.empty((len(rows), length), self.dtype)
        data = memoryview(found.reshape(-1).view(np.uint8))
        width = length * self.dtype.itemsize
        # In the order of the files, so that each is opened once and read forwards.
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], self._starts)
        for number, shard in enumerate(self.shards):
            here = order[bounds[number] : bounds[number + 1]]
            if len(here):
                places = (rows[here] - self._starts[number]) * width + shard.offset
                pieces = zip(places.tolist(), (here * width).tolist(), strict=True)
                read_pieces(shard.path, ((at, data[to : to + width]) for at, to in pieces))
        return found if wanted.ndim else found[0]


def read_pieces(path: Path, pieces: Iterable[tuple[int, memoryview]]) -> None:
    """Fill each buffer (bytes) with what the file holds from its offset on.

    Raises:
        FormatError: the file is gone, unreadable or too short.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            for offset, buffer in pieces:
                done = 0
                while done < len(buffer):
                    count = os.preadv(fd, [buffer[done:]], offset + done)
                    if count == 0:
                        raise FormatError(
                            f"{path}: truncated: it ends before byte {offset + len(buffer)}; copy "
                            "it again or run cluster again"
                        )
                    done += count
        finally:
            os.close(fd)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class SelectedRows:
    """Some rows of (N, T) tokens, by number; nothing is copied until they are taken."""

    tokens: np.ndarray | ShardedTokens
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.rows), self.tokens.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: np.ndarray | int | slice) -> np.ndarray:
        return self.tokens[self.rows[indices]]


@dataclass(frozen=True)
class PackedCorpus:
    """Packed sequences and the leaf that each belongs to.

    Attributes:
        tokens: (N, T) integers: an array, or what is taken from by row like one.
        leaves: (N,) int64, cluster ids at the deepest level; shallower ids follow from nesting.
        end_of_text: the token at the end of each document.
    """

    tokens: np.ndarray | ShardedTokens | SelectedRows
    leaves: np.ndarray
    end_of_text: int

    def __len__(self) -> int:
        return len(self.leaves)

    @property
    def sequence_length(self) -> int:
        """T, tokens of a sequence."""
        return self.tokens.shape[1]

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sequences with these numbers: (B, T) int32 tokens and (B,) int64 leaves."""
        indices = np.asarray(indices)
        return self.tokens[indices].astype(np.int32), self.leaves[indices]

    def select(self, which: np.ndarray) -> PackedCorpus:
        """The sequences that a mask (N,) bool or their numbers (M,) choose, in that order.

        The tokens are not copied.
        """
        which = np.asarray(which)
        rows = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
        tokens = self.tokens
        if isinstance(tokens, SelectedRows):
            selected = SelectedRows(tokens.tokens, tokens.rows[rows])
        else:
            selected = SelectedRows(tokens, rows)
        return PackedCorpus(selected, self.leaves[rows], self.end_of_text)


def pack(
    documents: Iterable[tuple[Sequence[int], int]], length: int, end_of_text: int
) -> PackedCorpus:
    """Pack (tokens, leaf) pairs into sequences of ``length`` tokens, in memory and in their order.

    Documents of one leaf follow each other (``packing.next_fit``). The atlas was trained on this
    order; ``writer.write_split`` packs more densely.

    Args:
        documents: tokens without an end-of-text token, and the leaf's cluster id.
        length: T, tokens of a sequence.
        end_of_text: token id put after each document.

    Raises:
        TrainingError: there is no document, or ``length`` is too short to predict anything.
    """
    if length < 2:
        raise TrainingError(f"sequence length {length}: expected at least 2 tokens")
    texts: list[np.ndarray] = []
    leaves: list[int] = []
    for text, leaf in documents:
        texts.append(np.asarray([*text, end_of_text], np.int32))
        leaves.append(int(leaf))
    if not texts:
        raise TrainingError("the corpus has no documents; give at least one with text in it")
    return pack_windows(texts, leaves, length, end_of_text)


def pack_windows(
    texts: Sequence[np.ndarray], leaves: Sequence[int], length: int, end_of_text: int
) -> PackedCorpus:
    """Pack windows as they are, each under its leaf: only a document's last ends with end-of-text.

    Args:
        texts: token ids of each window.
        leaves: the leaf's cluster id of each.
        length, end_of_text: as :func:`pack`.
    """
    pieces = cut(np.asarray([len(text) for text in texts]), length)
    plan = next_fit(pieces.lengths, np.asarray(leaves, np.int64)[pieces.windows], length)
    tokens = np.full((plan.sequences, length), end_of_text, np.int32)
    flat = tokens.reshape(-1)
    columns = (plan.places(pieces.lengths, length), plan.pieces)
    for to, piece in zip(*(column.tolist() for column in columns), strict=True):
        start, size = pieces.starts[piece], pieces.lengths[piece]
        flat[to : to + size] = texts[pieces.windows[piece]][start : start + size]
    return PackedCorpus(tokens, plan.leaves, end_of_text)
