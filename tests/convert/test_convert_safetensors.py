"""Headers of safetensors files that are not as they should be."""

from __future__ import annotations

import json
import os

import pytest

from mlx_hiermem.convert.sources import open_source
from mlx_hiermem.errors import FormatError


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"w": ["F32", [2], [0, 8]]}, None),
        ({"w": ["F32", [2], [0, 8]], "v": ["F32", [0], [8, 8]]}, None),
        ({"w": ["F32", [3], [0, 8]]}, "has 8 bytes, expected 12"),
        ({"w": ["F32", [2], [0, 8]], "v": ["U8", [4], [4, 8]]}, "overlaps another tensor"),
        ({"w": ["F32", [1], [4, 8]]}, "behind a gap"),
        ({"w": ["F32", [1], [0, 4]]}, "too long"),
        ({"w": ["F32", [4], [0, 16]]}, "truncated"),
        ({"w": ["F32", [-2], [0, 8]]}, "that are valid"),
        ({"w": ["F32", [2.0], [0, 8]]}, "that are valid"),
        ({"w": ["F32", [True, 2], [0, 8]]}, "that are valid"),
        ({"w": ["F32", [2**40, 2**40], [0, 8]]}, "that are valid"),
        ({"w": ["F32", [0, 2**70], [0, 0]]}, "that are valid"),
        ({"w": ["F32", [2], [8, 0]]}, "has -8 bytes"),
        ({"w": ["F4", [16], [0, 8]]}, "expected a dtype of"),
        ({"w": ["float32", [2], [0, 8]]}, "expected a dtype of"),
        ({"w": [["F32"], [2], [0, 8]]}, "expected a dtype of"),
        ({"w": ["F32", [1] * 99, [0, 4]]}, "that are valid"),
        ({}, "too long"),
    ],
)
def test_headers_of_safetensors(tmp_path, header, reason):
    fields = ("dtype", "shape", "data_offsets")
    text = json.dumps({name: dict(zip(fields, row, strict=True)) for name, row in header.items()})
    check_header(tmp_path, text, reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"w": {}, "w": {}}', "'w' appears twice"),
        ('{"w": {"dtype": "U8", "dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}', "twice"),
        ('{"w": 1}', "that are valid"),
        ('{"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8], "x": 1}}', "that are valid"),
        ('{"__metadata__": {"a": 1}}', "no object of strings"),
        ('{"__metadata__": []}', "no object of strings"),
        ("[]", "not a JSON object"),
        (" {}", "not a JSON object"),
        ("{", "not valid JSON"),
        ("{" * 5000, "not valid JSON"),
        ('{"w": ' + "[" * 100_000, "not valid JSON"),
        ('{"w": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"w": "\udc80"}', "not valid JSON"),
    ],
)
def test_texts_of_safetensors(tmp_path, text, reason):
    check_header(tmp_path, text, reason)


def check_header(folder, text, reason):
    raw = text.encode("utf-8", "surrogateescape")
    path = folder / "a.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    if reason is None:
        open_source(path).close()
        return
    with pytest.raises(FormatError, match=reason) as error:
        open_source(path)
    assert "\n" not in str(error.value)


def test_length_of_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in (100, 100_000_001, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(FormatError, match="a header of"):
            open_source(path)
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(path, 100_001_000)  # a hole: it takes no room on the disk
    with pytest.raises(FormatError, match="a header of 100000001"):
        open_source(path)
    path.write_bytes(b"{}")
    with pytest.raises(FormatError, match="2 bytes are no safetensors file"):
        open_source(path)
