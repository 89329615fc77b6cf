"""The base of a rotary embedding, from the inverse frequencies in a checkpoint's buffer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Bases in use, tried first.
BASES = (10_000.0, 100_000.0, 500_000.0, 1_000_000.0)
#: How far off a frequency may be: a few roundings of a power in float32, one in the others.
PRECISION = {"float32": 4e-6, "float16": 2.0**-10, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Base:
    """The base, and whether the frequencies are float32 numbers that were bfloat16 before."""

    value: float
    rounded: bool


def base_of(frequencies: np.ndarray, dtype: str) -> Base | None:
    """The base whose powers the inverse frequencies are.

    Args:
        frequencies: (hd / 2,) float32, with hd the size of a head; not of one number, which is 1.
        dtype: they were stored as.

    Returns:
        None: there is none that is a round number.
    """
    found = _fitting(frequencies.astype(np.float64), PRECISION[dtype])
    if found is not None:
        return Base(found, False)
    lower_half = np.ascontiguousarray(frequencies, np.float32).view(np.uint32) & 0xFFFF
    if dtype == "float32" and not lower_half.any():
        found = _fitting(frequencies.astype(np.float64), PRECISION["bfloat16"])
        return None if found is None else Base(found, True)
    return None


def estimate(frequencies: np.ndarray) -> float:
    """The base by the last frequency alone, which tells it best; nan where there is none."""
    size = len(frequencies)
    with np.errstate(all="ignore"):
        return float(np.float64(frequencies[-1]) ** (-size / (size - 1)))


def fits(frequencies: np.ndarray, base: float, precision: float) -> bool:
    """Whether all inverse frequencies are those of a base."""
    expected = base ** -(np.arange(len(frequencies)) / len(frequencies))
    # Numbers below 2^-14 have fewer bits in float16.
    return bool(np.all(np.abs(frequencies - expected) <= precision * np.maximum(expected, 2**-14)))


def _fitting(frequencies: np.ndarray, precision: float) -> float | None:
    about = estimate(frequencies)
    clean = [float(f"{about:.{digits}e}") for digits in range(4)] if np.isfinite(about) else []
    for base in (*BASES, *clean):
        if base > 1 and fits(frequencies, base, precision):
            return base
    return None
