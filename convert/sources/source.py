"""Source: the tensors of a checkpoint, whatever it is made of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tensor import SourceFile, SourceTensor


@dataclass(frozen=True)
class Source:
    """The tensors of a checkpoint: a file, or a folder of files. A context manager.

    Attributes:
        path: what was opened.
        format: "torch", "safetensors" or "dcp".
        tensors: by their clean names, in the order of the files.
        files: all that are open.
        extras: what else it says: metadata of a safetensors header, plain values beside the state
            dict of a .pt file (such as ``epoch``). Strings, numbers and booleans only.
    """

    path: Path
    format: str
    tensors: Mapping[str, SourceTensor]
    files: Sequence[SourceFile]
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> list[list[Any]]:
        """[path, size, modified] of each file: whether it is still the same source."""
        return [[str(one.path.resolve()), one.size, one.modified] for one in self.files]

    def close(self) -> None:
        """Close the files; tensors cannot be read any more."""
        for file in self.files:
            os.close(file.fd)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
