"""What an array of centroids may be; asked before any of its numbers is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown

#: Most bytes of numbers in one tree, as they are in its files. The tree of 16^4 leaves and vectors
#: of 384 numbers has a fortieth of it.
MAX_BYTES = 1 << 32

#: Bytes of a number in each dtype that centroids may have.
FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def check_shape(where: str, shape: Sequence[Any], dtype: str) -> int:
    """Check shape and dtype of an array of centroids; the bytes that it has.

    Raises:
        FormatError: a size is no size, numbers are not floats, or it is too large.
    """
    if dtype not in FLOATS:
        raise FormatError(
            f"{where}: has dtype {shown(dtype)}; expected centroids in one of {', '.join(FLOATS)}"
        )
    if len(shape) > 64 or any(type(size) is not int or size < 1 for size in shape):
        raise FormatError(f"{where}: has shape {_said(shape)}; expected sizes of at least 1")
    count = math.prod(shape) * FLOATS[dtype]
    if count > MAX_BYTES:
        raise FormatError(
            f"{where}: has shape {_said(shape)}, which is too large; a tree has at most "
            f"{MAX_BYTES} bytes"
        )
    return count


def _said(shape: Sequence[Any]) -> str:
    """A shape for messages; Python refuses to write out integers of thousands of digits."""
    return shown([size if abs(size) < 1 << 64 else "..." for size in shape[:8]])


def to_float32(array: np.ndarray) -> np.ndarray:
    """Floats of any width and byte order as float32; too large ones become infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)
