"""Files that appear under their name when they are whole, or not at all.

At the bottom of the house: banks, trees, corpora and checkpoints are all written through this.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from .errors import FormatError


def sync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` last through a crash."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class AtomicFile:
    """A file that appears under its name when it is whole, or not at all.

    A context manager: what is written goes to ``.NAME.partial`` beside it; on leaving without
    an error that is synced and renamed, on an error it is removed. After that ``size`` and
    ``sha256`` are those of the file. Meanwhile nobody else can write it, whatever the process.

    Args:
        folder: of the file.
        name: of it.
        cached: False for one of many large files: the system then forgets it when it is on the
            disk, instead of all else that it keeps in memory.
    """

    def __init__(self, folder: Path, name: str, cached: bool = True) -> None:
        self.path = folder / name
        self.temporary = folder / f".{name}.partial"
        self.size = 0
        self._cached = cached
        self._digest = hashlib.sha256()

    def __enter__(self) -> AtomicFile:
        try:
            self._file = open(self._own(), "wb")  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise self._failed(error) from None
        return self

    def _own(self) -> int:
        """The temporary file, empty and locked."""
        while True:
            fd = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._lock(fd)
                if os.path.samestat(os.fstat(fd), os.stat(self.temporary)):
                    os.ftruncate(fd, 0)  # what a killed process has left
                    return fd
            except FileNotFoundError:
                pass  # since it was opened, who had the lock has renamed it: it is theirs
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FormatError(
                f"{self.path}: is being written by somebody else now; wait for it, or name another "
                "place"
            ) from None
        except OSError:
            pass  # a disk without locks; there it is left to the user

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from None
        self._digest.update(data)
        self.size += memoryview(data).nbytes

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __exit__(self, kind: type | None, *_: object) -> None:
        ours = True  # the temporary name
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                if not self._cached and hasattr(os, "posix_fadvise"):  # macOS has none
                    os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                os.replace(self.temporary, self.path)
                ours = False
                sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            # A disk that is full, or gone, fails again here: the first error is the one to tell.
            if ours:
                with suppress(OSError):
                    self.temporary.unlink(missing_ok=True)
            with suppress(OSError):
                self._file.close()  # the lock goes with it

    def _failed(self, error: OSError) -> FormatError:
        return FormatError(
            f"{self.path}: cannot be written ({error.strerror}); check the folder and free space"
        )


_SAFETENSORS = {
    "float32": "F32",
    "int64": "I64",
    "int32": "I32",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
}


def write_safetensors(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> str:
    """Write arrays to a safetensors file, one after the other: none is copied as a whole.

    Args:
        arrays: written in their order, so that those with the widest numbers should come first.

    Returns:
        The sha256 (hex) of the file; the same arrays give the same bytes.

    Raises:
        FormatError: the file cannot be written; what was there before is still there.
    """
    with AtomicFile(path.parent, path.name) as file:
        for piece in safetensors_pieces(arrays, metadata):
            file.write(piece)
    return file.sha256


def safetensors_pieces(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece; as :func:`write_safetensors`."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        dtype = _SAFETENSORS[array.dtype.newbyteorder("=").name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the numbers start at a multiple of eight bytes
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        # Not memoryview.cast, which refuses an array without numbers.
        yield memoryview(little.reshape(-1).view(np.uint8))
