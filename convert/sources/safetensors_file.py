"""Files of safetensors with any number of tensors: where each lies.

The header is read here and not by the library, which gives tensors and no places; the limits are
the library's: at most 100 MB, and the tensors cover the rest of the file without gap or overlap.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown

from .dtypes import ITEMSIZE, SAFETENSORS, is_sizes
from .tables import parse_table
from .tensor import Box, SourceFile, SourceTensor
from .zip_check import Window

_MAX_HEADER = 100_000_000
_FIELDS = {"dtype", "shape", "data_offsets"}


class _Entry(NamedTuple):
    """What the header says of a tensor. A tuple: there may be half a million of them."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(file: SourceFile) -> tuple[dict[str, SourceTensor], dict[str, Any]]:
    """The tensors of a file by the names in it, and the metadata of its header.

    Raises:
        FormatError: it is no safetensors file, or is damaged.
    """
    window = Window.of(file)

    def wrong(found: str) -> FormatError:
        return FormatError(f"{file.path}: refused: {found}; copy or download it again")

    if file.size < 8:
        raise wrong(f"{file.size} bytes are no safetensors file")
    length = int.from_bytes(window.read(0, 8), "little")
    if length > _MAX_HEADER or 8 + length > file.size:
        raise wrong(
            f"not a safetensors file, or truncated: a header of {length} bytes in a file of "
            f"{file.size} (at most {_MAX_HEADER})"
        )
    text = window.read(8, length)
    if not text.startswith(b"{"):
        raise wrong("not a safetensors file: its header is not a JSON object")
    table = parse_table(f"{file.path}: refused: its header", text, _entry)
    del text
    metadata = table.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        raise wrong("its __metadata__ is no object of strings")
    _check(table, file.size - 8 - length, wrong)
    tensors = {}
    for name, entry in table.items():
        box = Box(file, 8 + length + entry.begin, (0,) * len(entry.shape), entry.shape)
        tensors[name] = SourceTensor(name, entry.dtype, entry.shape, (box,))
    return tensors, metadata


def _entry(table: dict[str, Any]) -> Any:
    """An _Entry for an object that can be one; others as they are."""
    if table.keys() != _FIELDS:
        return table
    dtype, shape, ends = table["dtype"], table["shape"], table["data_offsets"]
    if not is_sizes(shape) or type(ends) is not list or len(ends) != 2:
        return table
    if not all(is_sizes([end]) for end in ends):  # each alone: they are no shape
        return table
    if type(dtype) is not str or dtype not in SAFETENSORS:
        return table
    return _Entry(SAFETENSORS[dtype], tuple(shape), *ends)


def _check(table: dict[str, Any], size: int, wrong: Any) -> None:
    for name, entry in table.items():
        if type(entry) is not _Entry:
            raise wrong(
                f"its header has no dtype, shape and data_offsets that are valid for {shown(name)}"
                f"; expected a dtype of {', '.join(SAFETENSORS)}"
            )
        nbytes = math.prod(entry.shape) * ITEMSIZE[entry.dtype]
        if entry.end - entry.begin != nbytes:
            raise wrong(
                f"{shown(name)} has {entry.end - entry.begin} bytes, expected {nbytes} for "
                f"{entry.dtype} of shape {shown(list(entry.shape))}"
            )
    at = 0
    for name, entry in sorted(table.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if entry.begin != at:
            kind = "overlaps another tensor" if entry.begin < at else "lies behind a gap"
            raise wrong(f"{shown(name)} {kind}")
        at = entry.end
    if at != size:
        state = "truncated" if at > size else "too long"
        raise wrong(f"{state}: {size} bytes behind its header, which says {at}")
