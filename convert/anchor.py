"""Anchor: what the converter asks of an anchor, wherever it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_hiermem.shapes import AnchorShape

from .report import Line

if TYPE_CHECKING:
    from .verify import Reference

#: Called with (bytes in all, bytes done since the call before).
Progress = Callable[[int, int], None]


class Anchor(ABC):
    """An anchor that can be written as an MLX model.

    Attributes:
        path: where it comes from.
        shape: its sizes.
        vocabulary: rows of its output head.
        about: what it is, for the report.
        lines: its part of the mapping.
        missing, left_over: names that it lacks, and names that nothing is known of.
        ignored: names that are left out on purpose, such as buffers.
        notices: what was assumed.
        nbytes: of the weights that are written, before they are quantised.
        exact: whether the weights that are written are those of the source, to the bit.
        tokenizer: folder with its tokenizer; None: it has none.
        files: what it reads when it is written, beside the sources that are open.
    """

    path: Path
    shape: AnchorShape
    vocabulary: int
    about: dict[str, Any]
    lines: Sequence[Line]
    missing: Sequence[str] = ()
    left_over: Sequence[str] = ()
    ignored: Sequence[str] = ()
    notices: Sequence[str] = ()
    nbytes: int
    exact: bool
    tokenizer: Path | None = None
    files: Sequence[Path] = ()

    @abstractmethod
    def write(self, folder: Path, progress: Progress | None = None) -> None:
        """Write ``config.json`` and ``model*.safetensors``, and a tokenizer that belongs to it.

        Raises:
            FormatError: a number is not finite, or a file cannot be read or written.
        """

    @abstractmethod
    def reference(self, kind: str | None) -> Reference:
        """The original in torch.

        Args:
            kind: of the memories that it is given; None: it is given none.

        Raises:
            ConfigError: torch is not installed, or it cannot be built.
        """
