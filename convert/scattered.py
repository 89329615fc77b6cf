"""A safetensors file whose tensors are written side by side, piece by piece, in any order."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mlx_hiermem.bank.dtypes import SAFETENSORS, STORAGE
from mlx_hiermem.errors import FormatError
from mlx_hiermem.files import sync_folder


class ScatteredFile:
    """A safetensors file whose tensors are written side by side.

    A context manager; the file appears under its name whole, or not at all. The header comes first:
    all shapes are known.

    Args:
        folder: to write into.
        name: of the file.
        tensors: for each tensor its dtype (a key of ``bank.dtypes.STORAGE``) and its shape.

    Raises:
        FormatError: it cannot be written.
    """

    def __init__(
        self, folder: Path, name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> None:
        self.path, self.temporary = folder / name, folder / f".{name}.partial"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for tensor, (dtype, shape) in tensors.items():
            starts[tensor], end = end, end + math.prod(shape) * STORAGE[dtype].itemsize
            header[tensor] = {
                "dtype": SAFETENSORS[dtype],
                "shape": list(shape),
                "data_offsets": [starts[tensor], end],
            }
        text = json.dumps(header).encode()
        length = -(-len(text) // 8) * 8  # the numbers start at a multiple of eight bytes
        self._head = length.to_bytes(8, "little") + text.ljust(length)
        self._starts = {tensor: len(self._head) + start for tensor, start in starts.items()}

    def __enter__(self) -> ScatteredFile:
        try:
            self._file = open(self.temporary, "wb", buffering=0)  # noqa: SIM115 (closed in __exit__)
            self._write(self._head, 0)
        except OSError as error:
            raise self._failed(error) from None
        return self

    def put(self, name: str, first: int, rows: np.ndarray) -> None:
        """Write rows of a tensor, a storage array, from row ``first`` of its first axis on."""
        raw = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        offset = self._starts[name] + first * (raw.size // len(rows))
        try:
            self._write(memoryview(raw), offset)
        except OSError as error:
            raise self._failed(error) from None

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view.nbytes:
            done = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[done:], offset + done

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self.temporary, self.path)
                sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            self._file.close()
            self.temporary.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> FormatError:
        return FormatError(
            f"{self.path}: cannot be written ({error.strerror}); check the folder and free space"
        )
