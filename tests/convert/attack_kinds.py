"""Files that are not of torch.save, or of tensors that are not rows of numbers."""

from __future__ import annotations

import io
import pickle
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .attack_zips import HONEST, made
from .attacks import Maker


def _saved(make: Callable[[Any], Any], **options: Any) -> Maker:
    """What torch.save makes of ``make(torch)``."""

    def write(path: Path, canary: Path) -> None:
        import torch

        with warnings.catch_warnings():  # that a kind of tensor is in beta
            warnings.simplefilter("ignore")
            torch.save(make(torch), path, **options)

    return write


def _tar(path: Path, canary: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(name, 2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def _script(path: Path, canary: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def _nested(torch: Any) -> Any:
    return {"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}


def _masked(torch: Any) -> Any:
    return {"w": torch.masked.masked_tensor(torch.ones(2), torch.ones(2).bool())}


#: Files that are no archives of torch.save: name -> (maker, reason).
KINDS: dict[str, tuple[Maker, str]] = {
    "legacy": (
        _saved(lambda t: {"w": t.ones(2)}, _use_new_zipfile_serialization=False),
        "torch.save before 1.6",
    ),
    "plain pickle": (
        lambda path, canary: path.write_bytes(pickle.dumps({"w": 1}, 4)) and None,
        "a pickle",
    ),
    "text pickle": (
        lambda path, canary: path.write_bytes(b"cos\nsystem\n(S'touch it'\ntR.") and None,
        "not a file of torch.save",
    ),
    "tar": (_tar, "tar"),
    "script": (_script, "TorchScript"),
    "script by its code alone": (made({**HONEST, "x/code/a.py": b""}), "TorchScript"),
    "script by its constants alone": (made({**HONEST, "x/constants.pkl": b""}), "TorchScript"),
    "export by its format alone": (made({**HONEST, "x/archive_format": b"pt2"}), ".pt2 archive"),
    "archive without a pickle": (made({"x/version": b"3"}), "found 0 of these"),
    "export": (
        made({"x/archive_format": b"pt2", "x/models/model.json": b"{}", "x/data.pkl": b""}),
        ".pt2 archive",
    ),
    "export of AOTInductor": (made({**HONEST, "x/data/aotinductor/a": b""}), ".pt2 archive"),
    "arrays of NumPy": (made({"a.npy": b""}), "but not of torch.save"),
    "empty": (lambda path, canary: path.touch(), "not a file of torch.save"),
    "empty zip": (made({}), "empty zip"),
    "compressed file": (
        lambda path, canary: path.write_bytes(b"\x1f\x8b" + bytes(40)) and None,
        "gzip",
    ),
    "sparse": (_saved(lambda t: {"w": t.eye(3).to_sparse()}), "sparse tensor.*to_dense"),
    "sparse rows": (_saved(lambda t: {"w": t.eye(3).to_sparse_csr()}), "sparse tensor"),
    "quantized": (
        _saved(lambda t: {"w": t.quantize_per_tensor(t.ones(2), 1.0, 0, t.qint8)}),
        "quantized tensor.*dequantize",
    ),
    "nested": (_saved(_nested), "nested tensor"),
    "subclass": (_saved(lambda t: {"w": t.ones(2).as_subclass(t.nn.Buffer)}), "Buffer'"),
    "wrapper": (_saved(_masked), "_rebuild_wrapper_subclass'"),
    "meta": (_saved(lambda t: {"w": t.ones(2, device="meta")}), "no numbers"),
    "model": (_saved(lambda t: t.nn.Linear(2, 2)), "Linear'"),
    "one tensor": (_saved(lambda t: t.ones(2)), "tensor without a name"),
    "list": (_saved(lambda t: [t.ones(2)]), "but a list"),
}
