"""Quantisations: which there are, which fits, and how many bytes a row takes."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.config import DTYPE_BYTES
from mlx_hiermem.errors import ConfigError
from mlx_hiermem.quantization import MODES, Quantization

EVERY = [
    Quantization(bits, group_size, mode)
    for mode, (known, sizes) in MODES.items()
    for bits in known
    for group_size in sizes
]


@given(
    packing=st.sampled_from(EVERY),
    groups=st.integers(1, 6),
    rows=st.integers(1, 4),
    dtype=st.sampled_from(list(DTYPE_BYTES)),
)
def test_a_row_has_the_bytes_that_mlx_packs_it_into(packing, groups, rows, dtype):
    width = groups * packing.group_size
    # Twice the rows: MLX on a CPU (0.32) cannot pack an odd number of nvfp4's groups.
    packed = mx.quantize(mx.zeros((2 * rows, width), getattr(mx, dtype)), **packing.to_dict())
    found = packing.row_bytes(width, DTYPE_BYTES[dtype])
    assert [2 * rows * size for size in found] == [array.nbytes for array in packed]


@pytest.mark.parametrize(
    "widths, bits, expected",
    [
        ([64], 8, "8-bit affine/64"),
        ([64], 4, "4-bit affine/64"),
        ([512, 512, 192], 2, "2-bit affine/64"),
        ([32], 4, "4-bit affine/32"),
        ([96], 3, "3-bit affine/32"),
        ([64, 32], 4, "4-bit affine/32"),
        ([16], 4, "nvfp4/16"),
        ([48], 4, "nvfp4/16"),
        ([64, 16], 4, "nvfp4/16"),
    ],
)
def test_what_is_chosen_for_a_width(widths, bits, expected):
    assert str(Quantization.choose(widths, bits)) == expected


@pytest.mark.parametrize(
    "mode, group_size, expected",
    [
        ("mxfp4", None, "mxfp4/32"),
        ("nvfp4", None, "nvfp4/16"),
        ("affine", None, "4-bit affine/64"),
        (None, 128, "4-bit affine/128"),
        (None, 32, "4-bit affine/32"),
        (None, 16, "nvfp4/16"),
    ],
)
def test_what_is_asked_for_is_taken(mode, group_size, expected):
    assert str(Quantization.choose([128], 4, mode, group_size)) == expected


@pytest.mark.parametrize(
    "width, bits, mode, group_size, text",
    [
        (20, 4, None, None, "a multiple of 20 numbers fit no group size of any mode with 4 bits"),
        (16, 8, None, None, "a multiple of 16 numbers fit no group size of any mode with 8 bits"),
        (48, 4, "affine", None, "a multiple of 48 numbers fit no group size of affine"),
        (16, 4, "mxfp4", None, "fit no group size of mxfp4 with 4 bits; .* by 16 for nvfp4"),
        (64, 4, None, 128, "rows of 64 numbers do not divide by group size 128; choose another"),
        (64, 4, "affine", 128, "rows of 64 numbers do not divide by group size 128"),
        (64, 7, None, None, "bits is '7'; affine has 2, 3, 4, 5, 6, 8"),
        (64, 0, None, None, "bits is '0'; affine has 2, 3, 4, 5, 6, 8"),
        (16, 7, None, None, "bits is '7'; affine has"),
        (64, 8, "mxfp4", None, "bits is '8'; mxfp4 has 4"),
        (64, 4, "mxfp8", None, "bits is '4'; mxfp8 has 8"),
        (64, 4, None, 0, "group_size is '0'; affine has 32, 64, 128"),
        (64, 4, None, 7, "group_size is '7'; affine has 32, 64, 128"),
        (64, 8, None, 16, "group_size is '16'; affine has 32, 64, 128"),
        (64, 4, "nvfp4", 32, "group_size is '32'; nvfp4 has 16"),
        (64, 4, "int4", None, "mode is 'int4'; known are affine, mxfp4, nvfp4, mxfp8"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(width, bits, mode, group_size, text):
    with pytest.raises(ConfigError, match=text) as error:
        Quantization.choose([width] * 6, bits, mode, group_size)
    assert "\n" not in str(error.value)


@given(
    width=st.integers(1, 40).map(lambda n: 8 * n),
    bits=st.integers(0, 9),
    mode=st.sampled_from([None, *MODES]),
    group_size=st.sampled_from([None, 0, 16, 32, 64, 128]),
)
def test_what_is_chosen_fits_and_is_what_was_asked_for(width, bits, mode, group_size):
    possible = [
        one
        for one in EVERY
        if width % one.group_size == 0
        and one.bits == bits
        and (one.mode in ("affine", "nvfp4") if mode is None else one.mode == mode)
        and group_size in (None, one.group_size)
    ]
    if possible:
        assert Quantization.choose([width], bits, mode, group_size) in possible
    else:
        with pytest.raises(ConfigError):
            Quantization.choose([width], bits, mode, group_size)


@pytest.mark.parametrize("packing", EVERY, ids=str)
def test_a_config_gives_back_what_was_put_in(packing):
    assert Quantization.of(packing.to_dict()) == packing
    packing.check(3 * packing.group_size)
    with pytest.raises(ConfigError, match="do not divide"):
        packing.check(packing.group_size + 8)


@pytest.mark.parametrize(
    "values, text",
    [
        ("4-bit", "quantization is '4-bit'; expected null or an object of mode, bits and group_"),
        ([4, 64], "expected null or an object"),
        ({"bits": 4}, "expected null or an object"),
        ({"bits": 4, "group_size": 64, "scale": 1}, "expected null or an object"),
        ({"bits": True, "group_size": 64}, "bits is 'True'"),
        ({"bits": 4.0, "group_size": 64}, "bits is '4.0'"),
        ({"bits": "4", "group_size": 64}, "bits is '4'"),
        ({"bits": 4, "group_size": None}, "group_size is 'None'"),
        ({"bits": 4, "group_size": 64, "mode": None}, "mode is 'None'"),
        ({"bits": 4, "group_size": 64, "mode": ["affine"]}, "mode is"),
    ],
)
def test_wrong_values_of_a_config(values, text):
    with pytest.raises(ConfigError, match=text):
        Quantization.of(values)
    assert Quantization.of({"bits": 4, "group_size": 64}).mode == "affine"
