"""A document of a corpus, and a work unit: a piece of a source that one worker reads.

Notable: where a document stands is told by a function, not a text: the number of a line in the
middle of a large file costs a reading of all that is before it, and only an error asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import InputError

#: What one document may take, in bytes (or characters, where a library decodes it): more is no
#: document but a file of another kind, and would have to be held whole.
MAX_DOCUMENT = 256 << 20

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Unit:
    """A piece of a source. Units do not overlap, and together they are the whole corpus.

    Attributes:
        file: the number of its file (of its shard, in a dataset), from 0.
        index: its number within the file, from 0.
        kind: which reader it is for: "txt", "jsonl", "jsonl.gz", "parquet" or "dataset".
        path: a file, or the name of a dataset.
        begin, end: bytes of the file from ``begin`` up to ``end``; of parquet, row groups; of a
            dataset, the shard ``begin`` of ``end`` shards.
        size: about how much there is to read, in bytes; 1 where nobody knows.
        options: for a dataset: its config, its split, and so on.
    """

    file: int
    index: int
    kind: str
    path: str
    begin: int
    end: int
    size: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its files are called by; names sort as the units do."""
        return f"{self.file:06d}-{self.index:06d}"


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: valid Unicode; may be empty.
        fields: the texts of the other fields that were asked for; absent ones are not in it.
        done: the share of the unit that is read when this document is, from 0 to 1.
        where: tells the place for an error: file and line or row.
    """

    text: str
    fields: Mapping[str, Sequence[str]]
    done: float
    where: Callable[[], str]


def document_of(
    record: Mapping[str, Any],
    text_field: str,
    fields: Sequence[str],
    done: float,
    where: Callable[[], str],
) -> Document:
    """The document in one record (JSON object, row of a table).

    Null stands for an empty text, and for no text in another field.

    Raises:
        InputError: the text is missing, or a field holds something else than text.
    """
    if not isinstance(record, Mapping) or text_field not in record:
        raise InputError(
            f'{where()}: expected an object with a "{text_field}"; name another field with '
            "--text-field"
        )
    text = record[text_field]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise InputError(
            f'{where()}: expected an object with a "{text_field}" that is a text, found '
            f"{type(text).__name__}"
        )
    found = {}
    for name in fields:
        value = record.get(name)
        texts = [value] if isinstance(value, str) else value
        if texts is None:
            continue
        if not isinstance(texts, Sequence) or not all(isinstance(one, str) for one in texts):
            raise InputError(f'{where()}: field "{name}" is neither a text nor a list of texts')
        found[name] = [whole(one) for one in texts]
    return Document(whole(text), found, done, where)


def whole(text: str) -> str:
    """``text`` with each half of a surrogate pair, which JSON can hold, as U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
