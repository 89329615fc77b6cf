"""A part: what one work unit of ``cluster`` makes of its documents, in one safetensors file.

It holds the documents' tokens one behind the other, where each window starts, and the vectors that
windows are routed by. Notable: reading maps the file, so that tokens and vectors are read from disk
when they are used; the small index arrays are checked whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ..files import write_safetensors

# Eight-byte numbers first, so that each array lies at a multiple of the size of its numbers.
_DTYPES = {
    "starts": ("I64",),
    "documents": ("I64",),
    "rows_window": ("I64",),
    "vectors": ("F32",),
    "tokens": ("U16", "U32"),
}
_NUMPY = {"I64": "<i8", "F32": "<f4", "U16": "<u2", "U32": "<u4"}
_NAMES = {dtype: name for name, dtype in _NUMPY.items()}
_MAX_HEADER = 1 << 16


@dataclass(frozen=True)
class Part:
    """The documents of one work unit, cut into W windows.

    Attributes:
        tokens: (n,) uint16 or uint32: all documents, each with an end-of-text token at its end.
        starts: (W + 1,) int64: window w is ``tokens[starts[w] : starts[w + 1]]``; no window is
            empty, and a document's end-of-text is in its last window.
        documents: (W,) int64: the document of each window: its number within the part, ascending.
        rows_window: (M,) int64: the window of each vector, ascending; every window has at least
            one, and the first is its first view.
        vectors: (M, c) float32, as the encoder made them.
    """

    tokens: np.ndarray
    starts: np.ndarray
    documents: np.ndarray
    rows_window: np.ndarray
    vectors: np.ndarray

    @property
    def windows(self) -> int:
        """W, the number of windows."""
        return len(self.documents)

    @property
    def lengths(self) -> np.ndarray:
        """(W,) int64: tokens of each window."""
        return np.diff(self.starts)

    @property
    def first_rows(self) -> np.ndarray:
        """(W,) int64: the row of ``vectors`` that is each window's first view."""
        return np.searchsorted(self.rows_window, np.arange(self.windows))


def write_part(path: str | Path, part: Part) -> str:
    """Write a part whole or not at all; the same part gives the same bytes.

    Returns:
        The sha256 (hex) of the file.

    Raises:
        FormatError: the arrays are not those of a part, or the file cannot be written.
    """
    path = Path(path)
    arrays = {name: _little(getattr(part, name)) for name in _DTYPES}
    _check(arrays, path)
    return write_safetensors(path, arrays)


def read_part(path: str | Path) -> Part:
    """Map the part in ``path``: tokens and vectors stay on disk until they are used.

    Raises:
        FormatError: the file is missing or damaged, naming what is wrong with it.
    """
    path = Path(path)
    table, offset = _read_table(path)
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    arrays = {}
    for name, dtype, shape, begin, end in _entries(table, path):
        if offset + end > len(data):
            raise _wrong(path, f"truncated: {len(data)} bytes, {name} ends at {offset + end}")
        # The base class: slices of a memmap are an order of magnitude slower to make.
        piece = np.asarray(data[offset + begin : offset + end])
        arrays[name] = piece.view(dtype).reshape(shape)
    if offset + max(entry["data_offsets"][1] for entry in table.values()) != len(data):
        raise _wrong(path, f"too long: {len(data)} bytes, more than its header names")
    _check(arrays, path)
    return Part(**{field.name: arrays[field.name] for field in fields(Part)})


def tokens_place(path: str | Path) -> tuple[np.dtype, int, int]:
    """Where a part's tokens lie in its file: (dtype, offset in bytes, how many)."""
    path = Path(path)
    table, offset = _read_table(path)
    for name, dtype, shape, begin, _ in _entries(table, path):
        if name == "tokens":
            return np.dtype(dtype), offset + begin, shape[0]
    raise AssertionError("unreachable: every entry was checked to be there")


def _little(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _wrong(path: Path, found: str) -> FormatError:
    return FormatError(f"{path}: {found}; remove the file and run cluster again")


def _read_table(path: Path) -> tuple[dict[str, Any], int]:
    """The header of the file, and where the arrays start."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER or 8 + length > size:
                raise _wrong(path, f"not a part: {size} bytes, header of {length}")
            table = json.loads(file.read(length).decode("utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; run cluster again") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise _wrong(path, "not a part: its header is not valid JSON") from None
    if not isinstance(table, dict) or set(table) != set(_DTYPES):
        raise _wrong(path, f"not a part: expected the arrays {', '.join(_DTYPES)}")
    return table, 8 + length


def _entries(
    table: dict[str, Any], path: Path
) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """Name, NumPy dtype, shape, begin and end of each array, checked against each other."""
    previous = 0
    for name, known in _DTYPES.items():
        entry = table[name]
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sizes = [*shape, begin, end]
        except (TypeError, KeyError, ValueError):
            raise _wrong(path, f"the header's entry of {name} is not that of an array") from None
        if dtype not in known or len(shape) != (2 if name == "vectors" else 1):
            raise _wrong(
                path,
                f"{name} is {str(dtype)[:20]} of shape {str(shape)[:40]}, expected "
                f"{' or '.join(known)} with {2 if name == 'vectors' else 1} dimensions",
            )
        if any(type(size) is not int or not 0 <= size < 2**62 for size in sizes):
            raise _wrong(path, f"the header's sizes of {name} are not sizes")
        nbytes = math.prod(shape) * np.dtype(_NUMPY[dtype]).itemsize
        if begin != previous or end - begin != nbytes:
            raise _wrong(path, f"{name} lies at {begin} to {end}, expected {nbytes} bytes")
        previous = end
        yield name, _NUMPY[dtype], tuple(shape), begin, end


def _check(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Raise FormatError unless the arrays are those of a part."""
    for name, known in _DTYPES.items():
        array = arrays[name]
        if _NAMES.get(array.dtype.str) not in known or array.ndim != (
            2 if name == "vectors" else 1
        ):
            raise _wrong(
                path, f"{name} is {array.dtype} of shape {array.shape}, not what a part holds"
            )
    starts, documents, rows = arrays["starts"], arrays["documents"], arrays["rows_window"]
    windows = len(documents)
    if len(starts) != windows + 1:
        raise _wrong(path, f"{len(starts)} starts for {windows} windows, expected {windows + 1}")
    if starts[0] != 0 or starts[-1] != len(arrays["tokens"]) or (np.diff(starts) < 1).any():
        raise _wrong(path, f"starts do not ascend from 0 to {len(arrays['tokens'])} tokens")
    if (np.diff(documents) < 0).any() or (windows and documents[0] < 0):
        raise _wrong(path, "documents do not ascend from 0 on")
    if len(rows) != len(arrays["vectors"]):
        raise _wrong(path, f"{len(rows)} rows_window for {len(arrays['vectors'])} vectors")
    steps = np.diff(rows)
    # From one row to the next the window stays or goes up by one, so that none is left out.
    whole = len(rows) and rows[0] == 0 and rows[-1] == windows - 1 and np.isin(steps, (0, 1)).all()
    if not (whole or windows == len(rows) == 0):
        raise _wrong(path, f"rows_window does not go through the {windows} windows in order")
