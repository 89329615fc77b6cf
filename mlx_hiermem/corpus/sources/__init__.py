"""Sources of documents: what is named on the command line -> work units -> documents.

``find_units`` lists the pieces that workers read, in an order that depends on nothing but the names
and sizes of the files; ``read_unit`` streams the documents of one piece. One format per file.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from .document import Document, Unit

__all__ = ["Document", "Unit", "find_dataset_units", "find_files", "find_units", "read_unit"]

#: File endings and the reader that each is for; the longest that fits counts.
KINDS = {".jsonl.gz": "jsonl.gz", ".jsonl": "jsonl", ".txt": "txt", ".parquet": "parquet"}

_KNOWN = ".txt, .jsonl, .jsonl.gz and .parquet"


def kind_of(path: str | Path) -> str | None:
    """The reader for a file by its name, or None."""
    name = Path(path).name.lower()
    return next((kind for ending, kind in KINDS.items() if name.endswith(ending)), None)


def find_files(data: Sequence[str]) -> list[Path]:
    """The files that names, folders (with all below them) and globs stand for.

    Names keep their order; what a folder or glob holds is sorted. No file comes twice, and hidden
    ones in folders are left out.

    Raises:
        InputError: nothing is there, or a file is of no kind that can be read.
    """
    found: dict[Path, Path] = {}
    for name in data:
        path = Path(name).expanduser()
        if path.is_dir():
            below = (p for p in sorted(path.rglob("*")) if not _hidden(p.relative_to(path)))
            files = [p for p in below if kind_of(p) and p.is_file()]
            problem = f"{name}: {_held(path)}; expected documents in {_KNOWN}"
        elif path.exists():
            files = [path]
            problem = ""
        else:
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
            files = [p for p in matches if p.is_file()]
            problem = f"{name}: no such file, folder or pattern; give documents in {_KNOWN}"
        if not files:
            raise InputError(problem)
        for file in files:
            if kind_of(file) is None:
                raise InputError(
                    f"{file}: the name ends in {file.suffix!r}; files that can be read are "
                    f"{_KNOWN}; save text as .txt"
                )
            # Of a link to a file whose name tells nothing, as in the Hub's cache, its own does.
            real = file.resolve()
            found.setdefault(real, real if kind_of(real) else file.absolute())
    return list(found.values())


def _held(folder: Path) -> str:
    """What a folder without documents holds."""
    names = (p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder)))
    endings = sorted({path.suffix or path.name for path in names})
    if not endings:
        return "the folder is empty"
    shown = ", ".join(endings[:5]) + (", ..." if len(endings) > 5 else "")
    return f"the folder holds no file that can be read, only {shown}; save text as .txt"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def find_units(files: Sequence[Path], unit_bytes: int) -> list[Unit]:
    """The units of some files: ranges of ``unit_bytes`` bytes, row groups, or whole files.

    Raises:
        InputError: a file is empty or cannot be read.
        ConfigError: Parquet without pyarrow.
    """
    units: list[Unit] = []
    for number, path in enumerate(files):
        kind, name = kind_of(path), str(path)
        assert kind is not None, "find_files refuses all others"
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        if not size:
            raise InputError(f"{path}: the file is empty; leave it out, or fill it with documents")
        if kind == "parquet":
            from .parquet import row_groups

            ranges = [(i, i + 1, group) for i, group in enumerate(row_groups(name))]
        elif kind == "jsonl.gz":
            ranges = [(0, size, size)]
        else:
            starts = range(0, size, unit_bytes)
            ends = (min(start + unit_bytes, size) for start in starts)
            ranges = [(start, end, end - start) for start, end in zip(starts, ends, strict=True)]
        for index, (begin, end, nbytes) in enumerate(ranges):
            units.append(Unit(number, index, kind, name, begin, end, max(1, nbytes)))
    return units


def find_dataset_units(name: str, options: Mapping[str, Any]) -> list[Unit]:
    """The shards of a Hugging Face dataset.

    Raises:
        InputError: it cannot be opened.
        ConfigError: the datasets library is missing.
    """
    from .hub import shards

    count = shards(name, options)
    return [Unit(i, 0, "dataset", name, i, count, 1, dict(options)) for i in range(count)]


def read_unit(unit: Unit, text_field: str, fields: Sequence[str] = ()) -> Iterator[Document]:
    """Stream the documents of a unit in their order.

    Args:
        text_field: the field that holds the text; .txt has no fields.
        fields: other fields, for views.

    Raises:
        InputError: what is there is no document; the text names file and line, or row.
    """
    if unit.kind == "txt":
        from .lines import read_text

        return read_text(unit)
    if unit.kind == "jsonl":
        from .lines import read_jsonl as read
    elif unit.kind == "jsonl.gz":
        from .lines import read_jsonl_gz as read
    elif unit.kind == "parquet":
        from .parquet import read_parquet as read
    else:
        from .hub import read_shard as read
    return read(unit, text_field, fields)
