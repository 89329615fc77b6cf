"""A bank of zeros, which has no effect on the anchor: written without its time and its space.

Notable:
- The files are sparse: a header, and a length. What was never written reads as zeros and takes no
  space on the disk, where the file system has sparse files (all but FAT, exFAT and HFS+).
- The manifest names the sha256 of every file, and no two headers are the same. So each file is
  hashed, but out of one small buffer that stays in the processor's cache, on all cores at once.
- The checksum of a block is made once per level.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from ..config import MemoryConfig
from ..errors import ConfigError, FormatError
from ..files import AtomicFile
from .checksums import CHECKSUMS, write_checksums
from .dtypes import STORAGE
from .header import build_header
from .layout import BLOCKS, CONFIG, GENERIC, GENERIC_TENSOR, shards
from .manifest import MANIFEST, FileEntry, write_manifest

#: Called with (bytes in all, bytes hashed since the call before).
Progress = Callable[[int, int], None]

#: Most clusters of the deepest level: as many as ``cluster`` grows a tree for.
MOST_CLUSTERS = 1 << 24

_ZEROS = memoryview(bytes(1 << 20))
# Large enough that no file system gives it space as a whole from the start.
_PROBE_BYTES = 1 << 26
# Seconds between two calls of ``progress``.
_TICK = 0.1


@dataclass(frozen=True)
class FreshBank:
    """What was written.

    Attributes:
        revision: of the bank.
        bytes: of the level files and of the generic memory, as a reader sees them.
        stored: bytes that they take on the disk.
        sparse: whether the file system has sparse files.
    """

    revision: str
    bytes: int
    stored: int
    sparse: bool


@dataclass(frozen=True)
class _File:
    """A file of zeros: what comes first, and how many bytes of zeros follow."""

    head: bytes
    zeros: int

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.head) + self.zeros

    def pieces(self) -> Iterator[bytes | memoryview]:
        """What it holds, piece by piece."""
        yield self.head
        for start in range(0, self.zeros, len(_ZEROS)):
            yield _ZEROS[: self.zeros - start]


def write_fresh_bank(
    folder: Path, config: MemoryConfig, progress: Progress | None = None
) -> FreshBank:
    """Write a whole bank of zeros into ``folder`` (the ``memory/`` folder of a model).

    Files that are already there, such as ``tree.safetensors`` and those of an encoder, become part
    of the bank.

    Args:
        folder: is made if need be; holds no bank.
        config: must name the shape of its base anchor.

    Raises:
        ConfigError: the config names no base anchor, or its blocks or its tree are too large.
        FormatError: there is a bank already, no room for it, or a file cannot be written.
    """
    if config.clusters(config.levels) > MOST_CLUSTERS:
        raise ConfigError(
            f"memory config: {config.branching}^{config.levels} clusters are more than a tree is "
            f"grown for ({MOST_CLUSTERS:,}); use fewer levels or a smaller branching"
        )
    files = _files(config)
    size = sum(file.size for file in files.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            raise FormatError(f"{folder}: holds a bank already; give another folder")
        sparse = has_sparse_files(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise FormatError(f"{folder}: cannot be written ({error.strerror})") from None
    if not sparse and size > free:
        raise FormatError(
            f"{folder}: the bank takes {size:,} bytes, and {free:,} are free on this file system, "
            "which has no sparse files; give a folder on another one, or smaller ranks"
        )
    known = _hash(files, progress)
    for name, file in files.items():
        _write(folder, name, file)
    known[CHECKSUMS] = _write_checksums(folder, config)
    with AtomicFile(folder, CONFIG) as written:
        written.write((json.dumps(config.to_dict(), indent=2) + "\n").encode())
    known[CONFIG] = FileEntry(written.size, written.sha256)
    revision = write_manifest(folder, known).revision
    stored = sum(512 * (folder / name).stat().st_blocks for name in files)
    return FreshBank(revision, size, stored, sparse)


def has_sparse_files(folder: Path) -> bool:
    """Whether the file system of ``folder`` keeps what was never written off the disk."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            os.ftruncate(probe.fileno(), _PROBE_BYTES)
            os.fsync(probe.fileno())
        except OSError:  # no room for it: so it would take some
            return False
        return 512 * os.fstat(probe.fileno()).st_blocks < _PROBE_BYTES // 2


def _files(config: MemoryConfig) -> dict[str, _File]:
    """The level files and that of the generic memory."""
    dtype = config.stored_dtype
    item = STORAGE[dtype].itemsize
    files = {}
    for level in config.memory_levels:
        size = config.stored_size(level)
        for shard in shards(config, level):
            head = build_header(BLOCKS, dtype, (shard.rows, size), shard.metadata)
            files[shard.name] = _File(head, shard.rows * size * item)
    size = sum(map(config.stored_size, config.memory_levels))
    head = build_header(GENERIC_TENSOR, dtype, (size,), {"format": "mlx"})
    return files | {GENERIC: _File(head, size * item)}


def _write(folder: Path, name: str, file: _File) -> None:
    with AtomicFile(folder, name) as written:
        written.write(file.head)
        try:
            os.truncate(written.temporary, file.size)  # which lengthens it
        except OSError as error:
            raise FormatError(
                f"{folder / name}: cannot be written ({error.strerror}); check the folder and free "
                "space"
            ) from None


def _write_checksums(folder: Path, config: MemoryConfig) -> FileEntry:
    digests, generic = {}, b""
    for level in config.memory_levels:
        block = _sha256(_File(b"", config.block_bytes(level)))
        digests[f"level{level}"] = block * config.clusters(level)
        generic += block
    return write_checksums(folder, digests | {"generic": generic})


# ---- hashing ---------------------------------------------------------------------------


def _hash(files: Mapping[str, _File], progress: Progress | None) -> dict[str, FileEntry]:
    """The manifest's entries of files that need not be there yet."""
    total = sum(file.size for file in files.values())
    done, lock, stop = 0, Lock(), Event()

    def report(count: int) -> None:
        nonlocal done
        with lock:
            done += count
        if stop.is_set():
            raise InterruptedError

    # hashlib lets other threads run while it computes. The largest file first: it takes longest.
    order = sorted(files, key=lambda name: files[name].zeros, reverse=True)
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="sha256") as pool:
        jobs = {name: pool.submit(_sha256, files[name], report) for name in order}
        told, waiting = 0, set(jobs.values())
        try:
            while waiting:
                waiting = wait(waiting, timeout=_TICK).not_done
                with lock:
                    now = done
                if progress is not None and now > told:
                    progress(total, now - told)
                    told = now
        except BaseException:  # Ctrl-C, or what progress raises
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: FileEntry(file.size, jobs[name].result().hex()) for name, file in files.items()}


def _sha256(file: _File, report: Callable[[int], None] | None = None) -> bytes:
    """The sha256 of a file; ``report`` is called with the bytes of each step."""
    digest = hashlib.sha256()
    for piece in file.pieces():
        digest.update(piece)
        if report is not None:
            report(len(piece))
    return digest.digest()
