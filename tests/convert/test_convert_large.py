"""Checkpoints of many gigabytes, as sparse files: their offsets take more than 32 bits."""

from __future__ import annotations

import json
import os

import numpy as np

from mlx_hiermem.convert.sources import open_source


def test_a_safetensors_file_of_a_bank(tmp_path):
    """Three tensors of 6 GB each, all holes but for a few numbers."""
    path, size = tmp_path / "memory.safetensors", 6 << 30
    shape = [4096, size // 4096 // 2]
    header = {
        f"memory.level3.w{i}": {
            "dtype": "BF16", "shape": shape, "data_offsets": [(i - 1) * size, i * size],
        }
        for i in (1, 2, 3)
    }  # fmt: skip
    text = json.dumps(header).encode()
    start = 8 + len(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + 3 * size)
    marks = np.arange(1, 9, dtype=np.uint16)
    with open(path, "r+b") as file:
        for i in range(3):
            row = start + i * size + 4001 * 2 * shape[1]
            os.pwrite(file.fileno(), (marks + i).tobytes(), row + 16)
    with open_source(path) as source:
        for i in range(3):
            tensor = source.tensors[f"memory.level3.w{i + 1}"]
            assert tensor.nbytes == size
            row = tensor.read(4001, 1)[0]
            np.testing.assert_array_equal(row[8:16], marks + i)
            assert not row[:8].any() and not row[16:].any()
