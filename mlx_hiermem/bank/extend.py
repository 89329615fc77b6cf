"""Adding a memory to a bank, and taking it off again: one edit each, all of it or nothing.

An added memory is level-1 subtrees behind those of the tree, in files of its own (docs/format.md):
so what is there keeps its ids, and no level file that is there is written. Config, checksums, names
and manifest are written anew; they come into force in one moment (``journal``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..config import Added, MemoryConfig
from ..errors import FormatError, InputError
from . import journal
from .blocked import BLOCKED, BlockedBlocks, blocked_bytes
from .checksums import CHECKSUMS, SIZE, write_checksums
from .dtypes import STORAGE
from .edit import NAMES, BankEdit
from .header import build_header
from .layout import BLOCKS, CONFIG, Shard, added_tree, is_added_tree, level_of, shards
from .manifest import MANIFEST, FileEntry, Manifest, manifest_bytes, revision_of

#: level -> the stored rows of an added memory in their order, as a stream of (n, stored_size).
Rows = Callable[[int], Iterable[np.ndarray]]

_TREE = "tree.safetensors"


def check_new(folder: Path, config: MemoryConfig, name: str, roots: int = 1) -> MemoryConfig:
    """The config of a bank once a memory was added to it.

    Args:
        folder: the memory folder.
        config: of the bank as it is.
        name, roots: of the memory.

    Raises:
        InputError: the bank has a memory of that name, or no tree to add to.
        ConfigError: the name or the number cannot be, or the bank would be too large.
        FormatError: the folder cannot be written, or has no room.
    """
    added = Added(name, roots)
    if any(one.name == name for one in config.added):
        raise InputError(
            f"{folder}: has an added memory {name} already; give another --name, or remove that "
            f"one first (mlx_hiermem bank remove --name {name})"
        )
    if not (folder / _TREE).is_file():
        raise InputError(
            f"{folder}: this bank has no tree, so nothing could be routed to what is added; train "
            "it first"
        )
    if not os.access(folder, os.W_OK):
        raise FormatError(f"{folder}: cannot be written; copy the model to a place that can be")
    found = config.with_added([*config.added, added])
    _check_space(folder, added_bytes(found, name))
    return found


def added_bytes(config: MemoryConfig, name: str) -> int:
    """Bytes of the blocks of an added memory."""
    roots = config.added_roots()[name]
    return sum(
        config.block_bytes(level) * len(roots) * config.branching ** (level - 1)
        for level in config.memory_levels
    )


def add(
    folder: str | Path,
    name: str,
    roots: int,
    rows: Rows,
    tree: bytes,
    names: Callable[[bytes], bytes] | None = None,
    progress: Callable[[int, int], None] | None = None,
    step: Callable[[str], None] | None = None,
) -> str:
    """Add a memory to the bank in ``folder``.

    Args:
        folder: the memory folder.
        name: of the memory, 1 to 32 of a-z, 0-9 and -.
        roots: its clusters at level 1.
        rows: its blocks, as they are stored.
        tree: its file of centroids (``ClusterTree.added_bytes``).
        names: makes the new ``names.json`` of the present one; not asked where there is none.
        progress: called with (bytes to write in all, bytes written since the call before).
        step: called with a word before each step of the commit; for tests.

    Returns:
        The new revision.

    Raises:
        InputError, ConfigError, FormatError: as :func:`check_new`; the bank is damaged, or blocks
            are not what the config asks for. Nothing has changed then.
    """
    folder = Path(folder).expanduser()
    with _Extension(folder, progress, step) as edit:
        config = check_new(folder, edit.config, name, roots)
        digests = edit.digests()
        for level in config.memory_levels:
            source = iter(_single(rows(level)))
            for shard in shards(config, level):
                if shard.memory == name:
                    edit.new[shard.name] = _level_file(
                        config, shard, source, digests.get(f"level{level}")
                    )
        edit.total = added_bytes(config, name)
        edit.new[added_tree(name)] = [tree]
        edit.new[CONFIG] = [_config_bytes(config)]
        if names is not None and NAMES in edit.reader.manifest.files:
            edit.new[NAMES] = [names((folder / NAMES).read_bytes())]
        edit.checksums = digests
    return edit.revision


def drop(
    folder: str | Path,
    name: str,
    progress: Callable[[int, int], None] | None = None,
    step: Callable[[str], None] | None = None,
) -> str:
    """Take an added memory off a bank; the ids of those added after it move up.

    Its files are removed, not overwritten: see ``BankEdit.remove_blocks`` for what has to be gone
    from the disk. The files of the memories behind it are written anew, as they say where they
    begin.

    Returns:
        The new revision.

    Raises:
        InputError: the bank has no such memory.
        FormatError: the bank is damaged or cannot be written. Nothing has changed then.
    """
    folder = Path(folder).expanduser()
    with _Extension(folder, progress, step) as edit:
        old = edit.config
        if name not in old.added_roots():
            known = ", ".join(one.name for one in old.added) or "none"
            raise InputError(f"{folder}: has no added memory {name}; it has {known}")
        gone = old.added_roots()[name]
        config = old.with_added([one for one in old.added if one.name != name])
        behind = {other for other, roots in old.added_roots().items() if roots.start >= gone.stop}
        edit.gone = [added_tree(name)]
        for level in old.memory_levels:
            edit.gone += [s.name for s in shards(old, level) if s.memory == name]
            before = {shard.name: shard for shard in shards(old, level)}
            for shard in shards(config, level):
                if shard.memory in behind:
                    rows = edit.rows(level, before[shard.name])
                    edit.new[shard.name] = _level_file(config, shard, rows, None)
        edit.total = sum(added_bytes(old, other) for other in behind)
        edit.new[CONFIG] = [_config_bytes(config)]
        edit.checksums = {
            key: _without(old, key, table, gone) for key, table in edit.digests().items()
        }
        edit.drop_blocked(gone)
        if NAMES in edit.reader.manifest.files:
            edit.new[NAMES] = [_names_without(old, (folder / NAMES).read_bytes(), gone)]
    return edit.revision


class _Extension(BankEdit):
    """An edit that also makes and removes files.

    Attributes:
        new: name -> the pieces of a file, made when it is written.
        gone: names of files that are no part of the bank any more.
        checksums: tensor -> checksums, complete once all of ``new`` is written; {}: none.
        total: bytes of the level files that are written.
    """

    def __enter__(self) -> _Extension:
        super().__enter__()
        self.new: dict[str, Iterable[bytes | memoryview]] = {}
        self.gone: list[str] = []
        self.checksums: dict[str, bytearray] = {}
        self.total = 0
        return self

    def digests(self) -> dict[str, bytearray]:
        """The bank's checksums, to be changed; {} where it has none."""
        known = self.reader.checksums
        if known is None:
            return {}
        keys = [*(f"level{level}" for level in self.config.memory_levels), "generic"]
        return {key: bytearray(known[key].tobytes()) for key in keys}

    def rows(self, level: int, shard: Shard) -> Iterator[np.ndarray]:
        """The stored rows of a level file, (stored_size,) each, checked against the checksums."""
        for cluster in range(shard.first, shard.first + shard.rows):
            row = self.reader.stored(level, cluster)
            known = self.reader.checksums
            if known is not None:
                found = hashlib.sha256(row).digest()
                if found != known[f"level{level}"][cluster].tobytes():
                    raise FormatError(
                        f"{self.folder / shard.name}: block {cluster} of level {level} is not what "
                        f"{CHECKSUMS} says; copy or download the file again"
                    )
            yield row

    def drop_blocked(self, gone: range) -> None:
        """Forget what is blocked or removed below ``gone``, and move what is behind it up."""
        now = self.reader.blocked

        def moved(pairs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
            for level, cluster in pairs:
                below = self.config.branching ** (level - 1)
                if cluster // below < gone.start:
                    yield level, cluster
                elif cluster // below >= gone.stop:
                    yield level, cluster - len(gone) * below

        after = BlockedBlocks(moved(now), moved(now.removed))
        if (after, after.removed) != (now, now.removed):
            self.new[BLOCKED] = [blocked_bytes(after)]

    def _commit(self) -> None:
        changed: dict[str, FileEntry] = {}
        try:
            _check_space(self.folder, self.total)
            self._total = self.total
            self._step("write")
            for name, chunks in self.new.items():
                changed[name] = self._write(name, chunks)
            if self.checksums:
                entry = write_checksums(self.folder, self.checksums, journal.PREFIX + CHECKSUMS)
                self._keep_mode(CHECKSUMS)
                changed[CHECKSUMS] = entry
            files = {**self.reader.manifest.files, **changed}
            files = {name: files[name] for name in sorted(files) if name not in self.gone}
            manifest = Manifest(files, revision_of(files))
            self._write(MANIFEST, [manifest_bytes(manifest)])
            self._step("journal")
            journal.commit(self.folder, [*changed, MANIFEST])
        except BaseException:
            self._clear()
            raise
        self.revision = manifest.revision
        self._step("apply")
        journal.apply(self.folder, self._step)
        self._clear()
        for name in self._unlisted(manifest):
            (self.folder / name).unlink(missing_ok=True)
        self._step("done")

    def _unlisted(self, manifest: Manifest) -> list[str]:
        """Level and tree files that the bank has not, also those that an edit which was killed has
        left."""
        return [
            path.name
            for path in self.folder.iterdir()
            if (level_of(path.name) is not None or is_added_tree(path.name))
            and path.name not in manifest.files
        ]


def _level_file(
    config: MemoryConfig, shard: Shard, rows: Iterator[np.ndarray], digests: bytearray | None
) -> Iterator[bytes | memoryview]:
    """A level file from the next ``shard.rows`` rows, as a stream.

    Args:
        digests: takes the checksum of each row.
    """
    size = config.stored_size(shard.level)
    dtype = np.dtype(STORAGE[config.stored_dtype])
    yield build_header(BLOCKS, config.stored_dtype, (shard.rows, size), shard.metadata)
    for _ in range(shard.rows):
        row = next(rows, None)
        if row is None or row.shape != (size,) or row.dtype != dtype:
            found = "no more rows" if row is None else f"{row.shape} {row.dtype}"
            raise FormatError(f"{shard.name}: given {found}, expected {(size,)} {dtype}")
        row = np.ascontiguousarray(row)
        if digests is not None:
            digests += hashlib.sha256(row).digest()
        yield memoryview(row).cast("B")


def _single(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for chunk in chunks:
        yield from chunk


def _config_bytes(config: MemoryConfig) -> bytes:
    return (json.dumps(config.to_dict(), indent=2) + "\n").encode()


def _without(config: MemoryConfig, key: str, table: bytearray, gone: range) -> bytearray:
    """Checksums of a tensor without those below ``gone``."""
    if key == "generic":
        return table
    below = SIZE * config.branching ** (int(key.removeprefix("level")) - 1)
    return table[: gone.start * below] + table[gone.stop * below :]


def _names_without(config: MemoryConfig, data: bytes, gone: range) -> bytes:
    """``names.json`` without the names below ``gone``; as it is where that is not what it says."""
    try:
        table: Mapping[str, Sequence[str]] = json.loads(data)
        kept = {}
        for key, found in table.items():
            below = config.branching ** (int(key.removeprefix("level")) - 1)
            if len(found) != config.roots * below:
                return data
            kept[key] = [*found[: gone.start * below], *found[gone.stop * below :]]
    except (ValueError, AttributeError, TypeError):
        return data
    return (json.dumps(kept, ensure_ascii=False, indent=0) + "\n").encode()


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + (1 << 20):
        raise FormatError(
            f"{folder}: the added memory takes {size:,} bytes, and {free:,} are free; make room on "
            "the disk"
        )
