"""A tensor that lies in files: what is known of it without reading it, and reading its rows.

Every format of a source ends here, so what comes after knows none of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlx_hiermem.bank.dtypes import STORAGE
from mlx_hiermem.bank.files import read_exact, unreadable
from mlx_hiermem.errors import FormatError


@dataclass(frozen=True)
class SourceFile:
    """A file that is open for reading.

    Attributes:
        path: for messages.
        fd: its descriptor.
        size: bytes, when it was opened.
        modified: st_mtime_ns, when it was opened; what resumes asks whether it is the same.
    """

    path: Path
    fd: int
    size: int
    modified: int

    @classmethod
    def open(cls, path: Path) -> SourceFile:
        """Open a regular file.

        Raises:
            FormatError: it is missing, is no regular file, or cannot be read.
        """
        try:
            if not path.is_file():
                raise FormatError(f"{path}: no such file; expected a checkpoint")
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(path, error) from None
        stat = os.fstat(fd)
        return cls(path, fd, stat.st_size, stat.st_mtime_ns)


# With slots, here and below: of a bank in files per cluster there are half a million.
@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor that lies in one file without gaps, row-major.

    Attributes:
        file: where.
        offset: of its first number, in bytes.
        start: index of its first number in the tensor.
        shape: of the part.
    """

    file: SourceFile
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


class Buffer:
    """Memory that is used again and again: new memory has to be zeroed by the system first."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in this memory; what was taken before is overwritten."""
        size = math.prod(shape) * dtype.itemsize
        if size > self._bytes.size:
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor in one or more files.

    Attributes:
        name: as the file has it, without prefixes that say nothing (``names.clean``).
        dtype: one of ``bank.dtypes.STORAGE``, or another name, such as "float64" or "int64": then
            it cannot be read.
        shape: of the whole.
        boxes: the parts, which cover it without overlap. One for all formats but DCP.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: Sequence[Box] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.boxes[0].file.path}: {self.name}"

    def read(
        self, first: int = 0, count: int | None = None, buffer: Buffer | None = None
    ) -> np.ndarray:
        """Rows ``first`` to ``first + count`` of the first axis (all of it by default).

        A tensor without axes is read whole, whatever the rows.

        Args:
            buffer: to read into.

        Returns:
            (count, ...) storage array (bfloat16 as uint16 bits), contiguous; the caller's own, or
            the buffer's.

        Raises:
            FormatError: a file cannot be read or is shorter than it was.
        """
        if not self.shape:
            single = SourceTensor(
                self.name,
                self.dtype,
                (1,),
                [Box(box.file, box.offset, (0,), (1,)) for box in self.boxes],
            )
            return single.read().reshape(())
        rows = self.shape[0] - first if count is None else count
        shape, dtype = (rows, *self.shape[1:]), STORAGE[self.dtype]
        out = np.empty(shape, dtype) if buffer is None else buffer.take(shape, dtype)
        for box in self.boxes:
            begin, end = box.start[0], box.start[0] + box.shape[0]
            low, high = max(begin, first), min(end, first + rows)
            if low >= high:
                continue
            row = math.prod(box.shape[1:]) * out.itemsize
            whole = box.shape[1:] == self.shape[1:]
            target = out[low - first : high - first]
            part = target if whole else np.empty((high - low, *box.shape[1:]), out.dtype)
            if part.size:
                raw = memoryview(part.reshape(-1).view(np.uint8))
                read_exact(box.file.fd, raw, box.offset + (low - begin) * row, box.file.path)
            if not whole:
                inner = tuple(
                    slice(at, at + n) for at, n in zip(box.start[1:], box.shape[1:], strict=True)
                )
                target[(slice(None), *inner)] = part
        return out
