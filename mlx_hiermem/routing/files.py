"""The safetensors files of this room: float32 tensors, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import FormatError, one_line
from ..files import write_safetensors


def write_tensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write float32 tensors to ``path``: under a temporary name, fsynced, then renamed.

    A crash at any moment leaves the old file or the new one, never a part of one.
    """
    arrays = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    write_safetensors(Path(path), arrays, {"format": "mlx", **(metadata or {})})


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the float32 tensors and the metadata of ``path``.

    Raises:
        FormatError: the file is missing or damaged, or a tensor is not float32 or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file; expected a safetensors file")
    tensors = {}
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if dtype != "F32":
                    raise FormatError(f"{path}: tensor {name} has dtype {dtype}; expected F32")
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        reason = one_line(error, 120)
        raise FormatError(f"{path}: not a readable safetensors file ({reason})") from None
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise FormatError(
                f"{path}: tensor {name} holds a value that is not finite; get the file again"
            )
    return tensors, metadata
