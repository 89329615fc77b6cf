"""Documents that are not what they were, in every format that ``cluster`` reads."""

from __future__ import annotations

import gzip
import io
import json
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from mlx_hiermem.corpus.sources import find_files, find_units, read_unit
from tests.corpus.corpora import make_documents
from tests.reliability.fuzz_mutations import WORDS, anywhere, as_lines
from tests.reliability.fuzz_process import FolderTarget

_COUNT = 40
_FIELDS = ("title", "questions")


class Documents(FolderTarget):
    """The same documents as .jsonl, .jsonl.gz, .txt and .parquet."""

    def make(self) -> None:
        """Write them."""
        documents = make_documents(_COUNT)
        lines = b"".join(_line(document) for document in documents)
        (self.folder / "a.jsonl").write_bytes(lines)
        (self.folder / "b.jsonl.gz").write_bytes(gzip.compress(lines, 1, mtime=0))
        text = "\n\n".join(document["text"] + "\nmore ä" for document in documents)
        (self.folder / "c.txt").write_text(text + "\n")
        self.table = pa.Table.from_pylist(documents)
        (self.folder / "d.parquet").write_bytes(_parquet(self.table))
        self.one = ""
        self.look(Random(0))

    def change(self, random: Random) -> str:
        """Change one of the files."""
        name = self.one = random.choice(list(self.files))
        data = self.files[name]
        if random.random() < 0.03:
            data = self.files[random.choice(list(self.files))]
        elif name.endswith(".parquet"):
            data = self._parquet(random, data)
        elif name.endswith(".gz") and random.random() < 0.6:
            inner = as_lines(random, gzip.decompress(data))
            data = gzip.compress(inner, 1, mtime=0)
            if random.random() < 0.3:
                data += random.choice([b"\0" * 9, data, data[:20], b"junk"])
        elif name.endswith(".gz"):
            data = anywhere(random, data)
        else:
            data = as_lines(random, data)
        self.put(name, data)
        return f"{name}: {data[:200]!r}"

    def _parquet(self, random: Random, data: bytes) -> bytes:
        kind = random.choice(["bytes", "footer", "footer", "table", "table"])
        if kind == "bytes":
            return anywhere(random, data)
        if kind == "footer":  # what says where and how long everything is
            size = int.from_bytes(data[-8:-4], "little")
            return data[: -8 - size] + anywhere(random, data[-8 - size : -8]) + data[-8:]
        return _parquet(_other_table(random, self.table))

    def look(self, random: Random) -> None:
        """Read every document of what was changed."""
        unit_bytes = random.choice([1, 100, 1000, 1 << 20])
        files = find_files([str(self.folder / self.one)])
        for unit in find_units(files, unit_bytes)[:60]:
            last = 0.0
            for document in read_unit(unit, "text", _FIELDS):
                assert isinstance(document.text, str) and 0 <= document.done <= 1
                assert document.done >= last
                document.text.encode()
                last = document.done


def _line(document: dict[str, object]) -> bytes:
    return json.dumps(document).encode() + b"\n"


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=15)
    return out.getvalue()


def _other_table(random: Random, table: pa.Table) -> pa.Table:
    """A table with a column of another type, name or content."""
    name = random.choice(table.column_names)
    at = table.column_names.index(name)
    others = [
        pa.array(range(_COUNT)), pa.nulls(_COUNT), pa.array([b"\xff\xfe"] * _COUNT),
        pa.array([random.choice(WORDS).replace("\ud800", "") for _ in range(_COUNT)]),
        pa.array([[["a"]]] * _COUNT), pa.array([{"a": 1}] * _COUNT), pa.array([1.5] * _COUNT),
        pa.array(["a"] * _COUNT).dictionary_encode(), pa.array([None, "a"] * (_COUNT // 2)),
        pa.array(["x" * 2_000_000] + [""] * (_COUNT - 1)), pa.array([[]] * _COUNT),
    ]  # fmt: skip
    kind = random.choice(["type", "type", "name", "drop", "twice", "empty"])
    if kind == "type":
        return table.set_column(at, name, random.choice(others))
    if kind == "name":
        return table.rename_columns([random.choice(["", "Text", name, "é"]) for _ in range(3)])
    if kind == "drop":
        return table.drop_columns([name])
    return table.append_column(name, table[name]) if kind == "twice" else table.slice(0, 0)
