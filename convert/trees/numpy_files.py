"""Centroids in .npy and .npz files.

The header of an array is read by NumPy, its numbers here: that way an object array (a pickle) is
never loaded, and what a header says is held against the size of the file before memory is taken.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown

from .limits import MAX_BYTES, check_shape, to_float32

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# A header of version 2 says its own length, up to 4 GiB; those of plain arrays have 128 bytes.
_LONGEST_HEADER = 1 << 14
_MOST_MEMBERS = 1 << 17
_ENCRYPTED = 0x1
# Bytes that are unpacked at a time.
_PIECE = 1 << 24


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, float32.

    Raises:
        FormatError: it is damaged, holds objects or no floats, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            array = _read_array(file, size, str(path))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None
    if array is None:
        raise FormatError(f"{path}: is one value; expected centroids (k, width)")
    return array


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by their names, float32; arrays of one number are left out.

    Raises:
        FormatError: as :func:`read_npy`; or a member is encrypted, or larger than it says.
    """
    found: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > MAX_BYTES or len(members) > _MOST_MEMBERS:
                raise FormatError(
                    f"{path}: refused: {len(members)} arrays that unpack to {total} bytes; a tree "
                    f"has at most {MAX_BYTES}"
                )
            for member in members:
                where = f"{path}: {shown(member.filename)}"
                name = member.filename.removesuffix(".npy")
                packed = member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                if name == member.filename or packed or member.flag_bits & _ENCRYPTED:
                    raise FormatError(f"{where} is not as np.savez writes it")
                if name in found:
                    raise FormatError(f"{where} is there twice; save the file again")
                with archive.open(member) as file:
                    array = _read_array(file, member.file_size, where)
                if array is not None:
                    found[name] = array
    except FormatError:
        raise
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError,
            RuntimeError, KeyError) as error:  # fmt: skip
        reason = shown(" ".join(str(error).split()))
        raise FormatError(f"{path}: not a readable .npz file ({reason}); save it again") from None
    return found


def _read_array(file: IO[bytes], size: int, where: str) -> np.ndarray | None:
    """The one array of an open .npy of ``size`` bytes; None: it is one value."""
    head = io.BytesIO(file.read(min(size, _LONGEST_HEADER)))
    shape, fortran, dtype = _read_header(head, where)
    if dtype.hasobject:
        raise FormatError(
            f"{where}: refused: holds Python objects, which are a pickle; save the numbers alone, "
            "as np.save(kmeans.cluster_centers_)"
        )
    if shape == ():
        return None
    expected = check_shape(where, shape, dtype.name)
    start = head.tell()
    if size != start + expected:
        raise FormatError(
            f"{where}: has {size - start} bytes of numbers, but its header, shape {shown(shape)} "
            f"of {dtype.name}, asks for {expected}; save it again"
        )
    data = bytearray(expected)
    rest = head.read(expected)
    data[: len(rest)] = rest
    _fill(file.readinto, memoryview(data)[len(rest) :], where)  # type: ignore[attr-defined]
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return to_float32(array)


def _read_header(head: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(head)
        read = _HEADERS.get(version)
        if read is None:
            raise FormatError(
                f"{where}: is of version {version[0]}.{version[1]} of the format; plain floats are "
                "saved as 1.0 or 2.0"
            )
        return read(head)
    except FormatError:
        raise
    # A header is an expression of Python, which NumPy parses: a made-up one may fail in many ways.
    except Exception as error:
        reason = shown(" ".join(str(error).split()))
        raise FormatError(f"{where}: not a readable .npy array ({reason}); save it again") from None


def _fill(readinto: Callable[[memoryview], int], buffer: memoryview, where: str) -> None:
    while len(buffer):
        count = readinto(buffer[:_PIECE])
        if not count:
            raise FormatError(f"{where}: truncated; copy or download it again")
        buffer = buffer[count:]
