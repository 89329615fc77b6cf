"""Converting only the bank of a checkpoint, and reading what was written, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hiermem.bank.dtypes import from_storage, to_storage
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.convert.bank.description import read_description
from mlx_hiermem.convert.bank.gather import open_checkpoints, sort_tensors
from mlx_hiermem.convert.bank.plan import BankPlan, make_plan
from mlx_hiermem.convert.bank.writing import write_planned
from mlx_hiermem.convert.resume import Journal
from mlx_hiermem.convert.sources.names import load_key_map
from mlx_hiermem.quantization import Quantization
from mlx_hiermem.shapes import AnchorShape
from tests.convert.example import Example


def anchor_shape(example: Example) -> AnchorShape:
    config, anchor = example.model_config, example.anchor
    inner = anchor["layers.0.feed_forward.w3.weight"].shape[1]
    d, heads = config["hidden_dim"], config["n_heads"]
    return AnchorShape(config["n_layers"], d, inner, heads, config.get("head_dim", d // heads))


def plan(
    example: Example,
    bank: Path,
    stack: ExitStack,
    *,
    memory_config: Path | None = None,
    key_map: Path | None = None,
    ignore: str | None = None,
    **options: Any,
) -> BankPlan:
    found = sort_tensors(open_checkpoints(bank, stack), key_map and load_key_map(key_map), ignore)
    described = read_description(memory_config)
    shape, base = anchor_shape(example), {"name": "tiny"}
    return make_plan(found.memory, described, shape, base, where=bank, **options)


def write(
    example: Example, bank: Path, out: Path, packing: Quantization | None = None, **options: Any
) -> MemoryBank:
    """Convert a bank, and open what was written."""
    memory = out / "memory"
    memory.mkdir(parents=True)
    journal = Journal(out, "job")
    journal.open()
    with ExitStack() as stack:
        write_planned(plan(example, bank, stack, **options), memory, journal, packing=packing)
    return MemoryBank.open(memory)


def same_numbers(example: Example, bank: MemoryBank, dtype: str = "float32") -> None:
    """Every block of a bank, and the generic memory, against the example's, bit for bit."""

    def rounded(values: np.ndarray) -> np.ndarray:
        return from_storage(to_storage(values, dtype), dtype)

    reader = bank._reader
    assert bank.config.dtype == dtype
    assert bank.config.memory_levels == example.levels
    for level in example.levels:
        for cluster in range(example.branching**level):
            expected = rounded(example.block(level, cluster))
            np.testing.assert_array_equal(reader.block(level, cluster), expected)
    generic = np.concatenate([reader.block(level, None) for level in example.levels])
    np.testing.assert_array_equal(generic, rounded(example.generic_memory()))
    bank.verify()


def rename(example: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """A state dict with another name for one key."""
    return {new if name == old else name: tensor for name, tensor in example.items()}
