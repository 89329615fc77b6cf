"""checksums.safetensors: the sha256 of every stored block, so that one block can be checked alone.

Tensors ``level{l}`` (k^l, 32) U8, row i the sha256 of the bytes of block i in its level file, and
``generic`` (levels with memory, 32), of the generic memory's blocks. The manifest holds the sha256
of this file, so it stands for the content of all level files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from ..config import MemoryConfig
from ..errors import FormatError
from ..files import write_safetensors
from .manifest import FileEntry

CHECKSUMS = "checksums.safetensors"
#: Bytes of one sha256.
SIZE = 32
# Of a header that lists one tensor per level.
_HEADER_LIMIT = 1 << 16


class Digests:
    """Gathers the checksums of a bank while its rows are written, in the order of the clusters."""

    def __init__(self, config: MemoryConfig) -> None:
        self._config = config
        self._levels = {level: bytearray() for level in config.memory_levels}
        self._generic = bytearray()

    def add(self, level: int, rows: np.ndarray) -> None:
        """The next rows of a level, (n, ...) of contiguous storage."""
        for row in rows:
            self._levels[level] += hashlib.sha256(row).digest()

    def add_digests(self, level: int, digests: bytes) -> None:
        """The next checksums of a level, one behind the other, that somebody else has made."""
        self._levels[level] += digests

    def add_generic(self, generic: np.ndarray) -> None:
        """The generic memory, (sum of the stored sizes,)."""
        start = 0
        for level in self._config.memory_levels:
            size = self._config.stored_size(level)
            self._generic += hashlib.sha256(generic[start : start + size]).digest()
            start += size

    def write(self, folder: Path) -> FileEntry:
        """Write the file."""
        return write_checksums(folder, self.arrays())

    def arrays(self) -> dict[str, bytearray]:
        """The checksums of each tensor, one behind the other."""
        levels = {f"level{level}": digests for level, digests in self._levels.items()}
        return {**levels, "generic": self._generic}


def write_checksums(
    folder: Path, digests: Mapping[str, bytes | bytearray], name: str = CHECKSUMS
) -> FileEntry:
    """Write the file, as ``name``, from the digests of each tensor, one behind the other."""
    arrays = {name: np.frombuffer(d, np.uint8).reshape(-1, SIZE) for name, d in digests.items()}
    sha256 = write_safetensors(folder / name, arrays, {"format": "mlx"})
    return FileEntry((folder / name).stat().st_size, sha256)


def size_limit(config: MemoryConfig) -> int:
    """The most bytes that a file of a bank of ``config`` can have."""
    rows = sum(config.clusters(level) + 1 for level in config.memory_levels)
    return rows * SIZE + _HEADER_LIMIT


def read_checksums(path: Path, data: bytes, config: MemoryConfig) -> dict[str, np.ndarray]:
    """The tensors of the file, from its bytes.

    Raises:
        FormatError: it is not what docs/format.md says.
    """
    shapes = {f"level{level}": (config.clusters(level), SIZE) for level in config.memory_levels}
    shapes["generic"] = (len(config.memory_levels), SIZE)
    try:
        arrays = load(data)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        # Its own words, which may quote the file: as repr writes them, on one line.
        reason = repr(str(error))[1:121]
        raise FormatError(f"{path}: not a safetensors file ({reason}); {_REMEDY}") from None
    found = {name: array.shape for name, array in arrays.items()}
    if found != shapes or any(array.dtype != np.uint8 for array in arrays.values()):
        raise FormatError(
            f"{path}: holds {str(found)[:120]}, expected U8 of {str(shapes)[:120]}; {_REMEDY}"
        )
    return arrays


_REMEDY = "download the bank again, or write it again with `mlx_hiermem bank checksums`"


def digest(pieces: Iterable[memoryview]) -> bytes:
    """The sha256 of a block that lies in pieces."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.digest()
