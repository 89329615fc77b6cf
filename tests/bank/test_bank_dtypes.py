"""Conversion to the numbers that a file holds."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hiermem.bank.dtypes import from_storage, to_storage
from mlx_hiermem.errors import FormatError

# Zeros, subnormals, ties on both sides, the largest number, infinities, every sort of NaN.
EDGES = [
    *(0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00008000, 0x00018000),
    *(0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0xFF7FFFFF),
    *(0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF),
]


def _mlx_bits(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    with mx.stream(mx.cpu):
        return np.array(mx.array(values).astype(dtype).view(mx.uint16))


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1) | st.sampled_from(EDGES), min_size=1, max_size=200))
def test_bfloat16_is_rounded_as_mlx_rounds(bits):
    values = np.array(bits, np.uint32).view(np.float32)
    np.testing.assert_array_equal(to_storage(values, "bfloat16"), _mlx_bits(values, mx.bfloat16))


def test_bfloat16_of_two_million_random_bits():
    bits = np.random.default_rng(0).integers(0, 2**32, 2_000_000, np.uint64).astype(np.uint32)
    values = np.concatenate([bits, np.array(EDGES, np.uint32)]).view(np.float32)
    np.testing.assert_array_equal(to_storage(values, "bfloat16"), _mlx_bits(values, mx.bfloat16))


def test_float16_is_rounded_to_nearest_even():
    values = np.array([1.0, 1 + 2**-11, 1 + 3 * 2**-11, 65504, 65520, -1e9, 2**-24], np.float32)
    expected = np.array([1.0, 1.0, 1 + 2**-9, 65504, np.inf, -np.inf, 2**-24], np.float32)
    np.testing.assert_array_equal(from_storage(to_storage(values, "float16"), "float16"), expected)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", np.uint16), ("float16", np.float16)])
def test_every_stored_number_survives(dtype, kind):
    stored = np.arange(2**16, dtype=np.uint16).view(kind)
    wide = from_storage(stored, dtype)
    assert wide.dtype == np.float32
    back = to_storage(wide, dtype)
    numbers = ~np.isnan(wide)
    np.testing.assert_array_equal(back.view(np.uint16)[numbers], stored.view(np.uint16)[numbers])
    assert np.isnan(from_storage(back, dtype)[~numbers]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_storage_arrays_pass_unchanged(dtype):
    stored = to_storage(np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4), dtype)
    assert stored.shape == (3, 4)
    assert to_storage(stored, dtype) is stored


def test_other_dtypes_are_refused():
    with pytest.raises(FormatError, match="float64 cannot be stored as bfloat16"):
        to_storage(np.zeros(3), "bfloat16")
