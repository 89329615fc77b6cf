"""Files of lines: .jsonl in byte ranges, .jsonl.gz, and .txt with blank lines between documents.

A range owns the lines, or the documents, that start in it, so that a file is cut without being read
beforehand. Lines end with a line feed alone: JSON strings and texts may hold the other separators
that Python knows. What blank lines part is stripped of white space.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import BinaryIO

from ...errors import InputError
from .document import MAX_DOCUMENT, Document, Unit, document_of

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"

Where = Callable[[], str]


def read_jsonl(unit: Unit, text_field: str, fields: Sequence[str]) -> Iterator[Document]:
    """One JSON object per line of the range; empty lines are left out."""
    with _open(unit.path) as file:
        for start, data in _lines(file, unit):
            if start >= unit.end:
                return
            done = (start + len(data) - unit.begin) / unit.size
            yield from _json_line(data, text_field, fields, done, partial(_line_at, unit, start))


def read_jsonl_gz(unit: Unit, text_field: str, fields: Sequence[str]) -> Iterator[Document]:
    """The same from a gzip file, which is read whole: nobody can start in the middle of it."""
    with _open(unit.path) as raw, gzip.GzipFile(fileobj=raw) as file:
        number = 0
        while True:
            number += 1
            where = partial("{}: line {}".format, unit.path, number)
            try:
                data = _checked(file.readline(MAX_DOCUMENT + 1), where)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(
                    f"{where()}: damaged gzip file ({error}); get the file again"
                ) from None
            if not data:
                return
            data = data.removeprefix(_BOM) if number == 1 else data
            yield from _json_line(data, text_field, fields, raw.tell() / unit.size, where)


def _json_line(
    data: bytes, text_field: str, fields: Sequence[str], done: float, where: Where
) -> Iterator[Document]:
    line = _decode(data, where)
    if not line or line.isspace():
        return
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where()}: not valid JSON ({error}); mend or remove the line") from None
    yield document_of(record, text_field, fields, min(done, 1.0), where)


def read_text(unit: Unit) -> Iterator[Document]:
    """The documents that start in the range; the last of them may go on beyond it."""
    with _open(unit.path) as file:
        # The head of the range may belong to a document that started before it.
        skipping = not _after_blank(file, unit)
        held: list[str] = []
        size, where = 0, partial(_line_at, unit, unit.begin)
        for start, data in _lines(file, unit):
            line = _decode(data, partial(_line_at, unit, start))
            blank = not line or line.isspace()
            if blank and held:
                yield _text_document(held, (start - unit.begin) / unit.size, where)
                held, size = [], 0
            if not held and start >= unit.end:
                return
            if blank:
                skipping = False
            elif not skipping:
                if not held:
                    where = partial(_line_at, unit, start)
                held.append(line)
                size += len(data)
                if size > MAX_DOCUMENT:
                    raise _too_long(where)
        if held:
            yield _text_document(held, 1.0, where)


def _text_document(lines: list[str], done: float, where: Where) -> Document:
    return Document("".join(lines).strip(), {}, min(done, 1.0), where)


# ---- lines of a range ------------------------------------------------------------------


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb", buffering=_BLOCK)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _lines(file: BinaryIO, unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Where each line starts and its bytes, from the first that starts in the range to the end of
    the file: the caller knows when to stop."""
    try:
        start = unit.begin
        if start:
            # The line that the byte before belongs to is not ours; its line feed ends it.
            file.seek(start - 1)
            while rest := file.readline(_BLOCK):
                start = file.tell()
                if rest.endswith(b"\n"):
                    break
        else:
            file.seek(0)
        while data := file.readline(MAX_DOCUMENT + 1):
            _checked(data, partial(_line_at, unit, start))
            yield start, (data if start else data.removeprefix(_BOM))
            start += len(data)
    except OSError as error:
        raise InputError(f"{unit.path}: cannot be read ({error.strerror})") from None


def _after_blank(file: BinaryIO, unit: Unit) -> bool:
    """Whether a document may start with the first line that starts in the range: the line before
    that one is blank, or there is none."""
    end = unit.begin
    if end == 0:
        return True
    try:
        file.seek(end - 1)
        if file.read(1) != b"\n":
            # The range starts inside a line, so the line before the first of ours is this one.
            head = _back(file, end)
            return _is_blank(head + _rest(file, unit), unit)
        return _is_blank(_back(file, end - 1), unit)
    except OSError as error:
        raise InputError(f"{unit.path}: cannot be read ({error.strerror})") from None


def _back(file: BinaryIO, end: int) -> bytes:
    """What stands between the last line feed before ``end`` and ``end``."""
    found = b""
    while end:
        begin = max(0, end - _BLOCK)
        file.seek(begin)
        head, feed, tail = file.read(end - begin).rpartition(b"\n")
        found = tail + found
        if feed:
            break
        end = begin
    return found


def _rest(file: BinaryIO, unit: Unit) -> bytes:
    """The rest of the line that the range starts in."""
    file.seek(unit.begin)
    return file.readline(MAX_DOCUMENT + 1)


def _is_blank(line: bytes, unit: Unit) -> bool:
    text = _decode(line, partial(_line_at, unit, unit.begin))
    return not text or text.isspace()


def _checked(data: bytes, where: Where) -> bytes:
    if len(data) > MAX_DOCUMENT:
        raise _too_long(where)
    return data


def _decode(data: bytes, where: Where) -> str:
    try:
        if b"\0" not in data:
            return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    raise InputError(
        f"{where()}: not UTF-8 text; convert the file, or leave it out if it is binary"
    )


def _too_long(where: Where) -> InputError:
    return InputError(
        f"{where()}: longer than {MAX_DOCUMENT >> 20} MiB; expected one document in a line of "
        ".jsonl, or blank lines between documents in .txt"
    )


def _line_at(unit: Unit, start: int) -> str:
    """File and line number of the line that starts at byte ``start``, counted now."""
    line, left = 1, start
    try:
        with open(unit.path, "rb") as file:
            while left and (block := file.read(min(left, _BLOCK))):
                line += block.count(b"\n")
                left -= len(block)
    except OSError:
        return f"{unit.path}: byte {start}"
    return f"{unit.path}: line {line}"
