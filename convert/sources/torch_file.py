"""Files of torch.save: where the numbers of each tensor lie, found without PyTorch.

Nothing is loaded and nothing of the file is run; see ``pickles`` and ``zip_check``. The numbers
are then read out of the file as they are: its records are not compressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown

from .pickles import MAX_PICKLE, Refused, read_pickle
from .tensor import Box, SourceFile, SourceTensor
from .torch_names import NAMES, PickledTensor, advice, persistent
from .zip_check import Window, read_directory, read_records

#: Where a checkpoint has its weights, if not at the top.
STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")

#: Endings of the names of such files.
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Files that trainers (OpenLM, transformers) write beside the weights.
_BESIDE = ("optimizer_", "stats_", "optimizer.", "scheduler.", "training_args.", "rng_state")

# What each old or other kind of file starts with (at an offset), and what it is.
_KINDS = (
    (0, b"PK\3\4", ""),
    (0, b"\x80", "a pickle, or a file of torch.save before 1.6"),
    (257, b"ustar", "a file of torch.save before 0.2 (tar)"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x1f\x8b", "compressed with gzip"),
    (0, b"PK\5\6", "an empty zip archive"),
)
# Records, without the folder that holds all, of other archives of PyTorch.
_EXPORT = ("archive_format", "serialized_exported_program.json")
_EXPORT_FOLDERS = ("data/aotinductor/", "data/weights/", "models/")


class TorchArchive:
    """An archive of torch.save: ``tree`` is what was saved, with a PickledTensor for each tensor.

    Raises (when made):
        FormatError: it is another kind of file, is damaged, or names what no checkpoint needs.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        _check_kind(window)
        directory = read_directory(window)
        top = _top(window, [entry.name for entry in directory.entries])
        records = read_records(window, directory)
        prefix = f"{top}/data/"
        self._storages = {
            name[len(prefix) :]: place for name, place in records.items() if name.startswith(prefix)
        }
        offset, size = records[f"{top}/data.pkl"]
        if size > MAX_PICKLE:
            raise FormatError(f"{window.where}: refused: its data.pkl has {size} bytes")
        if (order := records.get(f"{top}/byteorder")) is not None:
            if window.read(order[0], min(order[1], 7)) != b"little":
                raise FormatError(
                    f"{window.where}: refused: its numbers are not little-endian; save it again "
                    "on a machine that is"
                )
        try:
            self.tree = read_pickle(window.read(offset, size), NAMES, advice, persistent)
        except Refused as error:
            raise FormatError(f"{window.where}: refused: {error}") from None

    def locate(self, name: str, tensor: PickledTensor) -> int:
        """Where the first number of a tensor lies in the window, in bytes.

        Raises:
            FormatError: it does not lie in its record, has gaps, or its record is missing.
        """
        storage = tensor.storage
        place = self._storages.get(storage.key)
        if place is None:
            raise self._wrong(name, f"has no record data/{shown(storage.key)}; the file is damaged")
        offset, size = place
        if size != storage.nbytes:
            raise self._wrong(
                name, f"its record has {size} bytes, expected {shown(storage.nbytes)}"
            )
        try:
            return offset + tensor.start()
        except Refused as error:
            raise self._wrong(name, str(error)) from None

    def _wrong(self, name: str, found: str) -> FormatError:
        return FormatError(f"{self.window.where}: refused: {shown(name)} {found}")

    def tensor(self, name: str, tensor: PickledTensor) -> SourceTensor:
        """The same as a SourceTensor; see ``locate``."""
        offset = self.window.start + self.locate(name, tensor)
        box = Box(self.window.file, offset, (0,) * len(tensor.shape), tensor.shape)
        return SourceTensor(name, tensor.dtype, tensor.shape, (box,))


def _check_kind(window: Window) -> None:
    for at, start, kind in _KINDS:
        if window.size >= at + len(start) and window.read(at, len(start)) == start:
            if not kind:
                return
            break
    else:
        kind = "not a file of torch.save"
    raise FormatError(
        f"{window.where}: refused: it is {kind}; save it again with torch.save of a newer PyTorch, "
        "or as safetensors"
    )


def _top(window: Window, names: Sequence[str]) -> str:
    """The one folder in the archive that holds all."""
    inner = {name.partition("/")[2] for name in names} | set(names)
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise FormatError(
            f"{window.where}: refused: it is a TorchScript archive, which is a program; save the "
            "state_dict of the model with torch.save"
        )
    if any(name in inner for name in _EXPORT) or any(
        name.startswith(_EXPORT_FOLDERS) for name in inner
    ):
        raise FormatError(
            f"{window.where}: refused: it is a .pt2 archive of torch.export, which is a program; "
            "save the state_dict of the model with torch.save"
        )
    tops = {name.partition("/")[0] for name in names if "/" in name}
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(tops) != 1 or len(pickles) != 1 or not all("/" in name for name in names):
        raise FormatError(
            f"{window.where}: refused: it is a zip archive, but not of torch.save: expected all "
            f"its records in one folder, with one data.pkl; found {len(pickles)} of these"
        )
    return tops.pop()


def state_dict(where: str, tree: Any) -> tuple[dict[str, PickledTensor], dict[str, Any]]:
    """The tensors of a checkpoint by their names, and the plain values beside them.

    Args:
        where: for messages.
        tree: what was saved: names -> tensors, or that under one of ``STATE_DICTS``.

    Raises:
        FormatError: there are none.
    """
    if type(tree) is not dict:
        raise FormatError(f"{where}: refused: it holds no state dict, but a {_kind(tree)}")
    found: dict[str, PickledTensor] = {}
    for key in (*STATE_DICTS, None):
        table = tree if key is None else tree.get(key)
        if type(table) is dict:
            found = {
                name: value
                for name, value in table.items()
                if type(value) is PickledTensor and type(name) is str
            }
        if found:
            break
    else:
        keys = ", ".join(shown(key) for key in list(tree)[:8] if type(key) in (str, int))
        raise FormatError(
            f"{where}: no tensors by name at the top, nor under {', '.join(STATE_DICTS)}; its keys "
            f"are {keys or 'none'}"
        )
    extras = {
        key: value
        for key, value in tree.items()
        if type(key) is str and type(value) in (str, int, float, bool)
    }
    return found, extras


def _kind(tree: Any) -> str:
    return "tensor without a name" if type(tree) is PickledTensor else type(tree).__name__


def read_torch(file: SourceFile) -> tuple[dict[str, SourceTensor], dict[str, Any]]:
    """The tensors of a file of torch.save by the names in it, and its plain values.

    Raises:
        FormatError: it is refused.
    """
    archive = TorchArchive(Window.of(file))
    found, extras = state_dict(archive.window.where, archive.tree)
    return {name: archive.tensor(name, tensor) for name, tensor in found.items()}, extras


def candidates(folder: Path) -> list[str]:
    """Names of the files in ``folder`` that may be the checkpoint, without those beside one."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in SUFFIXES and not path.name.startswith((".", *_BESIDE)) and path.is_file()
    )
