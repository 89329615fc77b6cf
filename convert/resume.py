"""What a killed conversion had finished, so that the next one goes on there.

The hidden file ``.convert.jsonl`` in the folder that is being written: first a line that says what
is converted, then one for each file that is whole and on the disk. It is removed at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_hiermem.bank.manifest import FileEntry
from mlx_hiermem.errors import FormatError
from mlx_hiermem.files import AtomicFile

JOURNAL = ".convert.jsonl"


def job_of(what: Mapping[str, Any]) -> str:
    """A name for what is converted and how, from everything that decides the result."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def states_of(files: Iterable[Path]) -> list[list[Any]]:
    """[path, size, modified] of files, as ``Source.fingerprint`` has it: whether they are the same.

    A file that is not there has a path alone: whoever reads it says so.
    """
    return [_state(os.path.realpath(path)) for path in files]


def _state(path: str) -> list[Any]:
    try:
        found = os.stat(path)
    except OSError:
        return [path]
    return [path, found.st_size, found.st_mtime_ns]


class Journal:
    """The finished files of a conversion into ``folder``.

    Args:
        folder: the folder that is being written.
        job: what is converted, and how (:func:`job_of`): the same job goes on, another one begins
            anew.

    Attributes:
        done: for each finished file its size and sha256, and what was noted with it.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self.folder = folder
        self.job = job
        self.done: dict[str, tuple[FileEntry, str]] = {}
        self._path = folder / JOURNAL

    @classmethod
    def fits(cls, folder: Path, job: str) -> bool:
        """Whether a folder was left behind by the same job."""
        lines = cls(folder, job)._lines()
        return bool(lines) and lines[0].get("job") == job

    def open(self) -> None:
        """Read what is there; a file that has another size than noted is not done."""
        lines = self._lines() if self.fits(self.folder, self.job) else []
        kept: list[Mapping[str, Any]] = [{"job": self.job}]
        for line in lines[1:]:
            try:
                entry, note = FileEntry(line["bytes"], line["sha256"]), line["note"]
                same = (self.folder / line["file"]).stat().st_size == entry.bytes
            except (KeyError, TypeError, OSError):
                continue
            if same:
                self.done[line["file"]] = (entry, note)
                kept.append(line)
        # Written again: what a kill has cut off must not spoil the lines that follow.
        with AtomicFile(self.folder, JOURNAL) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def add(self, name: str, entry: FileEntry, note: str = "") -> None:
        """Note that a file is whole and on the disk."""
        self.done[name] = (entry, note)
        line = {"file": name, "bytes": entry.bytes, "sha256": entry.sha256, "note": note}
        self._append(line)

    @property
    def bytes_done(self) -> int:
        """Bytes of the finished files."""
        return sum(entry.bytes for entry, _ in self.done.values())

    def remove(self) -> None:
        """The conversion is done."""
        self._path.unlink(missing_ok=True)

    def _lines(self) -> list[dict[str, Any]]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return []
        lines = []
        for one in text.splitlines():
            try:
                lines.append(json.loads(one))
            except ValueError:
                break  # the line that was being written; what follows cannot be trusted
        return lines if all(isinstance(line, dict) for line in lines) else []

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FormatError(f"{self._path}: cannot be written ({error.strerror})") from None
