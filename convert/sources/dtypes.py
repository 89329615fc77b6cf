"""Dtypes of checkpoints: their names in PyTorch and safetensors, and their sizes.

Only those of ``bank.dtypes.STORAGE`` can be read. The others are known so that a checkpoint that
holds them, such as an int64 counter beside the weights, can be opened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

#: Bytes of one number, by the name that PyTorch has for the dtype.
ITEMSIZE = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}

#: Names in a safetensors header.
SAFETENSORS = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}

#: Storage classes of PyTorch that a pickle of torch.save names. "" is bytes: the tensor says what.
STORAGES = {
    "torch.BoolStorage": "bool",
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.ShortStorage": "int16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "",
}

# No array of NumPy has more dimensions. Sizes stay below 2**60, so that no two have the same hash
# in Python (a table of such keys would take for ever).
_MOST_DIMENSIONS, _MOST = 32, 2**60


def is_sizes(values: Any) -> bool:
    """Whether ``values`` is a list or tuple of sizes that a tensor can have, empty or not."""
    return (
        type(values) in (list, tuple)
        and len(values) <= _MOST_DIMENSIONS
        and all(type(v) is int and 0 <= v < _MOST for v in values)
        and math.prod(v for v in values if v) < _MOST
    )


def row_major(shape: Sequence[int]) -> list[int]:
    """Strides, in numbers, of a tensor of ``shape`` without gaps."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]
