"""Parts in, shards of packed sequences out, in an order shuffled over the whole split.

Only indices are in memory (some 90 bytes a window at the peak); tokens are read from the parts for
one shard at a time. Notable: each shard appears whole or not at all, and the same parts, placements
and seed give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FormatError, TrainingError
from ..files import AtomicFile
from .info import ShardInfo, SplitInfo, token_dtype
from .packed import read_pieces
from .packing import Plan, best_fit, cut
from .part import read_part, tokens_place

#: Bytes of a shard's tokens: large enough to be few, small enough to be gathered in memory.
SHARD_BYTES = 64 << 20

_WRITE = 1 << 22  # bytes handed to a file at a time
_OURS = re.compile(r"\d{5,}\.(tokens|leaves)\.npy")

#: Called with what is being done ("pack" or "write"), how much is done, and of how much: pieces of
#: windows, then sequences.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Placed:
    """Windows of one part, each with a leaf that it is to be packed under.

    Attributes:
        path: the part.
        windows: (P,) int64; a window may come more than once, each time under another leaf.
        leaves: (P,) int64.
    """

    path: Path
    windows: np.ndarray
    leaves: np.ndarray


@dataclass(frozen=True)
class _Pieces:
    """All pieces of a split: where each lies, and what the split's documents come to."""

    parts: np.ndarray  # (P,) int32
    starts: np.ndarray  # (P,) int64, the first token within the part
    lengths: np.ndarray  # (P,) int64
    leaves: np.ndarray  # (P,) int64
    documents: int
    tokens: int


def write_split(
    folder: str | Path,
    placed: Sequence[Placed],
    *,
    length: int,
    end_of_text: int,
    vocab_size: int,
    seed: int,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> SplitInfo:
    """Pack a split and write its shards: ``00000.tokens.npy``, ``00000.leaves.npy``, ...

    Args:
        folder: of the split; is made if need be. Shards of an earlier run in it are replaced.
        placed: the parts in order, with the windows of this split.
        length: T, tokens of a sequence.
        end_of_text: fills up the room that is left in a sequence.
        vocab_size: decides the dtype of tokens; an id beyond it is refused.
        seed: of the order of the sequences.
        progress: see :data:`Progress`.
        shard_bytes: about the size of a shard.

    Raises:
        TrainingError: there is nothing to pack, or ``length`` is too short to predict anything.
        FormatError: a part is damaged or does not fit, or a shard cannot be written.
    """
    folder = Path(folder)
    if length < 2:
        raise TrainingError(f"sequence length {length}: expected at least 2 tokens")
    dtype = token_dtype(vocab_size)
    pieces = _collect(placed, length, dtype)
    if not len(pieces.parts):
        raise TrainingError("the corpus has no documents; give at least one with text in it")
    plan = best_fit(
        pieces.lengths,
        pieces.leaves,
        length,
        progress and (lambda done, total: progress("pack", done, total)),
    )
    order = np.random.default_rng(seed).permutation(plan.sequences)
    rows = max(1, shard_bytes // (length * dtype.itemsize))
    _make(folder)
    shards: list[ShardInfo] = []
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        gather = _Gather(placed, pieces, plan, chosen, length, dtype)
        tokens = gather.tokens(end_of_text, vocab_size)
        shards.append(_write_shard(folder, len(shards), tokens, plan.leaves[chosen]))
        if progress is not None:
            progress("write", first + len(chosen), len(order))
    _remove_others(folder, shards)
    fill = int(pieces.lengths.sum()) / (plan.sequences * length)
    return SplitInfo(pieces.documents, pieces.tokens, plan.sequences, fill, tuple(shards))


def _collect(placed: Sequence[Placed], length: int, dtype: np.dtype) -> _Pieces:
    """Cut the placed windows of every part into pieces."""
    columns: list[tuple[np.ndarray, ...]] = []
    documents = tokens = 0
    for number, entry in enumerate(placed):
        part = read_part(entry.path)
        if part.tokens.dtype != dtype:
            raise FormatError(
                f"{entry.path}: tokens are {part.tokens.dtype}, expected {dtype.name} for this "
                "vocabulary; remove the file and run cluster again"
            )
        windows = np.asarray(entry.windows, np.int64)
        if len(windows) != len(entry.leaves) or (
            len(windows) and not 0 <= windows.min() <= windows.max() < part.windows
        ):
            raise FormatError(
                f"{entry.path}: windows to pack are not those of the part, which has "
                f"{part.windows}; remove the file and run cluster again"
            )
        once = np.unique(windows)
        documents += len(np.unique(part.documents[once]))
        tokens += int(part.lengths[once].sum())
        made = cut(part.lengths[windows], length)
        columns.append(
            (
                np.full(len(made.windows), number, np.int32),
                part.starts[windows][made.windows] + made.starts,
                made.lengths,
                np.asarray(entry.leaves, np.int64)[made.windows],
            )
        )
    empty = [np.empty(0, kind) for kind in (np.int32, np.int64, np.int64, np.int64)]
    joined = [np.concatenate(column) for column in zip(*columns, strict=True)] or empty
    parts, starts, lengths, leaves = joined
    return _Pieces(parts, starts, lengths, leaves, documents, tokens)


class _Gather:
    """Gathers the tokens of some sequences of a plan from the parts."""

    def __init__(
        self,
        placed: Sequence[Placed],
        pieces: _Pieces,
        plan: Plan,
        chosen: np.ndarray,
        length: int,
        dtype: np.dtype,
    ) -> None:
        self._placed, self._dtype = placed, dtype
        self._shape = (len(chosen), length)
        counts = plan.starts[chosen + 1] - plan.starts[chosen]
        ends = np.cumsum(counts)
        # The pieces of the chosen sequences, sequence after sequence.
        numbers = np.repeat(plan.starts[chosen] - (ends - counts), counts) + np.arange(ends[-1])
        mine = plan.pieces[numbers]
        own = Plan(np.arange(len(mine)), np.append(0, ends), plan.leaves[chosen])
        self._lengths = pieces.lengths[mine]
        self._places = own.places(self._lengths, length)
        self._parts, self._starts = pieces.parts[mine], pieces.starts[mine]

    def tokens(self, end_of_text: int, vocab_size: int) -> np.ndarray:
        """(n, T) tokens, filled up with ``end_of_text``; ends and ids are checked."""
        found = np.full(self._shape, end_of_text, self._dtype)
        flat = found.reshape(-1)
        data, width = memoryview(flat.view(np.uint8)), self._dtype.itemsize
        # In the order of the parts, so that each is opened once and read forwards.
        order = np.lexsort((self._starts, self._parts))
        bounds = np.flatnonzero(np.diff(self._parts[order], prepend=-1))
        for here in np.split(order, bounds[1:]):
            path = self._placed[self._parts[here[0]]].path
            _, offset, _ = tokens_place(path)
            columns = (
                self._starts[here] * width + offset,
                self._places[here] * width,
                (self._places[here] + self._lengths[here]) * width,
            )
            pieces = zip(*(column.tolist() for column in columns), strict=True)
            read_pieces(path, ((at, data[start:end]) for at, start, end in pieces))
            # Pieces are told apart by the end-of-text alone: without it at the end of a short one
            # attention would run on into the next document.
            short = here[self._lengths[here] < self._shape[1]]
            if (flat[self._places[short] + self._lengths[short] - 1] != end_of_text).any():
                raise FormatError(
                    f"{path}: a document does not end with the end-of-text token {end_of_text}, or "
                    f"a window inside one is not a multiple of {self._shape[1]} tokens; run "
                    "cluster again"
                )
        if found.max() >= vocab_size:
            piece = np.argsort(self._places)[
                np.searchsorted(np.sort(self._places), flat.argmax(), "right") - 1
            ]
            raise FormatError(
                f"{self._placed[self._parts[piece]].path}: holds token {flat.max()}, but the "
                f"tokenizer has {vocab_size} ids; remove the file and run cluster again"
            )
        return found


def _write_shard(folder: Path, number: int, tokens: np.ndarray, leaves: np.ndarray) -> ShardInfo:
    of_tokens, of_leaves = f"{number:05d}.tokens.npy", f"{number:05d}.leaves.npy"
    tokens_sha256 = _write_array(folder, of_tokens, tokens)
    leaves_sha256 = _write_array(folder, of_leaves, leaves.astype("<i8"))
    return ShardInfo(of_tokens, of_leaves, len(tokens), tokens_sha256, leaves_sha256)


def _write_array(folder: Path, name: str, array: np.ndarray) -> str:
    """Write a .npy file; returns its sha256."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    data = memoryview(array.reshape(-1).view(np.uint8))
    with AtomicFile(folder, name) as file:
        file.write(header.getvalue())
        for start in range(0, len(data), _WRITE):
            file.write(data[start : start + _WRITE])
    return file.sha256


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{folder}: cannot be made ({error.strerror})") from None


def _remove_others(folder: Path, shards: Sequence[ShardInfo]) -> None:
    """Remove the shards of an earlier run that had more of them."""
    ours = {name for shard in shards for name in (shard.tokens, shard.leaves)}
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in ours:
            path.unlink()
