"""What cannot be quantised: one line, and no bank is left."""

from __future__ import annotations

import pytest

from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.errors import ConfigError, FormatError


def _refused(error, tmp_path):
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_a_quantised_bank_is_not_quantised_again(tmp_path, make):
    make.bank(tmp_path / "memory", make.config(hidden=64))
    quantize_bank(tmp_path / "memory", tmp_path / "packed", 4)
    with pytest.raises(FormatError, match=r"quantised already \(4-bit affine/64\)") as error:
        quantize_bank(tmp_path / "packed", tmp_path / "new", 8)
    _refused(error, tmp_path)


@pytest.mark.parametrize(
    "width, options, text",
    [
        (20, (4,), "a multiple of 20 numbers fit no group size of any mode"),
        (16, (8,), "a multiple of 16 numbers fit no group size"),
        (64, (7,), "bits is '7'; affine has 2, 3, 4, 5, 6, 8"),
        (64, (4, "affine", 128), "rows of 64 numbers do not divide by group size 128"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, make, width, options, text):
    make.bank(tmp_path / "memory", make.config(hidden=width))
    with pytest.raises(ConfigError, match=text) as error:
        quantize_bank(tmp_path / "memory", tmp_path / "new", *options)
    _refused(error, tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("generic", [False, True])
def test_numbers_that_are_not_finite_are_refused(tmp_path, make, bad, generic):
    config = make.config((3, 2), hidden=64)
    rows, one = make.rows(config), make.generic(config)
    (one if generic else rows[2][3])[7] = bad
    write_bank(tmp_path / "memory", config, rows, one)
    name = "generic memory's block of level 1" if generic else "block 3 of level 2"
    with pytest.raises(FormatError, match=f"{name} holds NaN or infinite") as error:
        quantize_bank(tmp_path / "memory", tmp_path / "new", 4)
    _refused(error, tmp_path)


def test_numbers_that_overflow_are_refused(tmp_path, make):
    """Finite, but the span of a group is not."""
    config = make.config((3, 2), hidden=64, dtype="float32")
    rows = make.rows(config)
    rows[2][1][:2] = 3e38, -3e38
    write_bank(tmp_path / "memory", config, rows, make.generic(config))
    with pytest.raises(FormatError, match="too large for 4-bit affine/64") as error:
        quantize_bank(tmp_path / "memory", tmp_path / "new", 4)
    _refused(error, tmp_path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("level-2-00001-of-00002.safetensors", "block 3 of level 2 was altered"),
        ("generic.safetensors", "generic memory's block of level 2 was altered"),
        ("tree.safetensors", "tree.safetensors: altered"),
    ],
)
def test_what_was_altered_is_not_vouched_for(tmp_path, make, name, text):
    """The new bank has checksums of its own: they must not be of spoilt numbers."""
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "tree.safetensors").write_bytes(b"tree")
    make.bank(folder, make.config((3, 2), hidden=64))
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(FormatError, match=text) as error:
        quantize_bank(folder, tmp_path / "new", 4)
    _refused(error, tmp_path)


def test_no_bank_there(tmp_path):
    (tmp_path / "memory").mkdir()
    with pytest.raises(FormatError, match="manifest.json: no such file") as error:
        quantize_bank(tmp_path / "memory", tmp_path / "new", 4)
    _refused(error, tmp_path)
