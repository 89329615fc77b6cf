"""MLX's arrays with the types that its own functions leave open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx


def load_arrays(path: str | Path) -> dict[str, mx.array]:
    """The named arrays of a file, such as a safetensors file; they are read when evaluated.

    Raises:
        FileNotFoundError, RuntimeError: as of ``mx.load``.
        ValueError: it is of a format that holds one array, without a name.
    """
    found = mx.load(str(path))
    if not isinstance(found, dict):
        raise ValueError("it holds one array without a name; expected safetensors")
    return found


def as_list(array: mx.array) -> list[Any]:
    """The numbers of a vector; of an array of more dimensions, lists."""
    found = array.tolist()
    assert isinstance(found, list), "an array with a dimension"
    return found


def real_number(array: mx.array) -> float:
    """The one number of an array that is not complex."""
    value = array.item()
    assert not isinstance(value, complex)
    return float(value)
