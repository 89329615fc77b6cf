"""Parts: what is written is what is read, and what is damaged is named."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mlx_hiermem.corpus.part import Part, read_part, tokens_place, write_part
from mlx_hiermem.errors import FormatError


def make_part(lengths=(3, 1, 4), views=(1, 2, 1), dtype=np.uint16, width=5):
    """A part of windows with these numbers of tokens and of vectors; two windows to a document."""
    windows = len(lengths)
    rng = np.random.default_rng(windows)
    return Part(
        tokens=rng.integers(0, 1000, sum(lengths)).astype(dtype),
        starts=np.append(0, np.cumsum(lengths)).astype(np.int64),
        documents=np.arange(windows) // 2,
        rows_window=np.repeat(np.arange(windows), views[:windows]),
        vectors=rng.standard_normal((sum(views[:windows]), width)).astype(np.float32),
    )


WINDOWS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), max_size=8)


@given(windows=WINDOWS, dtype=st.sampled_from([np.uint16, np.uint32]))
def test_what_is_written_is_what_is_read(windows, dtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("part") / "0.safetensors"
    part = make_part([n for n, _ in windows], [v for _, v in windows], dtype)
    write_part(path, part)
    found = read_part(path)
    other = load_file(path)  # any reader of safetensors sees the same arrays
    for name, array in other.items():
        expected = getattr(part, name)
        assert getattr(found, name).dtype == expected.dtype == array.dtype
        np.testing.assert_array_equal(getattr(found, name), expected)
        np.testing.assert_array_equal(array, expected)
    assert found.windows == len(windows)
    assert found.lengths.tolist() == [n for n, _ in windows]
    first = [part.rows_window.tolist().index(w) for w in range(len(windows))]
    assert found.first_rows.tolist() == first


def test_the_tokens_lie_where_they_are_said_to(tmp_path):
    part = make_part(dtype=np.uint32)
    write_part(tmp_path / "p", part)
    dtype, offset, count = tokens_place(tmp_path / "p")
    assert (dtype, count) == (np.dtype(np.uint32), 8)
    found = np.fromfile(tmp_path / "p", dtype, count, offset=offset)
    np.testing.assert_array_equal(found, part.tokens)
    assert offset % dtype.itemsize == 0


def test_the_same_part_gives_the_same_bytes(tmp_path):
    first = write_part(tmp_path / "a", make_part())
    assert first == write_part(tmp_path / "b", make_part())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros(8, np.int64)}, "tokens is int64"),
        ({"tokens": np.zeros(9, np.uint16)}, "starts do not ascend from 0 to 9 tokens"),
        ({"starts": np.array([0, 3, 3, 8])}, "starts do not ascend"),
        ({"starts": np.array([0, 3, 8])}, "3 starts for 3 windows, expected 4"),
        ({"documents": np.array([0, 1, 0])}, "documents do not ascend"),
        ({"documents": np.array([-1, 0, 1])}, "documents do not ascend"),
        ({"rows_window": np.array([0, 1, 1, 3])}, "rows_window does not go through"),
        ({"rows_window": np.array([0, 1, 1, 1])}, "rows_window does not go through"),
        ({"rows_window": np.array([0, 2, 1, 2])}, "rows_window does not go through"),
        ({"rows_window": np.array([0, 1, 2])}, "3 rows_window for 4 vectors"),
        ({"vectors": np.zeros((4, 5))}, "vectors is float64"),
        ({"vectors": np.zeros(4, np.float32)}, r"vectors is float32 of shape \(4,\)"),
    ],
)
def test_what_is_no_part_is_not_written(tmp_path, change, message):
    with pytest.raises(FormatError, match=message):
        write_part(tmp_path / "p", replace(make_part(), **change))
    assert not list(tmp_path.iterdir())


def rewrite_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("starts"), "expected the arrays starts, documents"),
        (lambda t: t["tokens"].update(dtype="I64"), "tokens is I64"),
        (lambda t: t["tokens"].update(shape=[2, 4]), r"tokens is U16 of shape \[2, 4\]"),
        (lambda t: t["tokens"].update(shape=[2**70]), "are not sizes"),
        (lambda t: t["tokens"].update(shape=[7]), "tokens lies at"),
        (lambda t: t["starts"].update(data_offsets=[8, 40]), "starts lies at 8 to 40"),
        (lambda t: t.update(vectors=3), "entry of vectors is not that of an array"),
    ],
)
def test_a_header_that_lies_is_named(tmp_path, change, message):
    path = tmp_path / "p"
    write_part(path, make_part())
    rewrite_header(path, change)
    with pytest.raises(FormatError, match=message) as error:
        read_part(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "p"
    write_part(path, make_part())
    whole = path.read_bytes()
    for damage, message in (
        (whole[:-1], "truncated"),
        (whole + b"x", "too long"),
        (whole[:100], "not a part"),
        (b"", "not a part"),
        ((20).to_bytes(8, "little") + b"\x80" * 20, "not valid JSON"),
    ):
        path.write_bytes(damage)
        with pytest.raises(FormatError, match=message):
            read_part(path)
    path.unlink()
    with pytest.raises(FormatError, match="no such file"):
        read_part(path)
