"""Checkpoints as PyTorch, OpenLM, Hugging Face and safetensors write them, read without PyTorch."""

from __future__ import annotations

import os
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mlx_hiermem.bank.dtypes import STORAGE
from mlx_hiermem.convert.sources import open_source
from mlx_hiermem.convert.sources.tensor import SourceFile
from mlx_hiermem.convert.sources.zip_check import Window, read_directory, read_records
from mlx_hiermem.errors import FormatError
from tests.convert.test_convert_attacks import open_apart


def storage(tensor):
    """The numbers of a tensor as SourceTensor.read gives them."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def check(source, state):
    """``source`` holds the tensors of ``state`` and no others."""
    assert list(source.tensors) == list(state)
    for name, tensor in state.items():
        found = source.tensors[name]
        assert found.name == name and found.shape == tuple(tensor.shape)
        assert found.dtype == str(tensor.dtype).removeprefix("torch.")
        if found.dtype in STORAGE:
            assert found.nbytes == tensor.nbytes
            np.testing.assert_array_equal(found.read(), storage(tensor), name)


def tensors():
    """One of each kind that a checkpoint may hold."""
    make = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 3, generator=make)
    tied = torch.randn(4, 2, generator=make)
    named = torch.randn(2, generator=make)
    named.comment = "an attribute"
    return {
        "float32": torch.randn(4, 3, 2, generator=make),
        "bfloat16": torch.randn(5, 3, generator=make).bfloat16(),
        "float16": torch.randn(5, generator=make).half(),
        "uint8": torch.arange(7, dtype=torch.uint8),
        "view": rows[2:5],
        "row": rows[6],
        "tied": tied,
        "tied_again": tied,
        "reshaped": tied.view(2, 4),
        "one_wide": rows[:, :1].contiguous(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
        "parameter": torch.nn.Parameter(torch.randn(2, 2, generator=make)),
        "named": named,
        # Known, not to be read.
        "float64": torch.zeros(2, dtype=torch.float64),
        "counter": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "uint16": torch.zeros(3, dtype=torch.uint16),
        "float8": torch.zeros(3, dtype=torch.float8_e4m3fn),
    }


def test_every_kind_of_tensor(tmp_path):
    torch.save(tensors(), tmp_path / "a.pt")
    with open_source(tmp_path / "a.pt") as source:
        assert source.format == "torch" and len(source.files) == 1
        check(source, tensors())


def test_the_same_places_as_pytorch(tmp_path):
    """torch.load says where each storage lies; it agrees."""
    torch.save(tensors(), tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True, map_location="meta")
    with open_source(tmp_path / "a.pt") as source:
        for name, tensor in loaded.items():
            place = tensor.untyped_storage()._checkpoint_offset
            place += tensor.storage_offset() * tensor.itemsize if tensor.numel() else 0
            assert source.tensors[name].boxes[0].offset == place, name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a.pt"
    torch.save(tensors(), path)
    with open_source(path) as source:
        yield source


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranges_of_rows(saved, data):
    state = tensors()
    name = data.draw(st.sampled_from(["float32", "bfloat16", "float16", "view", "row", "reshaped"]))
    first = data.draw(st.integers(0, len(state[name])))
    count = data.draw(st.integers(0, len(state[name]) - first))
    values = saved.tensors[name].read(first, count)
    assert values.flags.c_contiguous and values.flags.writeable
    np.testing.assert_array_equal(values, storage(state[name][first : first + count]))


def test_no_pytorch_is_needed(tmp_path):
    """``open_apart`` checks that nothing imports torch."""
    torch.save(tensors(), tmp_path / "a.pt")
    assert open_apart([tmp_path / "a.pt"])[str(tmp_path / "a.pt")] == [
        "opened",
        ", ".join(tensors()),
    ]


def test_older_format(tmp_path):
    """As PyTorch 1.6 wrote: no byteorder, no serialization_id, storages in another order."""
    torch.save({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        content = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(tmp_path / "old.pt", "w") as file:
        for name in ("a/data/1", "a/data/0", "a/data.pkl", "a/version"):
            file.writestr(name, content[name])
    with open_source(tmp_path / "old.pt") as source:
        check(source, {"a": torch.ones(2), "b": torch.zeros(3)})


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_epoch_of_openlm(tmp_path, wrap):
    state = {"layers.0.w": torch.ones(2, 2), "norm.weight": torch.zeros(2)}
    checkpoint = {
        "epoch": 3,
        "name": "run",
        "is_final": True,
        "state_dict": {wrap + name: value for name, value in state.items()},
        "evaluation_metrics": [{"loss": 2.5}],
        "evaluation_loss": 2.5,
        "rng": torch.ones(4, dtype=torch.uint8),
    }
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    with open_source(tmp_path / "epoch_3.pt") as source:
        check(source, state)
        assert source.extras == {
            "epoch": 3,
            "name": "run",
            "is_final": True,
            "evaluation_loss": 2.5,
        }


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_keys_of_the_state_dict(tmp_path, key):
    model = torch.nn.Linear(2, 3)  # its state dict is an OrderedDict with _metadata
    torch.save({"optimizer": {"w": torch.ones(9)}, key: model.state_dict()}, tmp_path / "a.ckpt")
    with open_source(tmp_path / "a.ckpt") as source:
        check(source, model.state_dict())


def test_other_values_are_ignored(tmp_path):
    state = {"w": torch.ones(2), "_extra_state": None, "more": {"x": 1}, 7: torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    with open_source(tmp_path / "a.pt") as source:
        check(source, {"w": torch.ones(2)})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"epoch": 3, "weights": {"w": torch.ones(2)}}, "its keys are 'epoch', 'weights'"),
        ({"state_dict": {"w": torch.ones(2, 3).T}}, "not contiguous; save it with .contiguous"),
        ({"state_dict": {"w": torch.ones(4, 3)[:, :2]}}, "not contiguous"),
        ({"state_dict": {"w": torch.ones(1).expand(5)}}, "not contiguous"),
        ({"args": Namespace(a=1), "state_dict": {"w": torch.ones(1)}}, "Namespace.*without them"),
        ({"module.w": torch.ones(1), "w": torch.ones(1)}, "a.pt: 'module.w' and 'w' are both 'w'"),
        ({"module": torch.ones(1)}, "nothing but a wrapper"),
        ({"w": torch._neg_view(torch.ones(2))}, "resolve_neg"),
    ],
)
def test_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=reason) as error:
        open_source(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


def test_missing_and_unknown(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        open_source(tmp_path / "a.pt")
    for name, hint in (("a.txt", "ends with .safetensors"), ("a.pt2", "is a program")):
        (tmp_path / name).touch()
        with pytest.raises(FormatError, match=hint):
            open_source(tmp_path / name)
    with pytest.raises(FormatError, match="no checkpoint in it"):
        open_source(tmp_path)


def test_safetensors(tmp_path):
    state = {
        name: value.detach().clone()
        for name, value in tensors().items()
        if name not in ("complex",)
    }
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "x"})
    with open_source(tmp_path / "a.safetensors") as source:
        assert source.format == "safetensors"
        assert source.extras == {"format": "pt", "note": "x"}
        check(source, {name: state[name] for name in source.tensors})
        assert set(source.tensors) == set(state)


def test_archives_beyond_4_gib(tmp_path):
    """Sizes and places of more than 32 bits; a file with a hole, that takes no room."""
    path, size = tmp_path / "a.pt", (1 << 32) + 24
    with open(path, "wb") as raw, zipfile.ZipFile(raw, "w") as file:
        file.writestr("a/data.pkl", b"")
        info = zipfile.ZipInfo("a/data/0")
        info.file_size = info.compress_size = size
        info.header_offset, info.CRC = raw.tell(), 0
        raw.write(info.FileHeader(zip64=True))
        raw.seek(size - 1, os.SEEK_CUR)
        raw.write(b"\7")
        file.filelist.append(info)
        file.NameToInfo[info.filename] = info
        file.start_dir = raw.tell()
        file.writestr("a/data/1", b"end")
    opened = SourceFile.open(path)
    window = Window.of(opened)
    records = read_records(window, read_directory(window))
    assert [size for _, size in records.values()] == [0, size, 3]
    assert window.read(*records["a/data/1"]) == b"end"
    assert window.read(records["a/data/0"][0] + size - 1, 1) == b"\7"
    os.close(opened.fd)
