"""The work folder of a corpus in the making: what is done, so that a run can go on.

::

    work/
      plan.json                      settings and files; written when all is ready to begin
      parts/F-U-MMM.safetensors      parts of unit U of file F (part.py)
      parts/F-U-MMM.keys.npy         (D,) uint64: a number for each document's text
      parts/F-U-MMM.leaves.npy       (M,) int64: the leaf of each vector
      parts/F-U.json                 UnitRecord; written last: the unit is done
      attempts/                      units under way, each in a folder of its own
      embeddings.npy                 the anchor's token embeddings, for the encoder made of them
      sample.f32, tree.json          what the tree is grown on, and with which settings
      names.u32                      beginnings of windows that clusters are named after

Notable: a unit is written in a folder of its own and then renamed into place, its record last; so a
unit that is done twice, by a worker that was given up and its successor, does no harm.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, one_line
from ..files import AtomicFile, sync_folder


@dataclass(frozen=True)
class PartRecord:
    """What one part holds."""

    windows: int
    rows: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class UnitRecord:
    """What came of one unit.

    Attributes:
        unit: its name.
        parts: of its parts, in order.
        empty: documents that had no token, and are in none of them.
    """

    unit: str
    parts: tuple[PartRecord, ...]
    empty: int

    @property
    def windows(self) -> int:
        return sum(part.windows for part in self.parts)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def size(self) -> int:
        """Its share of the work of assigning."""
        return max(1, self.rows)


class WorkFolder:
    """Names and files of a work folder.

    Args:
        out: the corpus folder that it is in.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.folder = self.out / "work"
        self.parts = self.folder / "parts"
        self.attempts = self.folder / "attempts"
        self.plan = self.folder / "plan.json"
        self.tree_settings = self.folder / "tree.json"
        self.embeddings = self.folder / "embeddings.npy"
        self.sample = self.folder / "sample.f32"
        self.name_sample = self.folder / "names.u32"
        self.routing = self.out / "routing"
        self.tokenizer = self.out / "tokenizer"

    def part(self, unit: str, number: int, ending: str = "safetensors") -> Path:
        """Where part ``number`` of a unit is, or, by their ending, its keys or leaves."""
        return self.parts / f"{unit}-{number:03d}.{ending}"

    def record(self, unit: str) -> UnitRecord | None:
        """What came of a unit, or None if it is not done."""
        path = self.parts / f"{unit}.json"
        values = read_json(path) if path.exists() else None
        if values is None:
            return None
        try:
            parts = tuple(PartRecord(**part) for part in values.pop("parts"))
            return UnitRecord(parts=parts, **values)
        except (TypeError, KeyError, AttributeError):
            raise FormatError(f"{path}: not the record of a unit; remove the file") from None

    @contextmanager
    def attempt(self, unit: str) -> Iterator[Path]:
        """A folder to write the parts of a unit in; what is in it at the end is put in place."""
        folder = self.attempts / f"{unit}-{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        try:
            yield folder
            record = folder / f"{unit}.json"
            for path in sorted(folder.iterdir(), key=lambda path: path == record):
                if path == record:
                    sync_folder(self.parts)  # the parts are there before it says so
                os.replace(path, self.parts / path.name)
            sync_folder(self.parts)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write_record(self, folder: Path, record: UnitRecord) -> None:
        """Write a unit's record into the folder of an attempt."""
        write_json(folder / f"{record.unit}.json", asdict(record))

    def forget(self, file: int) -> None:
        """Remove all that was made of a file, its records first."""
        found = list(self.parts.glob(f"{file:06d}-*"))
        for path in sorted(found, key=lambda path: path.suffix != ".json"):
            path.unlink()

    def array(self, unit: str, number: int, what: str) -> np.ndarray:
        """The keys or leaves of a part.

        Raises:
            FormatError: they are missing or damaged.
        """
        path = self.part(unit, number, f"{what}.npy")
        try:
            return np.load(path, allow_pickle=False)
        except Exception as error:  # NumPy reads the header as a piece of Python
            reason = one_line(error, 120)
            raise FormatError(
                f"{path}: cannot be read ({reason}); remove {unit}.json beside it and run again"
            ) from None


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a small .npy file, whole or not at all."""
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    with AtomicFile(path.parent, path.name) as file:
        file.write(data.getbuffer())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with AtomicFile(path.parent, path.name) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of ours.

    Raises:
        FormatError: it cannot be read, or is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error}); get it again, or remove it") from None
    if not isinstance(values, dict):
        raise FormatError(f"{path}: not a JSON object; get it again, or remove it")
    return values
