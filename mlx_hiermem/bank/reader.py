"""The open files of a bank: checked once, then read block by block, with NumPy alone.

``MemoryBank`` fetches through it, and training reads the blocks that it starts from; any thread may
read. A block is one ``preadv``, straight to where it is wanted, which may be in pieces.

Notable:
- An edit renames new files into place, so what is open here stays as it was, and all that is opened
  belongs to one revision (``journal``).
- A file that could not be read (a disk that went away) is opened again, at once and at each read
  from then on.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import MemoryConfig
from ..errors import ConfigError, FormatError
from .blocked import BLOCKED, MOST_BYTES, read_blocked
from .checksums import CHECKSUMS, read_checksums, size_limit
from .dtypes import STORAGE, from_storage
from .files import (
    ReadError,
    find,
    make_room,
    open_file,
    read_bytes,
    read_exact,
    read_scattered,
    rest_of,
)
from .header import read_header
from .journal import Snapshot
from .layout import (
    BLOCKS,
    CONFIG,
    GENERIC,
    GENERIC_TENSOR,
    Shard,
    check_header,
    level_of,
    shards,
)
from .manifest import check_listed, check_sha256, check_size, read_manifest
from .parts import Part

# How long a bank that changes while it is opened is opened again, in seconds.
_PATIENCE = 30.0


@dataclass
class OpenFile:
    """A level file, or that of the generic memory.

    Attributes:
        fd: its descriptor.
        offset: bytes before its first number.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    metadata: Mapping[str, str] | None
    path: Path  # as people know it
    fd: int = -1
    offset: int = 0  # where the numbers start
    failed: bool = False


class BlockReader:
    """The files of the bank in ``folder``, open. Config, manifest, sizes and headers are checked.

    Args:
        folder: the memory folder.
        folders: for levels whose files lie elsewhere, the folder (another disk).
        part: what is wanted; the files of other blocks need not be there.

    Attributes:
        folder, part: as given.
        config: its :class:`MemoryConfig`.
        manifest: its :class:`~mlx_hiermem.bank.manifest.Manifest`.
        listed: names of the files of the manifest that belong to the part.
        blocked: the blocks that ``blocked.json`` names, as pairs (level, cluster).

    Raises:
        FormatError, ConfigError: a file is missing or wrong, or contradicts another one.
        PathError: the part is not one of the bank.
    """

    def __init__(
        self,
        folder: Path,
        folders: Mapping[int, Path] | None = None,
        part: Part | None = None,
    ) -> None:
        self.folder = folder
        self.part = part or Part()
        self._folders = dict(folders or {})
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            self._snapshot = Snapshot(folder)
            try:
                self._open_all()
            except BaseException:
                self.close()
                if not self._snapshot.stale():
                    raise
            else:
                if not self._snapshot.stale():
                    return
                self.close()
            time.sleep(random.uniform(0, 0.02))  # not always at the same moment of an edit
        raise FormatError(
            f"{folder}: is being edited by another process all the time; open it again later"
        )

    # ---- opening -----------------------------------------------------------------------

    def _open_all(self) -> None:
        self._shards: dict[int, tuple[Shard, ...]] = {}
        self._block_bytes: dict[int, int] = {}
        self._firsts: dict[int, list[int]] = {}  # the first cluster of each shard
        self._files: dict[int, list[OpenFile | None]] = {}  # None: not in the part
        self._opened: list[OpenFile] = []
        self._checksums: dict[str, np.ndarray] | None = None
        self._checksum_bytes: bytes | None = None
        folder = self.folder
        self.manifest = read_manifest(folder, self._snapshot.name("manifest.json"))
        config = self._snapshot.name(CONFIG)
        find(folder, config)
        self.config = MemoryConfig.load(folder / config)
        try:
            names = self.part.files(self.config)
        except ConfigError as error:  # sizes are unknown, or too large for the format
            raise ConfigError(f"{folder / CONFIG}: {error}") from None
        self.part.check(self.config)
        for level in self._folders:
            if level not in self.config.memory_levels:
                raise ConfigError(
                    f"folder of level {level}: the bank has memory at levels "
                    f"{', '.join(map(str, self.config.memory_levels))} only"
                )
        check_listed(folder, self.manifest, names)
        make_room(len(names))
        for level in self.config.memory_levels:
            self._shards[level] = shards(self.config, level)
            self._firsts[level] = [shard.first for shard in self._shards[level]]
            size = self.config.stored_size(level)
            self._block_bytes[level] = self.config.block_bytes(level)
            self._files[level] = [
                self._open(shard.name, BLOCKS, (shard.rows, size), shard.metadata)
                if self.part.has_shard(self.config, shard)
                else None
                for shard in self._shards[level]
            ]
        size = sum(map(self.config.stored_size, self.config.memory_levels))
        self._generic = self._open(GENERIC, GENERIC_TENSOR, (size,))
        self._check_files(set(names))
        self.blocked = read_blocked(folder, self.config, self._listed(BLOCKED))

    def _check_files(self, names: set[str]) -> None:
        """Sizes of all files that have to be there, and the sha256 of small ones.

        A manifest of another revision is found by that, because the checksums of all blocks are one
        of the small ones.
        """
        self.listed = [
            name for name in self.manifest.files if level_of(name) is None or name in names
        ]
        for name in self.listed:
            entry = self.manifest.files[name]
            home, real = self._place(name)
            check_size(home / name, find(home, real).stat().st_size, entry)
        small = {CONFIG: 1 << 24, BLOCKED: MOST_BYTES, CHECKSUMS: size_limit(self.config)}
        for name, limit in small.items():
            if (known := self.manifest.files.get(name)) is None:
                continue
            if known.bytes > limit:
                raise FormatError(
                    f"{self.folder / name}: {known.bytes} bytes, expected at most {limit}; "
                    "download the bank again"
                )
            data = read_bytes(self.folder, self._snapshot.name(name), limit)
            check_sha256(self.folder / name, hashlib.sha256(data).hexdigest(), known)
            if name == CHECKSUMS:
                self._checksum_bytes = data

    def _place(self, name: str) -> tuple[Path, str]:
        """The folder that a file lies in, and its name there now."""
        home = self._folders.get(level_of(name) or 0, self.folder)
        return home, self._snapshot.name(name) if home == self.folder else name

    def _listed(self, name: str) -> str | None:
        """The name now of a file that a bank need not have; None if the manifest has it not."""
        return self._snapshot.name(name) if name in self.manifest.files else None

    def _open(
        self,
        name: str,
        tensor: str,
        shape: tuple[int, ...],
        metadata: Mapping[str, str] | None = None,
    ) -> OpenFile:
        home, real = self._place(name)
        file = OpenFile(name, tensor, shape, metadata, home / name)
        self._opened.append(file)
        self._open_again(file, real)
        return file

    def _open_again(self, file: OpenFile, real: str) -> None:
        fd, size = open_file(file.path.parent, real)
        if file.fd < 0:
            file.fd = fd
        else:  # in one step: another thread may be reading
            os.dup2(fd, file.fd, inheritable=False)
            os.close(fd)
        header = read_header(file.fd, size, file.path, file.tensor)
        check_header(header, self.config, file.path, file.shape, file.metadata)
        file.offset = header.offset
        file.failed = False

    def close(self) -> None:
        """Close the files."""
        for file in self._opened:
            if file.fd >= 0:
                os.close(file.fd)
                file.fd = -1

    # ---- where things are --------------------------------------------------------------

    def shards(self, level: int) -> tuple[Shard, ...]:
        """The shards of a level with memory."""
        return self._shards[level]

    def has(self, level: int, cluster: int) -> bool:
        """Whether the block is in the part of the bank that is open."""
        return self.part.has(self.config, level, cluster)

    def place(self, level: int) -> Path:
        """The folder that a level's files lie in."""
        return self._folders.get(level, self.folder)

    def real_name(self, name: str) -> str:
        """The name that a file of the manifest has now: another while an edit comes into force."""
        return self._place(name)[1]

    def real_path(self, name: str) -> Path:
        """Where a file of the manifest lies now."""
        home, real = self._place(name)
        return find(home, real)

    @property
    def descriptors(self) -> list[int]:
        """File descriptors of the level files and of the generic memory."""
        return [file.fd for file in self._opened]

    def locate(self, level: int, cluster: int) -> tuple[int, int]:
        """The shard that holds a cluster's block, and its row there."""
        index = bisect_right(self._firsts[level], cluster) - 1
        return index, cluster - self._firsts[level][index]

    def find(self, level: int, cluster: int | None) -> tuple[OpenFile, int]:
        """The file of a block, and the first byte of the block among its numbers."""
        if cluster is None:
            return self._generic, sum(n for one, n in self._block_bytes.items() if one < level)
        index, row = self.locate(level, cluster)
        file = self._files[level][index]
        if file is None:
            raise FormatError(
                f"{self.folder}: block {cluster} of level {level} is not in the part of the bank "
                "that was opened"
            )
        return file, row * self._block_bytes[level]

    def head(self, level: int, index: int) -> bytes:
        """The bytes of a level file before its first number."""
        file = self._files[level][index]
        assert file is not None
        head = bytearray(file.offset)
        read_exact(file.fd, memoryview(head), 0, file.path)
        return bytes(head)

    def open_shard(self, level: int, index: int) -> tuple[int, int, int]:
        """What lies under a level file's name now: (file descriptor, size, where numbers start)."""
        file = self._files[level][index]
        assert file is not None
        home, real = self._place(file.name)
        return *open_file(home, real), file.offset

    # ---- reading -----------------------------------------------------------------------

    def read_into(
        self,
        level: int,
        cluster: int | None,
        pieces: Sequence[memoryview],
        cached_only: bool = False,
    ) -> int:
        """Read the stored bytes of one block; see ``files.read_scattered``.

        Args:
            cluster: None for the generic memory's block.
            pieces: as many bytes as the block has, one piece behind the other.

        Raises:
            FormatError: the file was truncated or cannot be read.
        """
        file, start = self.find(level, cluster)
        return self._read(file, start, pieces, cached_only)

    def read_rest(
        self, level: int, cluster: int | None, pieces: Sequence[memoryview], done: int
    ) -> None:
        """Read what :meth:`read_into` has left: all behind the first ``done`` bytes."""
        file, start = self.find(level, cluster)
        self._read(file, start + done, rest_of(pieces, done), False)

    def _read(
        self, file: OpenFile, start: int, pieces: Sequence[memoryview], cached_only: bool
    ) -> int:
        if file.failed:
            self._revive(file)
        try:
            return read_scattered(file.fd, pieces, file.offset + start, file.path, cached_only)
        except ReadError as error:
            file.failed = True
            try:
                self._revive(file)  # its disk may be back already
            except FormatError:
                raise error from None
        try:
            return read_scattered(file.fd, pieces, file.offset + start, file.path, cached_only)
        except ReadError:
            file.failed = True
            raise

    def _revive(self, file: OpenFile) -> None:
        """Open a file again that could not be read, if it is still the bank that it was."""
        home, real = self._place(file.name)
        try:
            manifest = read_manifest(self.folder)
        except FormatError:
            raise ReadError(
                f"{file.path}: cannot be read, and the bank is not there any more; connect its disk"
            ) from None
        if manifest.files.get(file.name) != self.manifest.files[file.name]:
            raise FormatError(f"{file.path}: was changed since the bank was opened; open it again")
        self._open_again(file, real)
        check_size(home / file.name, os.fstat(file.fd).st_size, self.manifest.files[file.name])

    def stored(self, level: int, cluster: int | None) -> np.ndarray:
        """One block as it is stored, (stored_size,) of the storage dtype; None: the generic's.

        Raises:
            FormatError: the file was truncated or cannot be read.
        """
        numbers = np.empty(self.config.stored_size(level), STORAGE[self.config.stored_dtype])
        self.read_into(level, cluster, [memoryview(numbers).cast("B")])
        return numbers

    def stored_shard(self, level: int, index: int) -> np.ndarray:
        """One whole shard as it is stored, (rows, stored_size)."""
        rows = self._shards[level][index].rows
        numbers = np.empty(
            (rows, self.config.stored_size(level)), STORAGE[self.config.stored_dtype]
        )
        file = self._files[level][index]
        assert file is not None
        self._read(file, 0, [memoryview(numbers.reshape(-1)).cast("B")], False)
        return numbers

    def block(self, level: int, cluster: int | None) -> np.ndarray:
        """One block, (s_l,) float32; None: the generic memory's.

        Raises:
            FormatError: it cannot be read, or the bank is quantised.
        """
        if self.config.quantization is not None:
            raise FormatError(
                f"{self.folder}: the bank is quantised, and what it was made from is needed here; "
                "give the bank that is not quantised"
            )
        return from_storage(self.stored(level, cluster), self.config.dtype)

    @property
    def checksums(self) -> dict[str, np.ndarray] | None:
        """The tensors of ``checksums.safetensors``; None if the bank has none.

        Raises:
            FormatError: the file is not what it should be.
        """
        if self._checksums is None:
            data = self._checksum_bytes  # another thread may be at it
            if data is not None:
                self._checksums = read_checksums(self.folder / CHECKSUMS, data, self.config)
                self._checksum_bytes = None
        return self._checksums
