"""The log of a run and its picture: ``log.jsonl``, one JSON object a line, and ``curves.png``.

A step is ``{"step", "loss", "learning_rate", ...}``, a validation ``{"step", "validation": {"none",
"generic", "fetched"}}``; losses are in nats per token; what is not finite is null. Notable:
- Each line is one write, so a crash leaves at most one broken last line, which is cut off when
  the log is opened again.
- The picture is drawn from the log, so it can be drawn again at any time: :func:`draw`.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, TrainingError
from ..files import AtomicFile
from .picture import figure

LOG, PICTURE = "log.jsonl", "curves.png"


@dataclass(frozen=True)
class Log:
    """What a log holds: its steps and its validations, each in the order of the file."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)


class Curves:
    """Writes the log of one run, and draws it. A context manager.

    Args:
        folder: of the run; a log that is there is gone on with.

    Raises:
        TrainingError: the log cannot be written (also from the methods).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / LOG
        try:
            self._fd = self._open()
        except OSError as error:
            raise self._failed(error) from None

    def step(self, values: Mapping[str, Any]) -> None:
        """Log one optimizer step; ``values`` holds at least ``step`` and ``loss``."""
        self._write(values)

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Log a validation after ``step``: loss in nats per token for none, generic, fetched."""
        self._write({"step": step, "validation": losses})

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, which a run that resumes after ``step`` writes again.

        Lines that are broken, as a power failure can leave them, go too.
        """
        self.close()
        try:
            with open(self.path, "rb") as old, AtomicFile(self.folder, LOG) as new:
                for line in old:
                    entry = _parse(line)
                    if entry is not None and entry["step"] <= step:
                        new.write(line)
            self._fd = self._open()
        except OSError as error:
            raise self._failed(error) from None

    def plot(self) -> None:
        """Draw ``curves.png`` from the log; it appears whole or not at all."""
        draw(self.path, self.folder / PICTURE)

    def close(self) -> None:
        """Close the log."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> int:
        """Open for appending, behind the last whole line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        fd = os.open(self.path, flags, 0o644)
        try:
            end = os.fstat(fd).st_size
            while end and (tail := os.pread(fd, min(end, 1 << 16), max(0, end - (1 << 16)))):
                whole = tail.rfind(b"\n") + 1
                end -= len(tail) - whole
                if whole:
                    break
            os.ftruncate(fd, end)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _write(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(_plain(values), allow_nan=False) + "\n"
        data = line.encode()
        try:
            if os.write(self._fd, data) < len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"{self.path}: cannot be written ({error.strerror}); check the folder and free space, "
            "then resume: checkpoints are not touched"
        )


def read_log(path: str | Path) -> Log:
    """The log of a run; a broken last line, which a crash can leave, does not count.

    Raises:
        FormatError: it cannot be read, or another line is not one of a log.
    """
    path = Path(path)
    log = Log()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    entry = _parse(line)
                    if entry is None:
                        raise FormatError(
                            f"{path}, line {number}: not a line of a training log; remove the "
                            "line, or the file"
                        )
                    (log.validations if "validation" in entry else log.steps).append(entry)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    return log


def draw(log: str | Path, picture: str | Path) -> None:
    """Draw a log to a PNG: training loss, learning rate, and validation per kind of memory.

    Raises:
        FormatError: the log cannot be read, or the picture cannot be written.
    """
    data = io.BytesIO()
    found = read_log(log)
    figure(found.steps, found.validations).savefig(data, format="png", dpi=150)
    with AtomicFile(Path(picture).parent, Path(picture).name) as file:
        file.write(data.getbuffer())


# ---- lines of the log ------------------------------------------------------------------


def _parse(line: bytes) -> dict[str, Any] | None:
    """The entry of one line; None if it is not one of a log."""
    try:
        entry = json.loads(line)
        values = [entry.get("loss"), entry.get("learning_rate")]
        values += entry.get("validation", {}).values()
    except (ValueError, AttributeError, RecursionError):
        return None
    numbers = all(value is None or type(value) in (int, float) for value in values)
    return entry if numbers and type(entry.get("step")) is int else None


def _plain(value: Any) -> Any:
    """What JSON takes: NumPy's numbers as Python's, and null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
