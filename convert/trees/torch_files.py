"""Centroids in files of PyTorch and safetensors, through the readers of ``sources``.

A .pt file may hold what a checkpoint never does, because people save centroids as they come: one
tensor, a list with one per level, or one of these in a dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hiermem.bank.dtypes import from_storage
from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown

from ..sources import Source, SourceTensor, open_source
from ..sources.tensor import SourceFile
from ..sources.torch_file import TorchArchive
from ..sources.torch_names import PickledTensor
from ..sources.zip_check import Window
from .limits import check_shape, to_float32

#: Keys of a dictionary that may hold the tensors of all levels, in place of a dictionary of them.
_AROUND = ("centroids", "levels", "tree", "state_dict", "cluster_centers", "cluster_centers_")


def read_source(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file or a DCP folder, float32.

    Raises:
        FormatError: the source is refused, or a tensor has no floats.
    """
    with open_source(path) as source:
        return _read_all(source.tensors)


def read_torch_tree(path: Path) -> dict[str, np.ndarray] | np.ndarray:
    """The tensors of a file of torch.save, float32: one, or by names (of a list: level1, ...).

    Raises:
        FormatError: the file is refused, or holds no tensors where they are looked for.
    """
    file = SourceFile.open(path)
    with Source(path, "torch", {}, [file]):
        archive = TorchArchive(Window.of(file))
        found = _tensors(archive.tree)
        if isinstance(found, PickledTensor):
            return _read(archive.tensor(path.name, found))
        if not found:
            raise FormatError(
                f"{path}: no centroids at its top; expected a tensor, a list of one per level, or "
                "a dictionary of level1, level2, ..."
            )
        return _read_all({name: archive.tensor(name, one) for name, one in found.items()})


def _tensors(tree: Any, around: bool = False) -> PickledTensor | dict[str, PickledTensor]:
    if type(tree) is PickledTensor:
        return tree
    if type(tree) in (list, tuple):
        named = {f"level{level}": value for level, value in enumerate(tree, 1)}
        return named if all(type(value) is PickledTensor for value in tree) else {}
    if type(tree) is not dict:
        return {}
    if not around:
        for key in _AROUND:
            value = tree.get(key)
            if type(value) in (dict, list, tuple) and (found := _tensors(value, around=True)):
                return found
    return {
        name: value
        for name, value in tree.items()
        if type(name) is str and type(value) is PickledTensor
    }


def _read_all(tensors: Mapping[str, SourceTensor]) -> dict[str, np.ndarray]:
    return {name: _read(tensor) for name, tensor in tensors.items() if tensor.shape}


def _read(tensor: SourceTensor) -> np.ndarray:
    where = f"{tensor.boxes[0].file.path}: {shown(tensor.name)}" if tensor.boxes else tensor.name
    check_shape(where, tensor.shape, tensor.dtype)
    if not tensor.shape:
        raise FormatError(f"{where}: is one number; expected centroids (k, width)")
    if tensor.dtype != "float64":
        return to_float32(from_storage(tensor.read(), tensor.dtype))
    # No bank is of float64, so a source cannot read it; as float32 it has twice the columns.
    boxes = [
        replace(box, start=_doubled(box.start), shape=_doubled(box.shape)) for box in tensor.boxes
    ]
    halves = SourceTensor(tensor.name, "float32", _doubled(tensor.shape), boxes)
    return to_float32(halves.read().view("<f8"))


def _doubled(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (*sizes[:-1], 2 * sizes[-1])
