"""docs/format.md: its reader reads, and its facts are those of the code."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mlx_hiermem.bank.dtypes import from_storage
from mlx_hiermem.bank.layout import expected_files
from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.config import KINDS, AnchorShape, MemoryConfig

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_the_reader_in_the_document_reads_every_block(tmp_path, make, dtype, layers):
    config = make.config((3, 0, 2), 3, dtype)
    if layers:
        config = MemoryConfig.from_dict({**config.to_dict(), "layers": layers})
    written = make.bank(tmp_path, config)
    code = re.search(r"```python\n(.*?)```", FORMAT.read_text(), re.DOTALL).group(1)
    assert len(code.splitlines()) <= 24
    imports = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    assert imports <= {"json", "numpy", "pathlib"}
    space: dict = {}
    exec(compile(code, str(FORMAT), "exec"), space)
    for level in config.memory_levels:
        shape = (len(layers or range(2)), 3 * config.ranks[level - 1] * 4)
        for cluster in range(config.clusters(level)):
            block = space["read_block"](tmp_path, level, cluster)
            expected = from_storage(written.stored[level][cluster], dtype).reshape(shape)
            np.testing.assert_array_equal(block, expected)


def test_the_revision_is_made_as_the_document_says(bank):
    text = FORMAT.read_text()
    assert "<sha256>  <name>\\n" in text
    table = json.loads((bank.folder / "manifest.json").read_text())
    lines = "".join(
        f"{table['files'][name]['sha256']}  {name}\n" for name in sorted(table["files"])
    )
    assert table["revision"] == hashlib.sha256(lines.encode()).hexdigest()


def test_every_key_of_the_config_is_in_the_document(bank):
    text = FORMAT.read_text()
    for key in json.loads((bank.folder / "config.json").read_text()):
        assert f"`{key}`" in text
    for name in expected_files(bank.config):
        assert re.sub(r"\d+", "", name)[:5] in text


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantised_block_is_what_the_document_says(tmp_path, make, bits):
    """Unpacked by the words of docs/format.md, in NumPy alone."""
    config = make.config((3, 2), 2, "float32", hidden=64)
    written = make.bank(tmp_path / "plain", config)
    quantize_bank(tmp_path / "plain", tmp_path / "packed", bits, group_size=32)
    name, level, cluster, rank = "level-2-00001-of-00002.safetensors", 2, 3, 2
    data = (tmp_path / "packed" / name).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    rows, size = header["blocks"]["shape"]
    assert header["blocks"]["dtype"] == "U8" and rows == 2
    block = data[8 + length + size : 8 + length + 2 * size]  # cluster 3 is row 1
    matrices, d, groups = 2 * 3, 64, 2
    packed = matrices * rank * d * bits // 8
    words = np.frombuffer(block[:packed], "<u4").reshape(matrices, rank, -1)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    scales, biases = (
        np.frombuffer(part, "<f4").reshape(matrices, rank, groups, 1)
        for part in (
            block[packed : packed + 4 * matrices * rank * groups],
            block[packed + 4 * matrices * rank * groups :],
        )
    )
    numbers = scales * codes.reshape(matrices, rank, groups, 32) + biases
    with MemoryBank.open(tmp_path / "packed") as bank:
        fetched = np.array(bank.fetch((1, cluster)).blocks[1])
    np.testing.assert_allclose(numbers.reshape(-1), fetched, rtol=1e-6, atol=1e-6)
    error = np.abs(fetched - written.stored[level][cluster]).max()
    assert 0 < error < 6 / 2**bits


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_matrices_of_every_kind(kind):
    """The table of kinds: widths of the rows, and numbers in a block."""
    sizes = {"d": 8, "f": 12, "A": 4 * 3, "K": 2 * 3, "L": 5, "r": 7}
    shape = AnchorShape(5, 8, 12, 4, 3, 2)
    (line,) = re.findall(rf"^\| `{kind}` \| (.*) \| (.*) \|$", FORMAT.read_text(), re.MULTILINE)
    widths = [sizes[part.rpartition(": ")[2]] for part in line[0].split(", ")]
    config = MemoryConfig((7,), kind=kind)
    assert config.row_widths(shape) == tuple(widths) * 5
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", re.sub(r"(\d)([a-zA-Z])", r"\1*\2", line[1]))
    assert config.block_size(1, shape) == eval(product, {}, sizes)
