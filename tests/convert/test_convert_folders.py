"""Folders of checkpoints: one file, shards with and without an index."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from mlx_hiermem.convert.sources import open_source
from mlx_hiermem.errors import FormatError, InputError
from tests.convert.test_convert_sources import check


def test_folder_with_one_file(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "epoch_2.pt")
    for name in ("optimizer_2.pt", "stats_2.pt", "optimizer.pt", "training_args.bin", "._a.pt"):
        (tmp_path / name).write_bytes(b"not read")
    with open_source(tmp_path) as source:
        check(source, {"w": torch.ones(2)})
    torch.save({"w": torch.ones(2)}, tmp_path / "epoch_3.pt")
    with pytest.raises(InputError, match="epoch_2.pt, epoch_3.pt"):
        open_source(tmp_path)


SHARDS = (
    {"a": torch.ones(2, 3), "b": torch.arange(4.0).bfloat16()},
    {"c": torch.zeros(3), "d": torch.full((2,), 7.0)},
)


def save_shards(folder, suffix, index=True, prefix="model"):
    """Two files and their index as Hugging Face writes them; {name: file}."""
    names = {}
    for number, state in enumerate(SHARDS, 1):
        name = f"{prefix}-{number:05d}-of-00002{suffix}"
        save_file(state, folder / name) if suffix == ".safetensors" else torch.save(
            state, folder / name
        )
        names |= dict.fromkeys(state, name)
    if index:
        write_index(folder, names, suffix, prefix)
    return names


def write_index(folder, names, suffix=".safetensors", prefix="model"):
    table = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / f"{prefix}{suffix}.index.json").write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("suffix", "prefix"),
    [(".safetensors", "model"), (".safetensors", "bank"), (".bin", "pytorch_model"), (".pt", "x")],
)
def test_shards_with_an_index(tmp_path, suffix, prefix):
    save_shards(tmp_path, suffix, prefix=prefix)
    (tmp_path / f"other{suffix}").write_bytes(b"not in the index, not read")
    with open_source(tmp_path) as source:
        check(source, SHARDS[0] | SHARDS[1])
        assert len(source.files) == 2
        assert [entry[1] for entry in source.fingerprint] == [
            os.path.getsize(file.path) for file in source.files
        ]


def test_shards_without_an_index(tmp_path):
    save_shards(tmp_path, ".safetensors", index=False)
    with open_source(tmp_path) as source:
        check(source, SHARDS[0] | SHARDS[1])
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="'a' is in two files"):
        open_source(tmp_path)


def test_links_out_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_shards(folder, ".safetensors")
    os.replace(folder / "model-00002-of-00002.safetensors", tmp_path / "x.safetensors")
    (folder / "model-00002-of-00002.safetensors").symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="outside of the folder"):
        open_source(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a": "../model-00001-of-00002{}"}, "no file of this folder"),
        ({"a": "/etc/passwd"}, "no file of this folder"),
        ({"a": 7}, "no file of this folder"),
        ({"a": "model-00003-of-00003{}"}, "no such file"),
        ({"a": "model-00002-of-00002{}"}, "does not say that 'a' is in model-00001"),
        ({"a": None}, "no file of this folder"),
        ({"e": "model-00002-of-00002{}"}, "'e' is in model-00002-of-00002.*which lacks it"),
    ],
)
def test_bad_index(tmp_path, suffix, change, reason):
    names = save_shards(tmp_path, suffix)
    for name, file in change.items():
        names[name] = file.format(suffix) if isinstance(file, str) else file
    write_index(tmp_path, names, suffix)
    with pytest.raises(FormatError, match=reason) as error:
        open_source(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "x", "a": "x"}}', "'a' appears twice"),
    ],
)
def test_damaged_index(tmp_path, text, reason):
    save_shards(tmp_path, ".safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=reason):
        open_source(tmp_path)


def test_an_index_that_leaves_a_tensor_out(tmp_path):
    names = save_shards(tmp_path, ".safetensors")
    del names["d"]
    write_index(tmp_path, names)
    with pytest.raises(FormatError, match="does not say that 'd' is in model-00002"):
        open_source(tmp_path)


def test_several_indexes(tmp_path):
    names = save_shards(tmp_path, ".safetensors", prefix="a")
    write_index(tmp_path, names, prefix="b")
    with pytest.raises(InputError, match="several indexes"):
        open_source(tmp_path)
    write_index(tmp_path, names)  # model.safetensors.index.json
    open_source(tmp_path).close()


def test_files_are_closed_when_refused(tmp_path):
    save_shards(tmp_path, ".safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"no")
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(FormatError):
        open_source(tmp_path)
    assert len(os.listdir("/dev/fd")) == before


def test_a_name_that_the_system_refuses(tmp_path):
    for name in ("a" * 5000, "a" * 5000 + ".pt"):
        with pytest.raises(FormatError, match="cannot be read"):
            open_source(tmp_path / name)


def test_without_tensors(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="holds no tensors"):
        open_source(tmp_path)
