"""A corpus folder: what ``cluster`` writes and ``train`` reads.

::

    corpus/
      corpus.json              CorpusInfo; written last
      tokenizer/               the tokenizer's files
      routing/                 tree.safetensors and what the encoder needs: copied into a model
      train/00000.tokens.npy   (n, T) uint16, or uint32 where the vocabulary needs it
      train/00000.leaves.npy   (n,) int64
      validation/              likewise; may be absent

Notable: opening reads the headers of the shards and the leaves, never the tokens, and checks their
sizes; :meth:`Corpus.verify` reads everything and checks the sha256 of it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ..routing.tree import ClusterTree
from .info import INFO, SPLITS, CorpusInfo, SplitInfo
from .packed import PackedCorpus, ShardedTokens, TokenShard

__all__ = ["Corpus", "CorpusInfo", "file_sha256", "folder_sha256"]

TREE = "tree.safetensors"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """An open corpus.

    Attributes:
        folder: where it is.
        info: the table of ``corpus.json``.
        splits: the sequences of each split.
    """

    folder: Path
    info: CorpusInfo
    splits: Mapping[str, PackedCorpus]

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Open ``folder`` and check that it is whole.

        Raises:
            FormatError: a file is missing, or its size, dtype or shape is not what ``corpus.json``
                says; the text names the file.
        """
        folder = Path(folder)
        info = CorpusInfo.load(folder)
        tokenizer, tree = folder / "tokenizer", folder / "routing" / TREE
        if not tokenizer.is_dir() or not _files(tokenizer):
            raise FormatError(
                f"{tokenizer}: no such folder, or nothing in it; copy the corpus again or run "
                "cluster again"
            )
        if not tree.is_file():
            raise FormatError(f"{tree}: no such file; copy the corpus again or run cluster again")
        splits = {
            name: _open_split(folder / name, info, info.splits[name])
            for name in SPLITS
            if name in info.splits
        }
        return cls(folder, info, splits)

    @property
    def train(self) -> PackedCorpus:
        """The sequences to train on."""
        return self.splits["train"]

    @property
    def validation(self) -> PackedCorpus | None:
        """The sequences that are kept out of training, if any are."""
        return self.splits.get("validation")

    @property
    def revision(self) -> str:
        """The sha256 of the table, which in turn names that of every shard."""
        return self.info.revision

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def routing_folder(self) -> Path:
        return self.folder / "routing"

    def tree(self) -> ClusterTree:
        """The tree that the corpus was assigned by.

        Raises:
            FormatError: it is damaged, or is not the tree of this corpus.
        """
        path = self.routing_folder / TREE
        found = file_sha256(path)
        if found != self.info.tree_sha256:
            raise _differs(path, found, self.info.tree_sha256)
        tree = ClusterTree.load(path)
        shape = (self.info.branching, self.info.levels)
        if (tree.branching, tree.levels) != shape:
            raise FormatError(
                f"{path}: a tree of branching {tree.branching} and {tree.levels} levels, but "
                f"{INFO} says {shape[0]} and {shape[1]}; run cluster again"
            )
        return tree

    def verify(self, progress: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
        """Read every file that the table has a sha256 of, and compare.

        Args:
            progress: called with the number of bytes read since the call before.

        Returns:
            For each of them ``{"file", "bytes", "sha256", "ok": True}``; the tokenizer's folder is
            one entry.

        Raises:
            FormatError: at the first that differs, naming it.
        """
        wanted = {f"routing/{TREE}": self.info.tree_sha256}
        for name, split in self.info.splits.items():
            for shard in split.shards:
                wanted[f"{name}/{shard.tokens}"] = shard.tokens_sha256
                wanted[f"{name}/{shard.leaves}"] = shard.leaves_sha256
        results = []
        for name, sha256 in wanted.items():
            path = self.folder / name
            found = file_sha256(path, progress)
            if found != sha256:
                raise _differs(path, found, sha256)
            results.append(_result(name, path.stat().st_size, found))
        found = folder_sha256(self.tokenizer_folder)
        if found != self.info.tokenizer["sha256"]:
            raise _differs(self.tokenizer_folder, found, self.info.tokenizer["sha256"])
        size = sum(path.stat().st_size for path in _files(self.tokenizer_folder))
        return [*results, _result("tokenizer", size, found)]


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The sha256 (hex) of a file; ``progress`` gets the bytes of each step."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if progress is not None:
                    progress(len(chunk))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """The sha256 (hex) of the lines ``<sha256>  <name>`` of a folder's files, ordered by name.

    These are the lines that ``sha256sum`` prints. Hidden files and folders are left out.
    """
    lines = (f"{file_sha256(path)}  {path.name}\n" for path in _files(folder))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )


def _result(name: str, size: int, sha256: str) -> dict[str, Any]:
    return {"file": name, "bytes": size, "sha256": sha256, "ok": True}


def _differs(path: Path, found: str, expected: str) -> FormatError:
    return FormatError(
        f"{path}: altered: sha256 is {found}, {INFO} says {expected}; copy it again or run cluster "
        "again"
    )


def _open_split(folder: Path, info: CorpusInfo, split: SplitInfo) -> PackedCorpus:
    shards, leaves = [], []
    for shard in split.shards:
        shape = (shard.sequences, info.sequence_length)
        path = folder / shard.tokens
        shards.append(TokenShard(path, _check_array(path, info.token_dtype, shape), shape[0]))
        leaves.append(_read_leaves(folder / shard.leaves, shard.sequences, info))
    tokens = ShardedTokens(shards, info.sequence_length, info.token_dtype)
    return PackedCorpus(tokens, np.concatenate(leaves), info.tokenizer["end_of_text"])


def _read_leaves(path: Path, count: int, info: CorpusInfo) -> np.ndarray:
    """(count,) int64 leaves, all of which the tree has."""
    offset = _check_array(path, np.dtype("<i8"), (count,))
    try:
        leaves = np.fromfile(path, "<i8", count, offset=offset)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    if len(leaves) != count:  # NumPy does not tell of a read that fails
        raise FormatError(f"{path}: cannot be read to its end; copy it again or run cluster again")
    if leaves.min() < 0 or leaves.max() >= info.leaves:
        raise FormatError(
            f"{path}: holds a leaf beyond the {info.leaves} of the tree; copy it again or run "
            "cluster again"
        )
    return leaves.astype(np.int64, copy=False)


def _check_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Check that ``path`` is a .npy of this dtype, shape and size; returns where the numbers start.

    Only the header is read, and nothing in it is ever unpickled.
    """

    def wrong(found: str) -> FormatError:
        return FormatError(f"{path}: {found}; copy it again or run cluster again")

    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise wrong("not a regular file")
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise wrong(f"a .npy of version {version}, expected (1, 0)")
            found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
    except FileNotFoundError:
        raise wrong("no such file") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    except FormatError:
        raise
    except Exception:  # NumPy reads the header as a piece of Python, which may fail in any way
        raise wrong("not a .npy file: its header cannot be read") from None
    if found_dtype != dtype or found_shape != shape or (fortran and len(shape) > 1):
        order = " in Fortran order" if fortran else ""
        raise wrong(
            f"holds {str(found_dtype)[:40]} of shape {str(found_shape)[:40]}{order}; {INFO} says "
            f"{dtype.name} of shape {shape}"
        )
    size = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if status.st_size != size:
        state = "truncated" if status.st_size < size else "too long"
        raise wrong(f"{state}: {status.st_size} bytes, expected {size}")
    return offset
