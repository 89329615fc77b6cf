"""Banks in every layout and format: block by block what the checkpoint has."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_hiermem.convert.bank import rows as rows_module
from mlx_hiermem.convert.bank.keys import parse
from mlx_hiermem.convert.bank.rows import BlockRows
from mlx_hiermem.errors import FormatError
from mlx_hiermem.quantization import Quantization
from tests.convert.banks import plan, same_numbers, write
from tests.convert.checkpoints import (
    FORMATS,
    LAYOUTS,
    MATRICES,
    make_numbers,
    save_dcp,
    write_checkpoint,
    write_foreign,
    write_subtrees,
)


@pytest.fixture(scope="module")
def example():
    return make_numbers(ranks=(4, 0, 2), branching=2)


@pytest.fixture(scope="module")
def written(example, tmp_path_factory):
    """A checkpoint in each layout and format; all DCP folders by one pair of processes."""
    folder, jobs = tmp_path_factory.mktemp("checkpoints"), []
    found = {
        (layout, format): write_checkpoint(
            example, folder / f"{layout}-{format}", layout, format, jobs=jobs
        )
        for layout in LAYOUTS
        for format in FORMATS
    }
    save_dcp(jobs)
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("told", [True, False], ids=["told", "read off"])
def test_layouts_and_formats(example, written, tmp_path, layout, format, told):
    """With its memory_config.json, and without: then kind, ranks, k and layers are read off."""
    where = written[layout, format]
    memory_config = where.memory_config if told else None
    with write(example, where.bank, tmp_path, memory_config=memory_config) as bank:
        same_numbers(example, bank)
        assert bank.config.kind == "ffn"
        assert bank.config.layers is None
        assert (bank.config.branching, bank.config.ranks) == (2, (4, 0, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MATRICES)
def test_kinds(kind, layout, tmp_path):
    """Every kind, on some layers of an anchor whose attention is not as wide as its residuals."""
    numbers = make_numbers(kind=kind, n_layers=4, layers=(0, 2, 3), head_dim=6, dtype=torch.float16)
    where = write_checkpoint(numbers, tmp_path / "from", layout, "safetensors", together=False)
    with write(numbers, where.bank, tmp_path / "to", memory_config=where.memory_config) as bank:
        same_numbers(numbers, bank, "float16")
        assert bank.config.kind == kind
        assert bank.config.layers == (0, 2, 3)


@pytest.mark.parametrize("folders", [False, True], ids=["files", "folders"])
@pytest.mark.parametrize("generic_in", ["first", "all"])
@pytest.mark.parametrize("format", ["pt", "safetensors_sharded"])
def test_subtrees_each_in_another_layout(tmp_path, folders, generic_in, format):
    numbers = make_numbers(branching=4, ranks=(4, 2))
    where = write_subtrees(
        numbers, tmp_path / "from", format=format, folders=folders, generic_in=generic_in
    )
    with write(numbers, where.bank, tmp_path / "to") as bank:
        same_numbers(numbers, bank)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transposed_matrices_are_told(tmp_path, layout):
    numbers = make_numbers()
    options = {"transposed": ("w3", "w1")}
    where = write_checkpoint(numbers, tmp_path / "from", layout, **options)
    with write(numbers, where.bank, tmp_path / "to", memory_config=where.memory_config) as bank:
        same_numbers(numbers, bank)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generic_memory_by_level(tmp_path, layout):
    numbers = make_numbers(ranks=(3, 2, 1), branching=2)
    where = write_checkpoint(numbers, tmp_path / "from", layout, generic="by level")
    with write(numbers, where.bank, tmp_path / "to") as bank:
        same_numbers(numbers, bank)


def test_foreign_names(tmp_path):
    numbers = make_numbers()
    where = write_foreign(numbers, tmp_path / "from")
    with write(numbers, where.bank, tmp_path / "to", key_map=where.key_map) as bank:
        same_numbers(numbers, bank)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, source, dtype):
    numbers = make_numbers(dtype=source)
    where = write_checkpoint(numbers, tmp_path / "from")
    with write(numbers, where.bank, tmp_path / "to", dtype=dtype) as bank:
        same_numbers(numbers, bank, dtype)


def test_zeros_in_place_of_a_generic_memory(tmp_path):
    numbers = make_numbers()
    where = write_checkpoint(numbers, tmp_path / "from", generic=None)
    with write(numbers, where.bank, tmp_path / "to", zero_generic=True) as bank:
        assert not np.array(bank.generic().joined).any()
        assert np.array(bank.fetch((0, 0)).joined).any()


def test_quantised_as_bank_quantize_does_it(tmp_path):
    """The same bytes as a conversion followed by ``bank quantize``."""
    from mlx_hiermem.bank.quantize import quantize_bank

    numbers = make_numbers(d=64, dtype=torch.bfloat16)
    where = write_checkpoint(numbers, tmp_path / "from")
    packing = Quantization(4, 32, "affine")
    write(numbers, where.bank, tmp_path / "direct", packing).close()
    write(numbers, where.bank, tmp_path / "plain").close()
    quantize_bank(tmp_path / "plain" / "memory", tmp_path / "two", 4, "affine", 32)
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "direct" / "memory").iterdir())
    for name in names:
        ours = (tmp_path / "direct" / "memory" / name).read_bytes()
        assert ours == (tmp_path / "two" / name).read_bytes(), name


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_in_any_chunk(written, example, monkeypatch, data):
    """Chunks of any size, from any block on, across the borders of groups."""
    layout = data.draw(st.sampled_from(LAYOUTS))
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", data.draw(st.integers(1, 20_000)))
    first = data.draw(st.integers(0, 7))
    count = data.draw(st.integers(1, 8 - first))
    with ExitStack() as stack:
        rows = BlockRows(plan(example, written[layout, "pt"].bank, stack))
        found = np.concatenate([chunk.copy() for chunk in rows.level(3, first, count)])
        expected = [example.block(3, cluster) for cluster in range(first, first + count)]
        np.testing.assert_array_equal(found, np.stack(expected))


@pytest.mark.parametrize(
    "key",
    [
        "memory.w1", "memory.level0.w1", "memory.level1", "memory.level1.3.w1",
        "memory.level1.w1.x",
        "layers.1.memory.level1.3.w1", "layers.1.memory.level1.layers.2.w1", "xmemory.level1.w1",
        "memory.level1.layers.2.w1", "memory.generic.level0.w1", "memory.level1.1.layers.0.w1\n",
        "memory.level99999999999.w1", "memory.level١.w1", "layers.1.memory.level1.2.layers.1.w1",
    ],
)  # fmt: skip
def test_names_that_are_none(key):
    assert parse(key) is None


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite(tmp_path, number, dtype):
    numbers = make_numbers(dtype=dtype)
    numbers.blocks[2]["w2"][8, 1, 1, 3] = number
    where = write_checkpoint(numbers, tmp_path / "from")
    with pytest.raises(FormatError, match=r"memory\.level2\.w2: holds NaN or infinite"):
        write(numbers, where.bank, tmp_path / "to")


def test_numbers_too_large_for_the_dtype(tmp_path):
    numbers = make_numbers()
    numbers.generic["w1"][0, 0, 0] = 70_000
    where = write_checkpoint(numbers, tmp_path / "from")
    with pytest.raises(FormatError, match=r"memory\.generic\.w1, as float16: holds NaN or inf"):
        write(numbers, where.bank, tmp_path / "to", dtype="float16")
