"""The ``.metadata`` of torch.distributed.checkpoint (DCP): which part of a tensor lies where.

It is a plain pickle of dataclasses, written by PyTorch 2.1 to 2.13; each class has a stand-in of
ours here, so that nothing of it is run (see ``pickles``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hiermem.bank.files import read_bytes
from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown

from .dtypes import ITEMSIZE
from .pickles import MAX_PICKLE, Built, Ignored, Name, Refused, read_pickle
from .torch_names import CONSTANTS, size, table

#: Name of the file.
METADATA = ".metadata"
# Far more than processes that train one model; each pair of chunks is compared.
_MOST_CHUNKS = 8192


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: its place in the tensor, and ``length`` bytes of a file that hold it."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor of a DCP folder. ``path``: its name, as keys of nested dictionaries if known."""

    name: str
    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    chunks: Sequence[Chunk]


class _Record(Built):
    """Stands for a dataclass: keeps its fields."""

    fields: Mapping[str, Any]

    def __init__(self) -> None:
        self.fields = {}

    def take(self, state: Any) -> None:
        if type(state) is not dict:
            raise Refused("its pickle has an object without fields")
        self.fields = state

    def get(self, name: str, kind: type) -> Any:
        value = self.fields.get(name)
        if type(value) is not kind:
            raise Refused(f"its pickle lacks {name} where one belongs")
        return value


class _Metadata(_Record):
    pass


class _Tensor(_Record):
    pass


class _Chunk(_Record):
    pass


class _Place(_Record):
    pass


class _Properties(Built):
    """TensorProperties: its state is a tuple that begins with the dtype."""

    dtype = ""

    def take(self, state: Any) -> None:
        first = state[0] if type(state) is tuple and state else None
        if type(state) is dict:
            first = state.get("dtype")
        if type(first) is not Name:
            raise Refused("its pickle has a tensor without a dtype")
        self.dtype = first.text.removeprefix("torch.")


class _Index(Built):
    """MetadataIndex, the key of the table of places: the same for the same name and offset."""

    key: tuple[str, tuple[int, ...] | None] = ("", None)

    def take(self, state: Any) -> None:
        name = state.get("fqn") if type(state) is dict else None
        offset = state.get("offset") if type(state) is dict else None
        if type(name) is not str or offset is not None and type(offset) is not tuple:
            raise Refused("its pickle has an index without a name")
        self.key = (name, None if offset is None else size(offset))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return type(other) is _Index and other.key == self.key


def _member(kind: Any, name: Any) -> Ignored:
    """Stands for ``getattr``, by which early Pythons 3.11 write the member of an enumeration."""
    if type(kind) is not Name or kind.text not in _ENUMERATIONS or type(name) is not str:
        raise Refused("its pickle names 'builtins.getattr', which is refused")
    return Ignored()


_DCP = "torch.distributed.checkpoint"
_SHARD = "torch.distributed._shard.sharded_tensor.metadata"  # of PyTorch before 2.3
_ENUMERATIONS = (f"{_DCP}.metadata._MEM_FORMAT_ENCODING", f"{_SHARD}.MEM_FORMAT_ENCODING")
_CALLS: dict[str, Callable[..., Any]] = {
    f"{_DCP}.metadata.Metadata": _Metadata,
    f"{_DCP}.metadata.TensorStorageMetadata": _Tensor,
    f"{_DCP}.metadata.BytesStorageMetadata": Ignored,
    f"{_DCP}.metadata.ChunkStorageMetadata": _Chunk,
    f"{_DCP}.metadata.MetadataIndex": _Index,
    f"{_DCP}.metadata.StorageMeta": Ignored,
    f"{_DCP}.metadata.TensorProperties": _Properties,
    f"{_SHARD}.TensorProperties": _Properties,
    **dict.fromkeys(_ENUMERATIONS, Ignored),
    "builtins.getattr": _member,
    "__builtin__.getattr": _member,
    f"{_DCP}.filesystem._StorageInfo": _Place,
    "torch.Size": size,
    "torch.serialization._get_layout": Ignored,
    "collections.OrderedDict": table,
    # The folder that it was saved to.
    **{
        f"{module}.{kind}": Ignored
        for module in ("pathlib", "pathlib._local")
        for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}
_NAMES = {text: Name(text, call) for text, call in {**CONSTANTS, **_CALLS}.items()}


def read_metadata(folder: Path) -> list[ChunkedTensor]:
    """The tensors of a DCP folder and their chunks, which cover each without overlap.

    Raises:
        FormatError: its ``.metadata`` names other classes, is damaged, or contradicts itself.
    """
    where = folder / METADATA
    data = read_bytes(folder, METADATA, MAX_PICKLE)
    try:
        return _tensors(read_pickle(data, _NAMES, _advice))
    except Refused as error:
        raise FormatError(f"{where}: refused: {error}") from None


def _advice(_: str) -> str:
    return "; if you trust the file, load it with torch and save it as safetensors"


def _tensors(top: Any) -> list[ChunkedTensor]:
    if type(top) is not _Metadata:
        raise Refused("it is no metadata of torch.distributed.checkpoint")
    entries, places = top.get("state_dict_metadata", dict), top.get("storage_data", dict)
    paths = top.fields.get("planner_data")
    found = []
    for name, entry in entries.items():
        if type(entry) is not _Tensor:
            continue
        if type(name) is not str:
            raise Refused("it has a tensor without a name")
        path = _path(name, paths.get(name) if type(paths) is dict else None)
        try:
            found.append(_tensor(name, path, entry, places))
        except Refused as error:
            raise Refused(f"{shown(name)}: {error}") from None
    return found


def _path(name: str, keys: Any) -> tuple[str, ...]:
    """The keys of the nested dictionaries that ``name`` was joined from, if they are known."""
    if type(keys) is tuple and all(type(key) in (str, int) for key in keys):
        path = tuple(map(str, keys))
        if path and ".".join(path) == name:
            return path
    return (name,)


def _tensor(name: str, path: tuple[str, ...], entry: _Tensor, places: Any) -> ChunkedTensor:
    shape = entry.get("size", tuple)
    dtype = entry.get("properties", _Properties).dtype
    if dtype not in ITEMSIZE:
        raise Refused(f"is of the unknown dtype {shown(dtype)}")
    parts = entry.get("chunks", list)
    if len(parts) > _MOST_CHUNKS:
        raise Refused(f"has {len(parts)} chunks, at most {_MOST_CHUNKS}")
    chunks = []
    for part in parts:
        if type(part) is not _Chunk:
            raise Refused("has a chunk that is none")
        start, extent = size(part.get("offsets", tuple)), size(part.get("sizes", tuple))
        index = _Index()
        index.key = (name, start)
        place = places.get(index)
        if type(place) is not _Place:
            raise Refused(f"has no place for its chunk at {shown(start)}")
        chunks.append(Chunk(start, extent, *_read_place(place)))
    chunks = [c for c in chunks if math.prod(c.shape)] or chunks[:1]
    _check_cover(size(shape), chunks)
    return ChunkedTensor(name, path, dtype, shape, chunks)


def _read_place(place: _Place) -> tuple[str, int, int]:
    if place.fields.get("transform_descriptors"):
        raise Refused("is compressed or encrypted; save it without transforms")
    offset, length = place.get("offset", int), place.get("length", int)
    if not 0 <= offset < 2**60 or not 0 <= length < 2**60:
        raise Refused("has a place before the start of its file, or nowhere")
    return place.get("relative_path", str), offset, length


def _check_cover(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> None:
    """Whether the chunks are the whole tensor, and each number is in one."""
    if not chunks:
        raise Refused("has no chunks")
    for chunk in chunks:
        if not len(chunk.start) == len(chunk.shape) == len(shape) or any(
            at + extent > whole
            for at, extent, whole in zip(chunk.start, chunk.shape, shape, strict=True)
        ):
            raise Refused(
                f"its chunk of {shown(chunk.shape)} at {shown(chunk.start)} is not within "
                f"{shown(shape)}"
            )
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise Refused(f"its chunks do not cover it (shape {shown(shape)}), or overlap")
    # The sum is right: what is left to find is an overlap that a gap makes up for.
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    ends = starts + np.array([chunk.shape for chunk in chunks], np.int64)
    for number in range(len(chunks) - 1):
        meets = (starts[number] < ends[number + 1 :]) & (starts[number + 1 :] < ends[number])
        if meets.all(axis=1).any():
            raise Refused("its chunks overlap")
