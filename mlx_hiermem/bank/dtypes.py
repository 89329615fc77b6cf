"""Dtypes of a bank in NumPy: *storage arrays* hold the bytes that a file holds.

NumPy has no bfloat16, so its numbers are kept as the 16 bits that a file holds, in uint16.
The rounding is that of MLX's ``astype``, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import FormatError

#: For each dtype of a bank the NumPy dtype of its storage array (always little-endian).
STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),  # packed bytes of a quantised bank
}

#: For each dtype of a bank its name in a safetensors header.
SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}

# Of a floating-point number: the integers that its bytes are looked at as, everything but the sign,
# and the smallest of these that is not finite (all bits of the exponent).
_BITS: dict[str, tuple[np.dtype[Any], int, int]] = {
    "float32": (np.dtype("<u4"), 0x7FFFFFFF, 0x7F800000),
    "float16": (np.dtype("<u2"), 0x7FFF, 0x7C00),
    "bfloat16": (np.dtype("<u2"), 0x7FFF, 0x7F80),
}
# Numbers that are looked at together: they stay in the processor's cache.
_SLICE = 1 << 18


def all_finite(stored: np.ndarray, dtype: str) -> bool:
    """Whether a storage array of a floating-point dtype is free of NaN and infinite numbers."""
    kind, magnitude, infinite = _BITS[dtype]
    numbers = np.ascontiguousarray(stored).reshape(-1).view(kind)
    return all(
        (numbers[start : start + _SLICE] & magnitude).max() < infinite
        for start in range(0, numbers.size, _SLICE)
    )


def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """Convert to a storage array: round to nearest, ties to even.

    Args:
        values: float32 numbers of any shape, or a storage array of ``dtype``, which is
            returned as it is (for bfloat16: uint16 bits).
        dtype: dtype of the bank, a key of ``STORAGE``.

    A number beyond the range of ``dtype`` becomes infinite, as in MLX and NumPy; every NaN
    becomes the one quiet NaN 0x7fc0 in bfloat16.

    Raises:
        FormatError: ``values`` is neither float32 nor a storage array.
    """
    values = np.asarray(values)
    storage = STORAGE[dtype]
    if values.dtype == storage:
        return values
    if values.dtype != np.float32 or dtype == "uint8":
        raise FormatError(
            f"an array of {values.dtype} cannot be stored as {dtype}; expected float32 or the "
            f"{storage.name} storage array"
        )
    if dtype == "float16":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(storage)
    bits = np.ascontiguousarray(values).reshape(values.shape).view(np.uint32)
    # Half of the last place that stays, less one, plus that place: ties go to the even one.
    # Only NaNs can wrap around, and those are replaced.
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(storage)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded


def from_storage(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Convert a storage array of ``dtype`` to float32; exact."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
