"""Folders of torch.distributed.checkpoint whose .metadata has been tampered with."""

from __future__ import annotations

import builtins
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from .attacks import Call, touch


def save_dcp(folder: Path, state: dict[str, Any], **options: Any) -> None:
    """Save ``state`` from this process alone."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(folder, sync_files=False, **options)
    with warnings.catch_warnings():  # that it saves from one process alone
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=writer, no_dist=True)


def _edited(edit: Callable[[Any, Path, Path], Any]) -> Callable[[Path, Path, Path], None]:
    """A copy of an honest folder after ``edit(metadata, folder, canary)``."""

    def make(honest: Path, folder: Path, canary: Path) -> None:
        shutil.copytree(honest, folder)
        path = folder / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        changed = edit(metadata, folder, canary)
        path.write_bytes(pickle.dumps(metadata if changed is None else changed))

    return make


def _raw(data: Callable[[bytes], bytes]) -> Callable[[Path, Path, Path], None]:
    def make(honest: Path, folder: Path, canary: Path) -> None:
        shutil.copytree(honest, folder)
        path = folder / ".metadata"
        path.write_bytes(data(path.read_bytes()))

    return make


def _place(metadata: Any) -> Any:
    """Where the one chunk of "w" is."""
    return next(info for index, info in metadata.storage_data.items() if index.fqn == "model.w")


def _entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata["model.w"]


def _set(**fields: Any) -> Callable[[Path, Path, Path], None]:
    def edit(metadata: Any, folder: Path, canary: Path) -> None:
        for name, value in fields.items():
            setattr(_place(metadata), name, value)

    return _edited(edit)


def _chunks(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[[Path, Path, Path], None]:
    """Other chunks for "w", each with a place."""

    def edit(metadata: Any, folder: Path, canary: Path) -> None:
        import torch
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

        place = _place(metadata)
        chunks = []
        for start, shape in boxes:
            chunks.append(ChunkStorageMetadata(tuple(start), tuple(shape)))
            metadata.storage_data[MetadataIndex("model.w", torch.Size(()))] = place
            index = MetadataIndex("model.w")
            object.__setattr__(index, "offset", tuple(start))
            metadata.storage_data[index] = place
        _entry(metadata).chunks = chunks

    return _edited(edit)


def _poison(value: Callable[[Path], Any], where: str) -> Callable[[Path, Path, Path], None]:
    return _edited(lambda metadata, folder, canary: setattr(metadata, where, value(canary)))


def _link(metadata: Any, folder: Path, canary: Path) -> None:
    outside = folder.parent / "outside.distcp"
    os.replace(folder / "__0_0.distcp", outside)
    (folder / "__0_0.distcp").symlink_to(outside)


def _truncate(metadata: Any, folder: Path, canary: Path) -> None:
    os.truncate(folder / "__0_0.distcp", 900)


def _no_place(metadata: Any, folder: Path, canary: Path) -> None:
    metadata.storage_data = {}


def _dtype(metadata: Any, folder: Path, canary: Path) -> None:
    import torch

    _entry(metadata).properties.dtype = torch.float16


def _other_chunk(metadata: Any, folder: Path, canary: Path) -> None:
    other = next(i for index, i in metadata.storage_data.items() if index.fqn == "model.b")
    place = _place(metadata)
    place.offset, place.length = other.offset, other.length


def _poisoned_chunk(metadata: Any, folder: Path, canary: Path) -> None:
    """The chunk itself is a poisoned archive of torch.save."""
    from .attacks import CODE

    path = folder / "__9_9.distcp"
    CODE["os.system"][0](path, canary)
    place = _place(metadata)
    place.relative_path, place.offset, place.length = path.name, 0, path.stat().st_size


def _wrong_chunk(metadata: Any, folder: Path, canary: Path) -> None:
    """The chunk itself is an archive of something else."""
    from .attacks import honest

    (folder / "__9_9.distcp").write_bytes(honest())
    place = _place(metadata)
    place.relative_path, place.offset, place.length = "__9_9.distcp", 0, len(honest())


def _strange_dtype(metadata: Any, folder: Path, canary: Path) -> None:
    import torch

    _entry(metadata).properties.dtype = torch.Tensor


def _no_dtype(metadata: Any, folder: Path, canary: Path) -> None:
    _entry(metadata).properties.dtype = 7


def _number_for_a_name(metadata: Any, folder: Path, canary: Path) -> None:
    metadata.state_dict_metadata[7] = _entry(metadata)


def _no_chunk(metadata: Any, folder: Path, canary: Path) -> None:
    _entry(metadata).chunks = [7]


def _index(**fields: Any) -> Callable[[Path, Path, Path], None]:
    """Fields of the index of "w"."""

    def edit(metadata: Any, folder: Path, canary: Path) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == "model.w")
        for name, value in fields.items():
            object.__setattr__(index, name, value)

    return _edited(edit)


def _object(metadata: Any, folder: Path, canary: Path) -> Any:
    import torch

    return torch.nn.Linear(2, 2)


def _size(metadata: Any, folder: Path, canary: Path) -> None:
    _entry(metadata).size = (-4, -6)


#: name -> (maker(honest folder, folder to make, canary), reason)
DCP: dict[str, tuple[Callable[[Path, Path, Path], None], str]] = {
    "os.system": (_poison(lambda c: Call(os.system, touch(c)), "planner_data"), "posix.system"),
    "eval": (
        _poison(lambda c: Call(eval, f"open({str(c)!r}, 'w')"), "storage_meta"),
        "builtins.eval",
    ),
    "getattr": (
        _poison(lambda c: Call(getattr, Call(builtins.__import__, "os"), "system"), "storage_data"),
        "builtins.__import__",  # getattr itself is known: of an enumeration
    ),
    "getattr of a class": (
        _poison(lambda c: Call(getattr, Metadata, "__init__"), "storage_data"),
        "builtins.getattr",
    ),
    "class of PyTorch": (_edited(_object), "torch.nn.modules.linear.Linear"),
    "no metadata": (_raw(lambda data: pickle.dumps({"a": 1})), "no metadata of"),
    "fields of another class": (
        _poison(lambda c: [1, 2], "state_dict_metadata"),
        "lacks state_dict_metadata",
    ),
    "memo index": (_raw(lambda data: b"\x80\x02}r\xff\xff\xff\x7f."), "no metadata of"),
    "deep key": (
        _raw(lambda data: b"\x80\x04})" + b"\x85" * 2_000_000 + b"Ns."),
        "no metadata of",
    ),
    "truncated metadata": (_raw(lambda data: data[: len(data) // 2]), "damaged"),
    "empty metadata": (_raw(lambda data: b""), "damaged"),
    "path that goes up": (_set(relative_path="../outside.distcp"), "no file of this folder"),
    "absolute path": (_set(relative_path="/etc/passwd"), "no file of this folder"),
    "path that is a link": (_edited(_link), "outside of the folder"),
    "path of no file": (_set(relative_path="__7_7.distcp"), "no such file"),
    "path that is no text": (_set(relative_path=7), "lacks relative_path"),
    "offset beyond the file": (_set(offset=10**9), "ends at"),
    "length beyond the file": (_set(length=10**9), "ends at"),
    "huge offset": (_set(offset=2**70), "nowhere"),
    "negative offset": (_set(offset=-1), "before the start"),
    "negative length": (_set(length=-5), "before the start"),
    "range that cuts": (_set(length=700), "refused"),
    "truncated file": (_edited(_truncate), "truncated"),
    "compressed": (_set(transform_descriptors=["zstd"]), "compressed"),
    "no places": (_edited(_no_place), "no place for its chunk"),
    "overlap and gap": (
        _chunks(((0, 0), (2, 6)), ((1, 0), (2, 6))),
        "chunks overlap",
    ),
    "overlap": (_chunks(((0, 0), (4, 6)), ((3, 0), (1, 6))), "do not cover it"),
    "gap": (_chunks(((0, 0), (3, 6))), "do not cover it"),
    "chunk beyond the tensor": (_chunks(((2, 0), (4, 6))), "is not within"),
    "chunk of other axes": (_chunks(((0,), (4,))), "is not within"),
    "chunk that is none": (_edited(_no_chunk), "has a chunk that is none"),
    "chunk of no tensor": (_edited(_wrong_chunk), "holds 'no tensor'"),
    "index without a name": (_index(fqn=7), "an index without a name"),
    "index at a text": (_index(offset="here"), "an index without a name"),
    "index at no place": (_index(offset=(-1, 0)), "no size"),
    "number for a name": (_edited(_number_for_a_name), "a tensor without a name"),
    "unknown dtype": (_edited(_strange_dtype), "unknown dtype 'Tensor'"),
    "no dtype": (_edited(_no_dtype), "a tensor without a dtype"),
    "state that is none": (
        _raw(lambda data: b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81K\1b."),
        "an object without fields",
    ),
    "reference to elsewhere": (_raw(lambda data: b"\x80\x02NQ."), "outside of the file"),
    "negative chunk": (_chunks(((0, 0), (-4, -6))), "no size"),
    "no chunks": (_chunks(), "has no chunks"),
    "too many chunks": (_chunks(*[((0, 0), (4, 6))] * 9000), "9000 chunks"),
    "negative shape": (_edited(_size), "no size"),
    "other dtype": (_edited(_dtype), "expected float16"),
    "chunk of another tensor": (_edited(_other_chunk), "expected float32 of shape"),
    "poisoned chunk": (_edited(_poisoned_chunk), "posix.system"),
}
