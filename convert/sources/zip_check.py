"""The records of a zip archive of torch.save: where each lies, after hard checks.

Two readers of one zip file can see two different files in it: through two directories, names or
sizes that differ between directory and record, records inside of others, bytes before or behind.
torch.save writes none of that, so all of it is refused. That is why this is no use of ``zipfile``,
which reads most of it.

Notable: nothing is read but the directory and the headers of the records.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlx_hiermem.bank.files import read_exact
from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown

from .tensor import SourceFile

# APPNOTE.TXT of the zip format: end of central directory, its zip64 locator and record, entry of
# the directory, header before a record.
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_HEADER = struct.Struct("<4s5H3L2H")

# Sizes are in a descriptor behind the record; names are UTF-8. No other flag may be set.
_DESCRIPTOR, _UTF8 = 0x8, 0x800
_LONGEST_DESCRIPTOR = 24
_MAX_DIRECTORY = 1 << 30
_FULL = 0xFFFFFFFF  # "see the zip64 extra field"


@dataclass(frozen=True)
class Window:
    """A range of an open file, read as if it were a file."""

    file: SourceFile
    start: int
    size: int

    @classmethod
    def of(cls, file: SourceFile) -> Window:
        """All of a file."""
        return cls(file, 0, file.size)

    @property
    def where(self) -> str:
        """The file, and where in it, for messages."""
        return f"{self.file.path}" + (f" at byte {self.start}" if self.start else "")

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` on.

        Raises:
            FormatError: the range does not hold them, or the file cannot be read.
        """
        if offset + count > self.size:
            raise FormatError(
                f"{self.where}: truncated: {shown(count)} bytes expected at {shown(offset)} of "
                f"{self.size}; copy or download it again"
            )
        data = bytearray(count)
        if count:
            read_exact(self.file.fd, memoryview(data), self.start + offset, self.file.path)
        return bytes(data)


class Entry(NamedTuple):
    """What the directory says of a record; ``header``: where the header before it starts."""

    header: int
    name: str
    flags: int
    method: int
    size: int


@dataclass(frozen=True)
class Directory:
    """The central directory of an archive, and where it starts."""

    start: int
    entries: Sequence[Entry]


def read_records(window: Window, directory: Directory) -> Mapping[str, tuple[int, int]]:
    """(offset in the window, bytes) of each record of an archive, by its full name.

    Raises:
        FormatError: a record is not as the directory says, or as torch.save writes it.
    """
    records: dict[str, tuple[int, int]] = {}
    at = 0
    for entry in sorted(directory.entries):
        name = entry.name
        if name in records:
            raise _wrong(window, f"two records are named {shown(name)}")
        if entry.flags & ~(_DESCRIPTOR | _UTF8):
            raise _wrong(window, f"{shown(name)} is encrypted, or has unknown flags")
        if entry.method:
            raise _wrong(window, f"{shown(name)} is compressed")
        # Each record begins where the one before ends, so that none lies in another.
        if not at <= entry.header <= at + _LONGEST_DESCRIPTOR * bool(records):
            raise _wrong(window, f"{shown(name)} lies in another record, or behind a gap")
        offset = _check_header(window, entry)
        at = offset + entry.size
        if at > directory.start:
            raise _wrong(window, f"{shown(name)} does not end before the directory")
        records[name] = (offset, entry.size)
    if directory.start - at > _LONGEST_DESCRIPTOR:
        raise _wrong(window, "there is something between its records and its directory")
    return records


def _wrong(window: Window, found: str) -> FormatError:
    return FormatError(
        f"{window.where}: refused: {found}, which torch.save does not write; copy or download it "
        "again, or save it again with torch.save"
    )


def _find_directory(window: Window) -> tuple[int, int, int]:
    """(entries, start, end) of the one central directory."""
    at = window.size - _END.size
    if at < 0 or window.read(at, 4) != b"PK\5\6":
        raise _wrong(window, "it does not end with the end record of a zip archive (truncated?)")
    _, disk, first, here, count, length, start, comment = _END.unpack(window.read(at, _END.size))
    if disk or first or here != count or comment:
        raise _wrong(window, "its end record has a comment or parts on other disks")
    locator = at - _LOCATOR.size
    if locator >= _END64.size and window.read(locator, 4) == b"PK\6\7":
        _, disk, end64, disks = _LOCATOR.unpack(window.read(locator, _LOCATOR.size))
        at = locator - _END64.size
        fields = _END64.unpack(window.read(at, _END64.size))
        signature, record, _, _, this, first, here, count64, length64, start64 = fields
        if signature != b"PK\6\6" or record != _END64.size - 12 or end64 != at:
            raise _wrong(window, "its zip64 end record is not where it should be")
        if disk or disks != 1 or this or first or here != count64:
            raise _wrong(window, "its zip64 end record has parts on other disks")
        short = ((count, count64, 0xFFFF), (length, length64, _FULL), (start, start64, _FULL))
        if any(small not in (large, full) for small, large, full in short):
            raise _wrong(window, "its two end records contradict each other")
        count, length, start = count64, length64, start64
    if start + length != at:
        raise _wrong(window, "its directory does not end where its end record begins")
    if length > _MAX_DIRECTORY or count * _ENTRY.size > length:
        raise _wrong(window, f"a directory of {shown(length)} bytes for {shown(count)} records")
    return count, start, at


def read_directory(window: Window) -> Directory:
    """The directory of an archive. The records are still to be checked.

    Raises:
        FormatError: there is not one, at the end, without anything that torch.save does not write.
    """
    count, start, end = _find_directory(window)
    data = window.read(start, end - start)
    entries, at = [], 0
    for _ in range(count):
        if at + _ENTRY.size > len(data):
            raise _wrong(window, "its directory is shorter than it says")
        fields = _ENTRY.unpack_from(data, at)
        signature, _, _, flags, method, _, _, _, packed, size, *rest = fields
        named, extra, comment, disk, _, _, header = rest
        if signature != b"PK\1\2" or comment or disk:
            raise _wrong(window, "its directory has a damaged entry, or one with a comment")
        at += _ENTRY.size
        name = _name(window, data[at : at + named])
        more = data[at + named : at + named + extra]
        at += named + extra
        if len(more) != extra:
            raise _wrong(window, "its directory is shorter than it says")
        packed, size, header = _large(window, more, (size, packed, header))
        if packed != size and not method:
            raise _wrong(window, f"{shown(name)} has two sizes")
        entries.append(Entry(header, name, flags, method, size))
    if at != len(data):
        raise _wrong(window, "its directory is longer than it says")
    return Directory(start, entries)


def _large(window: Window, extra: bytes, short: tuple[int, int, int]) -> tuple[int, int, int]:
    """(packed, size, header), with those that do not fit in 32 bits from the zip64 field."""
    size, packed, header = short
    wanted = sum(value == _FULL for value in short)
    at, found = 0, None
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if kind == 1:
            if found is not None or length != 8 * wanted or len(body) != length:
                raise _wrong(window, "the zip64 field of a record contradicts its entry")
            found = list(struct.unpack(f"<{wanted}Q", body))
        at += 4 + length
    if wanted and found is None:
        raise _wrong(window, "a record lacks its zip64 field")
    values = iter(found or ())
    size, packed, header = (next(values) if v == _FULL else v for v in short)
    return packed, size, header


def _check_header(window: Window, entry: Entry) -> int:
    """Where the bytes of a record start, if the header before it agrees with the directory."""
    raw = entry.name.encode()
    at, size = entry.header, entry.size
    data = window.read(at, _HEADER.size + len(raw))
    signature, _, own, method, _, _, _, packed, full, named, extra = _HEADER.unpack_from(data)
    if signature != b"PK\3\4" or own != entry.flags or method:
        raise _wrong(
            window, f"the header of {shown(entry.name)} is damaged, or not as in the directory"
        )
    if named != len(raw) or data[_HEADER.size :] != raw:
        raise _wrong(window, f"{shown(entry.name)} has another name in its own header")
    allowed = (size, _FULL, 0) if entry.flags & _DESCRIPTOR else (size, _FULL)
    if packed not in allowed or full not in allowed:
        raise _wrong(window, f"{shown(entry.name)} has another size in its own header")
    return at + _HEADER.size + named + extra


def _name(window: Window, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _wrong(window, "the name of a record is no text") from None
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(p in ("", ".", "..") for p in parts):
        raise _wrong(window, f"a record is named {shown(name)}")
    return name
