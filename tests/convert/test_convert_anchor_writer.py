"""Anchors are written as mlx-lm writes them, in a stream."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from safetensors import safe_open

from mlx_hiermem.anchors import get_model_classes, load_anchor
from mlx_hiermem.anchors.openlm import Model, ModelArgs
from mlx_hiermem.convert import anchor_writer
from mlx_hiermem.convert.anchor_writer import nbytes_of, write_anchor
from mlx_hiermem.convert.openlm.weights import Part, Target, map_anchor
from mlx_hiermem.convert.sources import open_source
from mlx_hiermem.errors import FormatError, HierMemError, InputError
from tests.convert.openlm_states import (
    HEAD_DIM,
    HEADS,
    INNER,
    LAYERS,
    VOCAB,
    D,
    save,
    state_dict,
)

ARGS = ModelArgs(D, LAYERS, INNER, HEADS, HEAD_DIM, vocab_size=VOCAB)


def written(tmp_path: Path, state: dict, dtype: str | None = None, **options) -> Path:
    path, folder = save(tmp_path, state), tmp_path / "out"
    folder.mkdir(exist_ok=True)
    with open_source(path) as source:
        targets = map_anchor(source.tensors, ARGS).targets
        names = write_anchor(folder, targets, asdict(ARGS), dtype, **options)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert names[-1] == "config.json"
    return folder


def test_the_folder_is_a_model_of_mlx_lm(tmp_path):
    state = state_dict()
    folder = written(tmp_path, state)
    model, config = load_model(folder, get_model_classes=get_model_classes)
    assert ModelArgs.from_dict(config) == ARGS
    np.testing.assert_array_equal(np.array(model.lm_head.weight), state["output.weight"].numpy())
    assert load_anchor(folder)[0](mx.array([[1, 2]])).shape == (1, 2, VOCAB)
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "mlx"}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    parameters = dict(tree_flatten(Model(ARGS).parameters()))
    assert index["weight_map"] == dict.fromkeys(sorted(parameters), "model.safetensors")
    assert index["metadata"] == {
        "total_size": sum(one.nbytes for one in parameters.values()),
        "total_parameters": sum(one.size for one in parameters.values()),
    }


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16", None])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(tmp_path, source, target):
    state = state_dict(dtype=source)
    folder = written(tmp_path, state, target)
    weights = mx.load(str(folder / "model.safetensors"))
    dtype = target or str(source).removeprefix("torch.")
    assert {str(array.dtype) for array in weights.values()} == {f"mlx.core.{dtype}"}
    expected = state["output.weight"].to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(np.array(weights["lm_head.weight"].astype(mx.float32)), expected)


def test_every_tensor_keeps_its_own_dtype_and_lies_at_a_multiple_of_its_size(tmp_path):
    state = state_dict(dtype=torch.bfloat16)
    state["norm.weight"] = state["norm.weight"].float()
    path = written(tmp_path, state) / "model.safetensors"
    weights = mx.load(str(path))
    assert weights["model.norm.weight"].dtype == mx.float32
    assert weights["lm_head.weight"].dtype == mx.bfloat16
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    sizes = {"F32": 4, "BF16": 2}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


def test_an_odd_number_of_small_numbers_before_large_ones(tmp_path):
    numbers = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2)}
    torch.save(numbers, tmp_path / "x.pt")
    with open_source(tmp_path / "x.pt") as source:
        targets = [
            Target(n, t.shape, (Part(t, 0, len(numbers[n])),)) for n, t in source.tensors.items()
        ]
        write_anchor(tmp_path, targets, {})
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["b"]["data_offsets"] == [0, 8] and header["a"]["data_offsets"] == [8, 14]


def test_shards(tmp_path):
    state = state_dict()
    limit = 3 * D * INNER * 4
    folder = written(tmp_path, state, shard=limit)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(shards)
    assert count > 3
    assert shards == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert all(sum(a.nbytes for a in mx.load(str(folder / s)).values()) <= limit for s in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, shard in index.items():
        assert name in mx.load(str(folder / shard))
    model, _ = load_anchor(folder)
    np.testing.assert_array_equal(np.array(model.lm_head.weight), state["output.weight"].numpy())


def test_a_tensor_that_is_larger_than_a_shard_has_its_own(tmp_path):
    shards = written(tmp_path, state_dict(), shard=8).glob("*.safetensors")
    assert all(len(mx.load(str(path))) == 1 for path in shards)


def test_chunks_of_any_size_give_the_same_bytes(tmp_path, monkeypatch):
    state = state_dict(dtype=torch.bfloat16)
    whole = (written(tmp_path / "a", state, "float32") / "model.safetensors").read_bytes()
    monkeypatch.setattr(anchor_writer, "_CHUNK", 5 * 4 * D)  # five rows at a time
    steps: list[int] = []
    folder = written(tmp_path / "b", state, "float32", progress=steps.append)
    assert (folder / "model.safetensors").read_bytes() == whole
    assert len(steps) > 40
    assert sum(steps) == sum(a.nbytes for a in mx.load(str(folder / "model.safetensors")).values())


def test_parts_are_joined(tmp_path):
    with open_source(save(tmp_path, state_dict())) as source:
        norm, table = source.tensors["norm.weight"], source.tensors["output.weight"]
        targets = [
            Target("a", (7, D), (Part(table, 2, 4), Part(table, 20, 3))),
            Target("b", (3,), (Part(norm, 5, 3),)),
        ]
        write_anchor(tmp_path, targets, {})
        assert nbytes_of(targets[0], "float16") == 7 * D * 2
        found = mx.load(str(tmp_path / "model.safetensors"))
        expected = np.concatenate([table.read(2, 4), table.read(20, 3)])
        np.testing.assert_array_equal(np.array(found["a"]), expected)
        np.testing.assert_array_equal(np.array(found["b"]), norm.read(5, 3))


def test_the_peak_does_not_grow_with_a_tensor(tmp_path, monkeypatch):
    chunk = 1 << 18
    monkeypatch.setattr(anchor_writer, "_CHUNK", chunk)
    torch.save({"x": torch.ones(1 << 16, 64, dtype=torch.bfloat16)}, tmp_path / "big.pt")
    with open_source(tmp_path / "big.pt") as source:
        tensor = source.tensors["x"]
        target = Target("x", tensor.shape, (Part(tensor, 0, tensor.shape[0]),))
        tracemalloc.start()
        try:
            write_anchor(tmp_path, [target], {}, "float16")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert tensor.nbytes == 8 << 20
    assert peak < 8 * chunk


# ---- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_numbers_that_are_not_finite(tmp_path, dtype, number):
    state = state_dict(dtype=dtype)
    name = "layers.1.feed_forward.w12.weight"
    state[name][INNER + 3, 5] = number  # of the second of the two
    with pytest.raises(FormatError, match=f"{name} has numbers that are not finite in rows 24 to"):
        written(tmp_path, state)
    assert list((tmp_path / "out").iterdir()) == []


def test_numbers_too_large_for_the_dtype(tmp_path):
    state = state_dict()
    state["norm.weight"][3] = 1e6
    with pytest.raises(FormatError, match="norm.weight has numbers too large for float16"):
        written(tmp_path, state, "float16")
    assert not (tmp_path / "out" / "config.json").exists()
    assert written(tmp_path, state, "bfloat16")


@pytest.mark.parametrize("dtype", ["float64", "int8", "uint8", ""])
def test_dtypes_that_are_none(tmp_path, dtype):
    with pytest.raises(InputError, match=f"--dtype {dtype}: known are float32"):
        written(tmp_path, state_dict(), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8], ids=str)
def test_sources_that_are_no_weights(tmp_path, dtype):
    torch.save({"x": torch.ones(2, 2, dtype=dtype)}, tmp_path / "x.pt")
    with open_source(tmp_path / "x.pt") as source:
        tensor = source.tensors["x"]
        target = Target("x", (2, 2), (Part(tensor, 0, 2),))
        with pytest.raises(FormatError, match="x is stored as .*; expected float32"):
            write_anchor(tmp_path, [target], {}, "float32")
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_source_that_shrinks_leaves_no_model(tmp_path):
    path, folder = save(tmp_path, state_dict()), tmp_path / "out"
    folder.mkdir()
    with open_source(path) as source:
        targets = map_anchor(source.tensors, ARGS).targets
        with open(path, "r+b") as file:
            file.truncate(5000)
        with pytest.raises(HierMemError, match="epoch_1.pt"):
            write_anchor(folder, targets, asdict(replace(ARGS)))
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with open_source(save(tmp_path, state_dict())) as source:
        targets = map_anchor(source.tensors, ARGS).targets
        with pytest.raises(FormatError, match="cannot be written"):
            write_anchor(tmp_path / "none", targets, {})
