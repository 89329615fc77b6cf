"""The open files of a bank: checked once, then read block by block, with NumPy alone.

``MemoryBank`` fetches through it, and training reads the blocks that it starts from; any thread may
read. One ``preadv`` per read, straight into a buffer of its size.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import MemoryConfig
from ..errors import ConfigError
from .dtypes import STORAGE, from_storage
from .files import find, open_file, read_exact
from .header import read_header
from .layout import (
    BLOCKS,
    CONFIG,
    GENERIC,
    GENERIC_TENSOR,
    Shard,
    check_header,
    expected_files,
    shards,
)
from .manifest import check_listed, check_sizes, read_manifest


@dataclass
class _OpenFile:
    path: Path
    fd: int
    offset: int  # where the numbers start


class BlockReader:
    """The files of the bank in ``folder``, open. Config, manifest, sizes and headers are checked.

    Attributes:
        folder: the memory folder.
        config: its :class:`MemoryConfig`.
        manifest: its :class:`~mlx_hiermem.bank.manifest.Manifest`.

    Raises:
        FormatError, ConfigError: a file is missing or wrong, or contradicts another one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[int, tuple[Shard, ...]] = {}
        self._firsts: dict[int, list[int]] = {}  # the first cluster of each shard
        self._files: dict[int, list[_OpenFile]] = {}
        self._fds: list[int] = []
        self.manifest = read_manifest(folder)
        find(folder, CONFIG)
        self.config = MemoryConfig.load(folder / CONFIG)
        try:
            names = expected_files(self.config)
        except ConfigError as error:  # sizes are unknown, or too large for the format
            raise ConfigError(f"{folder / CONFIG}: {error}") from None
        check_listed(folder, self.manifest, names)
        try:
            for level in self.config.memory_levels:
                self._shards[level] = shards(self.config, level)
                self._firsts[level] = [shard.first for shard in self._shards[level]]
                size = self.config.block_size(level)
                self._files[level] = [
                    self._open(shard.name, BLOCKS, (shard.rows, size), shard.metadata)
                    for shard in self._shards[level]
                ]
            self._generic = self._open(GENERIC, GENERIC_TENSOR, (self.config.fetch_size(),))
            check_sizes(folder, self.manifest)
        except BaseException:
            self.close()
            raise

    def _open(
        self, name: str, tensor: str, shape: tuple[int, ...], metadata: dict[str, str] | None = None
    ) -> _OpenFile:
        fd, size = open_file(self.folder, name)
        self._fds.append(fd)
        path = self.folder / name
        header = read_header(fd, size, path, tensor)
        check_header(header, self.config, path, shape, metadata)
        return _OpenFile(path, fd, header.offset)

    def shards(self, level: int) -> tuple[Shard, ...]:
        """The shards of a level with memory."""
        return self._shards[level]

    def locate(self, level: int, cluster: int) -> tuple[int, int]:
        """The shard that holds a cluster's block, and its row there."""
        index = bisect_right(self._firsts[level], cluster) - 1
        return index, cluster - self._firsts[level][index]

    def stored(self, level: int, cluster: int | None) -> np.ndarray:
        """One block as it is stored, (s_l,) of the config's storage dtype; None: the generic's.

        Raises:
            FormatError: the file was truncated or cannot be read.
        """
        size = self.config.block_size(level)
        if cluster is None:
            levels = self.config.memory_levels
            first = sum(self.config.block_size(one) for one in levels if one < level)
            return self._read(self._generic, first, size)
        index, row = self.locate(level, cluster)
        return self._read(self._files[level][index], row * size, size)

    def stored_shard(self, level: int, index: int) -> np.ndarray:
        """One whole shard as it is stored, (rows, s_l)."""
        rows, size = self._shards[level][index].rows, self.config.block_size(level)
        return self._read(self._files[level][index], 0, rows * size).reshape(rows, size)

    def block(self, level: int, cluster: int | None) -> np.ndarray:
        """One block, (s_l,) float32; None: the generic memory's."""
        return from_storage(self.stored(level, cluster), self.config.dtype)

    def _read(self, file: _OpenFile, first: int, count: int) -> np.ndarray:
        # ``count`` numbers of the file, from number ``first`` on.
        storage = STORAGE[self.config.dtype]
        numbers = np.empty(count, storage)
        offset = file.offset + first * storage.itemsize
        read_exact(file.fd, memoryview(numbers).cast("B"), offset, file.path)
        return numbers

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())
