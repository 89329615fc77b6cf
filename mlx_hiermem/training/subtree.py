"""The result of ``train --subtree I``: the memories of one level-1 subtree, as a folder.

    subtree.json                                    what it is, and the files below; written last
    level-1-row.safetensors                         blocks (1, s_1): the row of cluster I
    level-2-00003-of-00016.safetensors ...          the bank's own shards of this subtree

Notable: the shards of the deeper levels are byte for byte those of the merged bank, under their
names there, so that merging moves no number; a level of rank 0 has no files.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..bank.dtypes import STORAGE
from ..bank.files import hash_file, open_file, read_exact, read_text
from ..bank.header import Header, read_header
from ..bank.layout import BLOCKS, Shard, check_header, shards
from ..bank.manifest import FileEntry
from ..bank.writer import write_shard
from ..config import MemoryConfig
from ..errors import ConfigError, FormatError
from ..files import AtomicFile, sync_folder

FORMAT_VERSION = 1
FILE = "subtree.json"

_SHA256 = re.compile("[0-9a-f]{64}")
_KEYS = (
    "format_version", "subtree", "memory_config", "anchor_sha256", "tree_sha256",
    "corpus_revision", "settings", "files",
)  # fmt: skip


@dataclass(frozen=True)
class _Row(Shard):
    """The one row of level 1 in a file of its own; ``first`` is its cluster."""

    @property
    def name(self) -> str:
        return "level-1-row.safetensors"


@dataclass(frozen=True)
class SubtreeResult:
    """What ``subtree.json`` says.

    Attributes:
        folder: where it is.
        subtree: the level-1 cluster, from 0.
        config: of the whole bank.
        anchor_sha256, tree_sha256: see ``fingerprints.py``.
        corpus_revision: of the corpus's ``corpus.json``.
        settings: the training settings.
        files: size and sha256 of each file.
    """

    folder: Path
    subtree: int
    config: MemoryConfig
    anchor_sha256: str
    tree_sha256: str
    corpus_revision: str
    settings: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    def files_of(self, level: int) -> tuple[Shard, ...]:
        """The files that hold the subtree's clusters of ``level``, in their order."""
        return subtree_files(self.config, self.subtree, level)

    def verify(self, name: str, progress: Callable[[int], None] | None = None) -> FileEntry:
        """Read the file ``name`` and compare it with its checksum.

        Args:
            progress: called with the bytes read since the call before.

        Raises:
            FormatError: it was altered, or cannot be read.
        """
        self.check(name, FileEntry(*hash_file(self.folder, name, progress)))
        return self.files[name]

    def check(self, name: str, found: FileEntry) -> None:
        """Raise FormatError where ``found`` is not what ``subtree.json`` says of ``name``."""
        if found != self.files[name]:
            raise FormatError(
                f"{self.folder / name}: altered: {found.bytes} bytes, sha256 {found.sha256[:12]}…; "
                f"{FILE} says {self.files[name].bytes}, {self.files[name].sha256[:12]}…; copy the "
                "folder again, or run this subtree again"
            )


def subtree_files(config: MemoryConfig, subtree: int, level: int) -> tuple[Shard, ...]:
    """The files that a result holds of ``level``: none where the level has no memory.

    Raises:
        ConfigError: ``subtree`` is not a cluster of level 1.
    """
    if not 0 <= subtree < config.branching:
        raise ConfigError(
            f"subtree {subtree}: expected a cluster of level 1, 0 to {config.branching - 1}"
        )
    parts = shards(config, level)
    if level == 1:
        return (_Row(1, 0, 1, subtree, 1),) if parts else ()
    first = subtree * config.clusters(level - 1)
    return tuple(part for part in parts if first <= part.first < first + config.clusters(level - 1))


def write_subtree(
    folder: str | Path,
    config: MemoryConfig,
    subtree: int,
    rows: Callable[[int], Iterable[np.ndarray]],
    *,
    anchor_sha256: str,
    tree_sha256: str,
    corpus_revision: str,
    settings: Mapping[str, Any],
    progress: Callable[[int], None] | None = None,
) -> SubtreeResult:
    """Write the result of one subtree; a result that is there is replaced.

    Args:
        folder: made if missing.
        config: of the whole bank; names the shape of its anchor.
        rows: level -> the rows of the subtree's clusters in their order, as arrays (n, s_l) of
            float32 or of the config's storage dtype; read as a stream.
        settings: the training settings; all that has to be equal in the runs that are merged.
        progress: called with the rows written since the call before.

    Raises:
        FormatError: the rows do not have the number and shape that the config asks for, or a file
            cannot be written; no ``subtree.json`` is left then.
        ConfigError: ``subtree`` is not a cluster of level 1.
    """
    folder = Path(folder)
    plan = {level: subtree_files(config, subtree, level) for level in config.memory_levels}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise FormatError(f"{folder}: cannot be written ({error.strerror})") from None
    files: dict[str, FileEntry] = {}
    for level, parts in plan.items():
        stream = _one_by_one(rows(level), progress)
        for part in parts:
            files[part.name] = write_shard(folder, config, part, islice(stream, part.rows))
        if next(stream, None) is not None:
            raise FormatError(f"{folder}: level {level} is given more rows than its clusters")
    table = {
        "format_version": FORMAT_VERSION,
        "subtree": subtree,
        "memory_config": config.to_dict(),
        "anchor_sha256": anchor_sha256,
        "tree_sha256": tree_sha256,
        "corpus_revision": corpus_revision,
        "settings": {name: _plain(value) for name, value in settings.items()},
        "files": {
            name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in files.items()
        },
    }
    with AtomicFile(folder, FILE) as file:
        file.write((json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode())
    return read_subtree(folder)


def read_subtree(folder: str | Path) -> SubtreeResult:
    """Read a result: ``subtree.json``, and the size and header of every file; see ``verify``.

    Raises:
        FormatError: it is not there, damaged, or not what this version writes.
    """
    folder = Path(folder)
    path = folder / FILE

    def wrong(found: str) -> FormatError:
        return FormatError(f"{path}: {found}; copy the folder again, or run this subtree again")

    if not path.exists():
        if not folder.is_dir():
            raise FormatError(f"{folder}: no such folder; expected a run of `train --subtree`")
        if (folder / "model").is_dir():
            raise FormatError(
                f"{folder}: the run trained a whole model, {folder / 'model'}, which needs no "
                "merging; expected a run of `train --subtree`"
            )
        raise FormatError(
            f"{path}: no such file; the run has not come to its end, or was not copied whole; "
            "resume it, or copy it again"
        )
    try:
        table = json.loads(read_text(folder, FILE))
    except (ValueError, RecursionError) as error:
        raise wrong(f"not valid JSON ({str(error)[:80]})") from None
    if not isinstance(table, dict):
        raise wrong("not a JSON object")
    if table.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format_version is {str(table.get('format_version'))[:40]}, expected "
            f"{FORMAT_VERSION}; merge with the version of mlx_hiermem that wrote it"
        )
    if set(table) != set(_KEYS):
        odd = ", ".join(sorted(set(table) ^ set(_KEYS)))
        raise wrong(f"keys that are missing or unknown: {odd[:80]}")
    for key in ("anchor_sha256", "tree_sha256", "corpus_revision"):
        if not isinstance(table[key], str) or not _SHA256.fullmatch(table[key]):
            raise wrong(f"{key} is {str(table[key])[:40]!r}, expected 64 hex digits")
    if not isinstance(table["settings"], dict):
        raise wrong("settings is not an object")
    try:
        config = MemoryConfig.from_dict(table["memory_config"])
        config.anchor_shape()
        if type(table["subtree"]) is not int:
            raise ConfigError(f"subtree is {str(table['subtree'])[:40]!r}, expected an integer")
        parts = [
            part
            for level in config.memory_levels
            for part in subtree_files(config, table["subtree"], level)
        ]
    except ConfigError as error:
        raise wrong(str(error)) from None
    if not isinstance(table["files"], dict) or set(table["files"]) != {p.name for p in parts}:
        raise wrong(f"files does not list exactly the {len(parts)} files of this subtree")
    files = {}
    for part in parts:
        entry = table["files"][part.name]
        if not (
            isinstance(entry, dict)
            and set(entry) == {"bytes", "sha256"}
            and type(entry["bytes"]) is int
            and isinstance(entry["sha256"], str)
            and _SHA256.fullmatch(entry["sha256"])
        ):
            raise wrong(f"the entry of {part.name} is not an object of bytes and sha256")
        files[part.name] = FileEntry(entry["bytes"], entry["sha256"])
        _check_file(folder, config, part, entry["bytes"])
    facts = {key: table[key] for key in _KEYS[3:7]}
    return SubtreeResult(folder, table["subtree"], config, files=files, **facts)


def read_rows(result: SubtreeResult, part: Shard) -> np.ndarray:
    """The rows of one file as a storage array (rows, s_l).

    Raises:
        FormatError: the file was truncated, or cannot be read.
    """
    path = result.folder / part.name
    header = _check_file(result.folder, result.config, part, result.files[part.name].bytes)
    # Not mapped: where a disk goes away, that ends the process without a word.
    rows = np.empty(header.shape, STORAGE[header.dtype])
    fd, _ = open_file(result.folder, part.name)
    try:
        read_exact(fd, memoryview(rows.reshape(-1)).cast("B"), header.offset, path)
    finally:
        os.close(fd)
    return rows


def _check_file(folder: Path, config: MemoryConfig, part: Shard, size: int) -> Header:
    fd, found = open_file(folder, part.name)
    try:
        if found != size:
            state = "truncated" if found < size else "changed"
            raise FormatError(
                f"{folder / part.name}: {state}: {found} bytes, {FILE} says {size}; copy the "
                "folder again, or run this subtree again"
            )
        header = read_header(fd, found, folder / part.name, BLOCKS)
    finally:
        os.close(fd)
    shape = (part.rows, config.block_size(part.level))
    check_header(header, config, folder / part.name, shape, part.metadata)
    return header


def _one_by_one(
    chunks: Iterable[np.ndarray], progress: Callable[[int], None] | None
) -> Iterator[np.ndarray]:
    # (n, s_l) -> n times (1, s_l), so that the stream can be cut at the borders of the shards.
    for chunk in chunks:
        for start in range(len(chunk)):
            yield chunk[start : start + 1]
            if progress is not None:
                progress(1)


def _plain(value: Any) -> Any:
    """What JSON takes; a number that is not finite, such as a clipping of inf, as a text."""
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value
