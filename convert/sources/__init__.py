"""Checkpoints of PyTorch: what tensors a file or folder holds, and where, without loading any.

A checkpoint may come from a stranger: nothing in it is run, and what does not look as PyTorch or
safetensors writes it is refused with one line. Memory goes with the number of tensors and not with
their size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_hiermem.bank.files import check_name, find
from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.shapes import shown

from .dcp import read_dcp
from .dcp_metadata import METADATA
from .names import KeyMap, clean, load_key_map
from .safetensors_file import read_safetensors
from .source import Source
from .tables import read_table
from .tensor import SourceFile, SourceTensor
from .torch_file import SUFFIXES, candidates, read_torch

__all__ = ["KeyMap", "Source", "SourceTensor", "clean", "load_key_map", "open_source"]

_MAX_INDEX = 100_000_000
_SAFETENSORS = ".safetensors"
_HINTS = {
    ".distcp": "; give the folder that it lies in",
    ".pt2": "; a .pt2 archive is a program: save the state_dict of the model with torch.save",
}

_Read = Callable[[SourceFile], tuple[dict[str, SourceTensor], dict[str, Any]]]


def open_source(path: Path) -> Source:
    """Find the tensors of a checkpoint.

    Args:
        path: a file of torch.save (.pt, .pth, .bin, .ckpt) or of safetensors, or a folder: of
            torch.distributed.checkpoint, of safetensors files or .bin files (all that the index
            names, if there is one), or with one file of torch.save.

    Returns:
        an open Source, to be closed by the caller. Names are without the prefixes of wrappers.

    Raises:
        FormatError: it is missing, damaged, unsafe or of another format.
        InputError: the folder has several checkpoints.
    """
    path = Path(path)
    opened = _Opened(path)
    try:
        kind, tensors, extras = _read(path, opened)
        if not tensors:
            raise FormatError(f"{path}: holds no tensors")
        names = _clean(path, tensors)
        by_name = {}
        for name in list(tensors):
            tensor = tensors.pop(name)
            new = names[name]
            if new != name:
                tensor = SourceTensor(new, tensor.dtype, tensor.shape, tensor.boxes)
            by_name[new] = tensor
        return Source(path, kind, by_name, tuple(opened.files.values()), extras)
    except OSError as error:
        opened.close()
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    except BaseException:
        opened.close()
        raise


def _clean(path: Path, names: Iterable[str]) -> dict[str, str]:
    try:
        return clean(names)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


class _Opened:
    """The files of one folder that are open, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, SourceFile] = {}

    def __call__(self, name: str) -> SourceFile:
        if name not in self.files:
            find(self.folder, name)  # no link out of the folder
            self.files[name] = SourceFile.open(self.folder / name)
        return self.files[name]

    def close(self) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):
                os.close(file.fd)


def _read(path: Path, opened: _Opened) -> tuple[str, dict[str, SourceTensor], Mapping[str, Any]]:
    """(format, tensors by the names in the files, plain values)."""
    if not path.is_dir():
        opened.files[path.name] = file = SourceFile.open(path)
        if path.suffix == _SAFETENSORS:
            return "safetensors", *read_safetensors(file)
        if path.suffix in SUFFIXES:
            return "torch", *read_torch(file)
        raise FormatError(
            f"{path}: expected a file that ends with {', '.join((_SAFETENSORS, *SUFFIXES))}, or a "
            f"folder of them{_HINTS.get(path.suffix, '')}"
        )
    if (path / METADATA).exists():
        opened(METADATA)  # it says where the tensors lie, so it is part of the fingerprint
        return "dcp", read_dcp(path, opened), {}
    names = sorted(one.name for one in path.iterdir() if not one.name.startswith("."))
    if any(name.endswith(".distcp") for name in names):
        raise FormatError(
            f"{path}: has .distcp files but no {METADATA}: it was not saved to the end, or not all "
            "of it was copied"
        )
    shards = [name for name in names if name.endswith(_SAFETENSORS)]
    if shards:
        return "safetensors", *_read_shards(opened, shards, names, _SAFETENSORS, read_safetensors)
    for suffix in SUFFIXES:
        if any(name.endswith(f"{suffix}.index.json") for name in names):
            return "torch", *_read_shards(opened, [], names, suffix, read_torch)
    found = candidates(path)
    if not found:
        raise FormatError(
            f"{path}: no checkpoint in it; expected {METADATA}, or files that end with "
            f"{', '.join((_SAFETENSORS, *SUFFIXES))}"
        )
    if len(found) > 1:
        raise InputError(f"{path}: which one? give one of {shown(', '.join(found))} by its path")
    return "torch", *read_torch(opened(found[0]))


def _read_shards(
    opened: _Opened, shards: list[str], names: list[str], suffix: str, read: _Read
) -> tuple[dict[str, SourceTensor], dict[str, Any]]:
    """All tensors of the files that the index names; without an index, of ``shards``."""
    indexes = [name for name in names if name.endswith(f"{suffix}.index.json")]
    if f"model{suffix}.index.json" in indexes:
        indexes = [f"model{suffix}.index.json"]
    if len(indexes) > 1:
        raise InputError(
            f"{opened.folder}: has several indexes, {shown(', '.join(indexes))}; leave one"
        )
    listed = None
    if indexes:
        where = opened.folder / indexes[0]
        listed = _read_index(where)
        shards = list(dict.fromkeys(listed.values()))
    tensors: dict[str, SourceTensor] = {}
    extras: dict[str, Any] = {}
    for shard in shards:
        held, said = read(opened(shard))
        for name in held:
            if name in tensors:
                raise FormatError(
                    f"{opened.folder}: {shown(name)} is in two files, "
                    f"{tensors[name].boxes[0].file.path.name} and {shard}"
                )
            if listed is not None and listed.pop(name, None) != shard:
                raise FormatError(f"{where}: does not say that {shown(name)} is in {shard}")
        tensors.update(held)
        extras.update(said)
    if listed:
        name, shard = next(iter(listed.items()))
        raise FormatError(f"{where}: says that {shown(name)} is in {shard}, which lacks it")
    return tensors, extras


def _read_index(path: Path) -> dict[str, str]:
    """{tensor: file} of an index as Hugging Face writes it."""
    table = read_table(path, _MAX_INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FormatError(f"{path}: has no weight_map of names to files")
    for shard in table.values():
        if not isinstance(shard, str) or not check_name(shard):
            raise FormatError(f"{path}: names {shown(shard)}, which is no file of this folder")
    return table
