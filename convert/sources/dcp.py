"""Folders of torch.distributed.checkpoint (DCP), read chunk by chunk without PyTorch.

``.metadata`` says which bytes of which file hold which part of a tensor; in there lies a whole
archive of torch.save with that part, whose own header is read the same way as that of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_hiermem.bank.files import check_name
from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown

from .dcp_metadata import METADATA, Chunk, ChunkedTensor, read_metadata
from .tensor import Box, SourceFile, SourceTensor
from .torch_file import STATE_DICTS, TorchArchive
from .torch_names import PickledTensor
from .zip_check import Window

# What trainers save beside the weights.
_BESIDE = ("optim", "optimizer", "optimizers", "optimizer_state_dict")


def read_dcp(folder: Path, open_file: Callable[[str], SourceFile]) -> dict[str, SourceTensor]:
    """The weights of a DCP folder by the names in it.

    Args:
        open_file: opens a file of the folder by its name; asked for the same one more than once.

    Raises:
        FormatError: it is refused.
    """
    found = _weights(read_metadata(folder))
    if not found:
        raise FormatError(f"{folder}: there are no tensors in it that are not an optimizer's")
    return {
        name: SourceTensor(
            name,
            tensor.dtype,
            tensor.shape,
            [_box(folder, tensor, chunk, open_file) for chunk in tensor.chunks],
        )
        for name, tensor in found.items()
    }


def _weights(tensors: Sequence[ChunkedTensor]) -> dict[str, ChunkedTensor]:
    """Those of the model, by their names in its state dict."""
    tensors = [
        one
        for one in tensors
        if not any(key.partition(".")[0] in _BESIDE for key in _below_app(one.path)[:1])
    ]
    for prefix in _prefixes():
        below = {
            ".".join(one.path[len(prefix) :]): one
            for one in tensors
            if one.path[: len(prefix)] == prefix and len(one.path) > len(prefix)
        }
        if below:
            return below
    # Saved without the keys of the nested dictionaries: only what all names begin with is theirs.
    for begin in (".".join(prefix) + "." for prefix in _prefixes()):
        if tensors and all(one.name.startswith(begin) for one in tensors):
            return {one.name[len(begin) :]: one for one in tensors}
    return {one.name: one for one in tensors}


def _prefixes() -> list[tuple[str, ...]]:
    # "app": of torch.distributed.checkpoint's own recipes.
    return [(*app, key) for app in (("app",), ()) for key in STATE_DICTS]


def _below_app(path: tuple[str, ...]) -> tuple[str, ...]:
    if path[0] == "app":
        return path[1:]
    return (path[0].removeprefix("app."), *path[1:])


def _box(
    folder: Path,
    tensor: ChunkedTensor,
    chunk: Chunk,
    open_file: Callable[[str], SourceFile],
) -> Box:
    where = f"{folder / METADATA}: refused: {shown(tensor.name)}"
    if not check_name(chunk.file):
        raise FormatError(f"{where} lies in {shown(chunk.file)}, which is no file of this folder")
    file = open_file(chunk.file)
    if chunk.offset + chunk.length > file.size:
        raise FormatError(
            f"{file.path}: truncated: {file.size} bytes, {shown(tensor.name)} ends at "
            f"{chunk.offset + chunk.length}; copy or download it again"
        )
    archive = TorchArchive(Window(file, chunk.offset, chunk.length))
    part = archive.tree
    is_tensor = type(part) is PickledTensor
    if not is_tensor or (part.dtype, part.shape) != (tensor.dtype, chunk.shape):
        found = f"{part.dtype} of shape {part.shape}" if is_tensor else "no tensor"
        raise FormatError(
            f"{archive.window.where}: refused: holds {shown(found)}, expected {tensor.dtype} of "
            f"shape {shown(chunk.shape)} of {shown(tensor.name)}"
        )
    offset = archive.window.start + archive.locate(tensor.name, part)
    return Box(file, offset, chunk.start, chunk.shape)
