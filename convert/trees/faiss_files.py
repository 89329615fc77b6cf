"""Centroids in flat indexes of faiss, read without faiss.

A file of ``faiss.write_index`` is, little-endian: four letters for the class; the header of every
index (d int32, vectors int64, two int64 that mean nothing, trained as one byte, metric int32); for
flat ones how many numbers there are (uint64), and the numbers as float32.
Source of the format: impl/index_write.cpp of facebookresearch/faiss.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown

from .limits import check_shape

_FLAT = (b"IxF2", b"IxFI", b"IxFl")
_HEADER = struct.Struct("<4siqqq?i")
_COUNT = struct.Struct("<Q")
_INNER_PRODUCT, _L2 = 0, 1
# How far lengths of centroids may be apart, as part of them, to count as the same.
_SAME_LENGTH = 1e-3
_REMEDY = (
    "write the centroids alone: index = faiss.IndexFlatL2(d); index.add(centroids); "
    "faiss.write_index(index, path)"
)


def read_faiss(path: Path) -> np.ndarray:
    """The vectors (n, d) float32 of a flat index.

    Raises:
        FormatError: it is another index, is damaged, or compares by what is not L2 distance.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            head = file.read(_HEADER.size + _COUNT.size)
            d, count, start, metric = _read_header(head, path)
            expected = check_shape(str(path), (count, d), "float32")
            if size != start + expected:
                raise FormatError(
                    f"{path}: has {size} bytes, expected {start + expected} for {count} vectors "
                    f"of {d} numbers; copy or write it again"
                )
            file.seek(start)
            array = np.frombuffer(file.read(expected), "<f4")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None
    if array.nbytes != expected:
        raise FormatError(f"{path}: truncated while it was read; copy or write it again")
    array = array.reshape(count, d).astype(np.float32)
    if metric == _INNER_PRODUCT:
        _check_lengths(array, path)
    return array


def _read_header(head: bytes, path: Path) -> tuple[int, int, int, int]:
    """(d, vectors, offset of the numbers, metric)."""
    kind = head[:4]
    if kind not in _FLAT:
        raise FormatError(
            f"{path}: its first letters are {shown(kind.decode('latin-1'))}; expected a flat index "
            f"of faiss ({', '.join(one.decode() for one in _FLAT)}); {_REMEDY}"
        )
    if len(head) < _HEADER.size + _COUNT.size:
        raise FormatError(f"{path}: truncated: has {len(head)} bytes; copy or write it again")
    _, d, count, _, _, _, metric = _HEADER.unpack_from(head)
    if metric not in (_INNER_PRODUCT, _L2):
        raise FormatError(
            f"{path}: compares by metric {metric}; routing here is by L2 distance; {_REMEDY}"
        )
    (numbers,) = _COUNT.unpack_from(head, _HEADER.size)
    if d < 1 or count < 0 or numbers != d * count:
        raise FormatError(
            f"{path}: says {count} vectors of {d}, and then {numbers} numbers; copy or write it "
            "again"
        )
    return d, count, _HEADER.size + _COUNT.size, metric


def _check_lengths(array: np.ndarray, path: Path) -> None:
    """By inner product and by L2 distance the same centroid is nearest only if all are as long."""
    lengths = np.linalg.norm(array.astype(np.float64), axis=1)
    if lengths.size and np.ptp(lengths) > _SAME_LENGTH * lengths.max():
        raise FormatError(
            f"{path}: compares by inner product, and its centroids are {lengths.min():.4g} to "
            f"{lengths.max():.4g} long; routing here is by L2 distance: normalise them (spherical "
            "k-means), or, if they were grown by L2 distance, write them as IndexFlatL2"
        )
