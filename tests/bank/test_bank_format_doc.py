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
from mlx_hiermem.config import MemoryConfig

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
        shape = (len(layers or range(2)), 3, config.ranks[level - 1], 4)
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
