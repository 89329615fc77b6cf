"""Folders of torch.distributed.checkpoint: as two processes save them, and tampered with."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_hiermem.convert.sources import open_source
from mlx_hiermem.convert.sources.dcp_metadata import Chunk, _check_cover
from mlx_hiermem.convert.sources.pickles import Refused
from mlx_hiermem.errors import FormatError, HierMemError
from tests.convert.attack_dcp import DCP, save_dcp
from tests.convert.test_convert_attacks import open_apart

ROOT = Path(__file__).parents[2]

# Run by each of two processes: RANK, the folder to save to, the file of the whole tensors.
SAVE = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

rank, folder, whole = int(sys.argv[1]), sys.argv[2], torch.load(sys.argv[3], weights_only=True)
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{sys.argv[3]}.meet")
mesh = init_device_mesh("cpu", (2,))
places = {"rows": [Shard(0)], "columns": [Shard(1)], "both": [Replicate()], "one_row": [Shard(0)],
          "planes": [Shard(1)]}
state = {name: distribute_tensor(value, mesh, places[name]) if name in places else value
         for name, value in whole.items()}
dcp.save({"model": state, "epoch": 3, "optim": {"state": [{"m": torch.ones(2)}]}},
         checkpoint_id=folder)
dist.barrier()
os._exit(0)  # taking gloo down may abort the process (torch 2.13); see save_dcp.py
"""


def storage(tensor):
    """The numbers of a tensor as SourceTensor.read gives them."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def whole_tensors():
    make = torch.Generator().manual_seed(0)
    return {
        "rows": torch.randn(5, 4, generator=make),
        "columns": torch.randn(4, 7, generator=make).bfloat16(),
        "both": torch.randn(3, generator=make).half(),
        "one_row": torch.randn(1, 3, generator=make),  # nothing of it is in the second process
        "planes": torch.randn(3, 5, 2, generator=make),
        "plain": torch.randn(6, 2, generator=make),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder that two processes saved, the whole tensors)"""
    home = tmp_path_factory.mktemp("dcp")
    whole = whole_tensors()
    torch.save(whole, home / "whole.pt")
    command = [sys.executable, "-c", SAVE]
    ranks = [
        subprocess.Popen([*command, str(rank), str(home / "saved"), str(home / "whole.pt")])
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    return home / "saved", whole


def test_two_processes(saved):
    folder, whole = saved
    with open_source(folder) as source:
        assert source.format == "dcp"
        assert {file.path.name for file in source.files} == {
            ".metadata", "__0_0.distcp", "__1_0.distcp",
        }  # fmt: skip
        assert set(source.tensors) == set(whole)
        assert len(source.tensors["columns"].boxes) == 2
        for name, tensor in whole.items():
            np.testing.assert_array_equal(source.tensors[name].read(), storage(tensor), name)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranges_of_rows(saved, data):
    folder, whole = saved
    name = data.draw(st.sampled_from(sorted(set(whole) - {"scalar"})))
    first = data.draw(st.integers(0, len(whole[name])))
    count = data.draw(st.integers(0, len(whole[name]) - first))
    with open_source(folder) as source:
        values = source.tensors[name].read(first, count)
    np.testing.assert_array_equal(values, storage(whole[name][first : first + count]))


def test_no_pytorch_is_needed(saved):
    """``open_apart`` checks that nothing imports torch."""
    assert open_apart([saved[0]])[str(saved[0])][0] == "opened"


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ({"w": torch.ones(2)}, {"w"}),
        ({"model": {"a.w": torch.ones(2)}, "ema": {"a.w": torch.ones(2)}}, {"a.w"}),
        ({"state_dict": {"module": {"w": torch.ones(2)}}, "epoch": 1}, {"w"}),
        ({"app": {"model": {"w": torch.ones(2)}, "optim": {"w": torch.ones(2)}}}, {"w"}),
        # A name with a dot is one name: `model.` is the Hugging Face wrapper's, and lm_head stays.
        (
            {"model.w": torch.ones(2), "lm_head": torch.ones(2), "optim.w": torch.ones(2)},
            {"model.w", "lm_head"},
        ),
        ({"_orig_mod.w": torch.ones(2)}, {"w"}),
    ],
)
def test_where_the_weights_are(tmp_path, state, names):
    save_dcp(tmp_path / "a", state)
    with open_source(tmp_path / "a") as source:
        assert set(source.tensors) == names


@pytest.mark.parametrize(
    ("joined", "names"),
    [
        (["app.model.a", "app.model.b", "app.optim.a"], {"a", "b"}),
        (["model.a", "model.b"], {"a", "b"}),
        (["model.a", "lm_head.b"], {"model.a", "lm_head.b"}),
    ],
)
def test_without_the_nesting(tmp_path, joined, names):
    """Saved by a planner that does not say how the names were joined."""
    save_dcp(tmp_path / "a", {name: torch.ones(2) for name in joined})
    edit_metadata(tmp_path / "a", lambda metadata: setattr(metadata, "planner_data", None))
    with open_source(tmp_path / "a") as source:
        assert set(source.tensors) == names


def test_only_an_optimizer(tmp_path):
    save_dcp(tmp_path / "a", {"optim": {"w": torch.ones(2)}, "epoch": 3})
    with pytest.raises(FormatError, match="no tensors in it"):
        open_source(tmp_path / "a")


def edit_metadata(folder, edit):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_metadata_of_older_pytorch(tmp_path):
    """PyTorch 2.1: classes of _shard, no version, no storage_meta, protocol 4."""
    whole = torch.arange(6.0).reshape(2, 3)
    save_dcp(tmp_path / "a", {"w": whole})
    path = tmp_path / "a" / ".metadata"
    edit_metadata(
        tmp_path / "a",
        lambda metadata: [vars(metadata).pop(key) for key in ("storage_meta", "version")],
    )
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    def old(metadata):
        metadata.state_dict_metadata["w"].properties = TensorProperties(dtype=torch.float32)

    edit_metadata(tmp_path / "a", old)
    assert b"_shard.sharded_tensor.metadata" in path.read_bytes()
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol))
        with open_source(tmp_path / "a") as source:
            np.testing.assert_array_equal(source.tensors["w"].read(), whole.numpy())


def test_not_finished(tmp_path):
    save_dcp(tmp_path / "a", {"w": torch.ones(2)})
    (tmp_path / "a" / ".metadata").unlink()
    with pytest.raises(FormatError, match="no .metadata"):
        open_source(tmp_path / "a")
    with pytest.raises(FormatError, match="give the folder"):
        open_source(tmp_path / "a" / "__0_0.distcp")


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest") / "saved"
    save_dcp(folder, {"model": {"w": torch.arange(24.0).reshape(4, 6), "b": torch.ones(3)}})
    return folder


@pytest.fixture(scope="module")
def opened(tmp_path_factory, honest):
    home = tmp_path_factory.mktemp("attacks")
    canary = home / "canary"
    folders = {name: home / str(number) / "saved" for number, name in enumerate(DCP)}
    for name, folder in folders.items():
        folder.parent.mkdir()
        DCP[name][0](honest, folder, canary)
    assert not canary.exists()
    results = open_apart(folders.values())
    return {name: results[str(folder)] for name, folder in folders.items()}, canary


@pytest.mark.parametrize("name", DCP)
def test_refused(opened, name):
    results, canary = opened
    kind, message = results[name]
    assert kind == "FormatError", (kind, message)
    assert "\n" not in message and len(message) < 600
    assert re.search(DCP[name][1], message), message
    assert not canary.exists()


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_metadata(honest, tmp_path_factory, data):
    """Opens, or is refused with one line; never anything else."""
    folder = honest.parent / "changed"
    if not folder.exists():
        shutil.copytree(honest, folder)
    raw = bytearray((honest / ".metadata").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / ".metadata").write_bytes(raw)
    try:
        open_source(folder).close()
    except HierMemError as error:
        assert "\n" not in str(error)


def test_files_are_closed_when_refused(honest, tmp_path):
    before = len(os.listdir("/dev/fd"))
    DCP["other dtype"][0](honest, tmp_path / "a", tmp_path / "canary")
    with pytest.raises(FormatError):
        open_source(tmp_path / "a")
    assert len(os.listdir("/dev/fd")) == before


@given(data=st.data())
def test_cover(data):
    """Boxes that split a tensor are accepted; moving or dropping one is not."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    boxes = [((0,) * len(shape), tuple(shape))]
    for _ in range(data.draw(st.integers(1, 4))):
        start, extent = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        axis = data.draw(st.integers(0, len(shape) - 1))
        cut = data.draw(st.integers(0, extent[axis]))
        low = tuple(cut if i == axis else n for i, n in enumerate(extent))
        high = tuple(n - cut if i == axis else n for i, n in enumerate(extent))
        moved = tuple(s + cut if i == axis else s for i, s in enumerate(start))
        boxes += [box for box in ((start, low), (moved, high)) if np.prod(box[1])]
    chunks = [Chunk(start, extent, "f", 0, 0) for start, extent in boxes]
    _check_cover(tuple(shape), chunks)
    if len(chunks) > 1:
        with pytest.raises(Refused):
            _check_cover(tuple(shape), chunks[1:])
        with pytest.raises(Refused):
            _check_cover(tuple(shape), [*chunks[1:], chunks[1]])
