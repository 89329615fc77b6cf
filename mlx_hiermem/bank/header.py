"""The header of a safetensors file that holds one tensor: built, and read with hard limits.

Such a file is 8 bytes (little-endian length n of the header), n bytes of JSON, then the
numbers. Notable: headers written here are padded with spaces so that the numbers start at a
multiple of 4,096 bytes, where a page of the file cache starts; a header read here may have
any length up to a megabyte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import FormatError
from .dtypes import SAFETENSORS, STORAGE
from .files import read_exact

_ALIGNMENT = 4096
#: A header of one tensor is a few hundred bytes, and padding. safetensors allows 100 MB, which as
#: JSON may take gigabytes.
MAX_HEADER = 1 << 20

_DTYPES = {name: dtype for dtype, name in SAFETENSORS.items()}


@dataclass(frozen=True)
class Header:
    """What the header of a file says: dtype as in a config, shape, where the numbers start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    metadata: Mapping[str, str]


def build_header(
    tensor: str, dtype: str, shape: Sequence[int], metadata: Mapping[str, str]
) -> bytes:
    """The bytes before the numbers of a file that holds ``tensor`` alone."""
    entry = {
        "dtype": SAFETENSORS[dtype],
        "shape": list(shape),
        "data_offsets": [0, math.prod(shape) * STORAGE[dtype].itemsize],
    }
    text = json.dumps({"__metadata__": dict(metadata), tensor: entry}).encode()
    length = -(len(text) + 8) % _ALIGNMENT + len(text)
    return length.to_bytes(8, "little") + text.ljust(length)


def read_header(fd: int, size: int, path: Path, tensor: str) -> Header:
    """Read and check the header of an open file of ``size`` bytes that holds ``tensor`` alone.

    Raises:
        FormatError: naming ``path``, what was found and what was expected.
    """

    def wrong(found: str) -> FormatError:
        return FormatError(f"{path}: {found}; copy, download or convert the bank again")

    if size < 8:
        raise wrong(f"truncated: {size} bytes, expected a safetensors file")
    prefix = bytearray(8)
    read_exact(fd, memoryview(prefix), 0, path)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise wrong(f"not a safetensors file: header of {length} bytes, at most {MAX_HEADER}")
    if 8 + length > size:
        raise wrong(f"truncated: header of {length} bytes in a file of {size} bytes")
    text = bytearray(length)
    read_exact(fd, memoryview(text), 8, path)
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError):
        raise wrong("not a safetensors file: its header is not valid JSON") from None
    if not isinstance(table, dict):
        raise wrong("not a safetensors file: its header is not a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise wrong("header: __metadata__ is not an object of strings")
    if set(table) != {tensor}:
        names = ", ".join(sorted(table)) or "none"
        raise wrong(f"holds tensors {names[:80]!r}, expected only {tensor!r}")
    entry = table[tensor]
    if not isinstance(entry, dict):
        raise wrong(f"header: {tensor} is not an object")
    dtype, shape, ends = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        known = ", ".join(sorted(_DTYPES))
        raise wrong(f"{tensor} is {str(dtype)[:40]!r}, expected one of {known}")
    if not _sizes(shape) or not _sizes(ends) or len(ends) != 2:
        raise wrong(f"header: shape or data_offsets of {tensor} are not lists of sizes")
    nbytes = math.prod(shape) * STORAGE[_DTYPES[dtype]].itemsize
    if ends != [0, nbytes]:
        raise wrong(
            f"header: data_offsets of {tensor} are {str(ends)[:60]}, expected [0, {nbytes}] for "
            f"{dtype} of shape {str(shape)[:60]}"
        )
    if size != 8 + length + nbytes:
        state = "truncated" if size < 8 + length + nbytes else "too long"
        raise wrong(f"{state}: {size} bytes, its header says {8 + length + nbytes}")
    return Header(_DTYPES[dtype], tuple(shape), 8 + length, metadata)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def _sizes(values: Any) -> TypeGuard[list[int]]:
    # Eight dimensions are more than any tensor here has; the limit keeps the product small.
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(v) is int and 0 <= v < 2**63 for v in values)
    )
