"""Archives of torch.save with tricks in the zip format."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from .attacks import Maker, archive, checkpoint, honest, records, tensor

Edit = Callable[[bytearray], bytes | bytearray | None]


def edited(edit: Edit) -> Maker:
    """An honest archive after ``edit``, which changes it or gives another."""

    def make(path: Path, canary: Path) -> None:
        data = bytearray(honest())
        path.write_bytes(edit(data) or data)

    return make


def made(content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Maker:
    """An archive of these records."""
    return lambda path, canary: path.write_bytes(archive(content, method)) and None


def end_of(data: bytes) -> int:
    return len(data) - 22


def entry_of(data: bytes, name: bytes) -> int:
    """Where the entry of a record is in the directory."""
    return data.rindex(name, 0, end_of(data)) - 46


def _header(data: bytes, name: bytes) -> int:
    """Where the header of a record is."""
    return data.index(name) - 30


def put(data: bytearray, at: int, form: str, *values: int) -> None:
    """Write these fields over what is there."""
    struct.pack_into("<" + form, data, at, *values)


def _two_directories(data: bytearray) -> bytes:
    """A whole second directory, in the comment of the first one's end."""
    end = end_of(data)
    start = struct.unpack_from("<L", data, end + 16)[0]
    put(data, end + 20, "H", end - start + 22)
    second = bytearray(data[end : end + 22])
    put(second, 16, "L", len(data))
    put(second, 20, "H", 0)
    return data + data[start:end] + second


def _comment(comment: bytes) -> Edit:
    def edit(data: bytearray) -> bytes:
        put(data, end_of(data) + 20, "H", len(comment))
        return data + comment

    return edit


def _hidden_record(data: bytearray) -> bytes:
    """A record before the first that the directory knows."""
    out = io.BytesIO(archive({"x/hidden": b"hidden"}))
    with zipfile.ZipFile(out, "a") as file:
        for name, content in records(checkpoint(tensor())).items():
            file.writestr(zipfile.ZipInfo(name), content)
    whole = bytearray(out.getvalue())
    at = entry_of(whole, b"x/hidden")
    start = struct.unpack_from("<L", whole, end_of(whole) + 16)[0]
    assert at == start
    del whole[at : at + 46 + len("x/hidden")]
    end = end_of(whole)
    count = struct.unpack_from("<H", whole, end + 8)[0] - 1
    put(whole, end + 8, "HHLL", count, count, end - start, start)
    return whole


def _prefixed(data: bytearray) -> bytes:
    """Bytes before the archive, with all offsets right."""
    out = io.BytesIO(b"PK\3\4" + bytes(60))
    with zipfile.ZipFile(out, "a") as file:
        for name, content in records(checkpoint(tensor())).items():
            file.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def _set_flags(flag: int) -> Edit:
    def edit(data: bytearray) -> None:
        put(data, _header(data, b"x/data/0") + 6, "H", flag)
        put(data, entry_of(data, b"x/data/0") + 8, "H", flag)

    return edit


def set_sizes(name: bytes, entry: tuple[int, int], header: tuple[int, int] | None) -> Edit:
    """Change the sizes of a record in its entry, and in its header if given."""

    def edit(data: bytearray) -> None:
        put(data, entry_of(data, name) + 20, "LL", *entry)
        if header is not None:
            put(data, _header(data, name) + 18, "LL", *header)

    return edit


def _set_header(*changes: tuple[int, str, int]) -> Edit:
    """Change fields (place, form, value) of the header of "x/data/0" alone."""

    def edit(data: bytearray) -> None:
        for place, form, value in changes:
            put(data, _header(data, b"x/data/0") + place, form, value)

    return edit


def _set_end(place: int, value: int) -> Edit:
    return lambda data: put(data, end_of(data) + place, "H", value)


def _large_directory(path: Path, canary: Path) -> None:
    """A directory of more than 1 GiB, that takes no room on the disk."""
    size = (1 << 30) + 1
    with open(path, "wb") as file:
        file.write(b"PK\3\4")
        file.seek(size, io.SEEK_CUR)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 4, 0))


def _rename(old: bytes, new: bytes, times: int = -1) -> Edit:
    return lambda data: data.replace(old, new, times)


def _same_place(data: bytearray) -> None:
    put(data, entry_of(data, b"x/data/0") + 42, "L", _header(data, b"x/data.pkl"))


def _inner_record(data: bytearray) -> bytes:
    """A record inside of the numbers of another."""
    inner = archive({"x/data/0": bytes(24)})[: 30 + len("x/data/0") + 24]
    content = records(checkpoint(tensor()))
    whole = bytearray(archive({"x/data/1": inner, **content}))
    at = whole.index(b"x/data/0") - 30
    put(whole, entry_of(whole, b"x/data/0") + 42, "L", at)
    return whole


def _set_entry(place: int, value: int, name: bytes = b"x/data/0") -> Edit:
    return lambda data: put(data, entry_of(data, name) + place, "H", value)


def _long_names(data: bytearray) -> bytes:
    """A directory that has room for one more entry, but not for its name."""
    whole = bytearray(archive({**HONEST, "x/" + "a" * 99: b""}))
    put(whole, end_of(whole) + 8, "HH", 6, 6)
    return whole


def _large_pickle(path: Path, canary: Path) -> None:
    """A pickle of more than 1 GiB, that takes no room on the disk."""
    content = records(b"")
    size = (1 << 30) + 1
    with open(path, "wb") as file:
        header = bytearray(archive({"x/data.pkl": b""}))
        entry = header[40:-22]
        del header[40:]
        put(header, 18, "LL", size, size)
        put(entry, 20, "LL", size, size)
        file.write(header)
        file.seek(size, io.SEEK_CUR)
        rest = archive({name: data for name, data in content.items() if name != "x/data.pkl"})
        start = struct.unpack_from("<L", rest, len(rest) - 22 + 16)[0]
        directory = bytearray(rest[start:-22])
        base = file.tell()
        at = 0
        while at < len(directory):
            offset = struct.unpack_from("<L", directory, at + 42)[0]
            put(directory, at + 42, "L", offset + base)
            at += 46 + struct.unpack_from("<H", directory, at + 28)[0]
        file.write(rest[:start])
        place = file.tell()
        file.write(entry + directory)
        length = len(entry) + len(directory)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 4, 4, length, place, 0))


HONEST = records(checkpoint(tensor()))
_NO_END = "end record of a zip archive"

#: Tricks in the zip format: name -> (maker, reason).
ZIPS: dict[str, tuple[Maker, str]] = {
    "two directories": (edited(_two_directories), "between its records and its directory"),
    "two pickles": (made({**HONEST, "y/data.pkl": b""}), "found 2 of these"),
    "two folders": (made({**HONEST, "y/version": b"3"}), "in one folder"),
    "no folder": (made({**HONEST, "data.pkl": b""}), "in one folder"),
    "same name twice": (
        edited(lambda d: archive({**HONEST, "y/data/0": b""}).replace(b"y/", b"x/")),
        "two records are named 'x/data/0'",
    ),
    "other name in the header": (edited(_rename(b"x/data/0", b"x/data/1", 1)), "another name"),
    "compressed": (made({**HONEST, "x/data/0": bytes(1 << 24)}, 8), "is compressed"),
    "compressed in its header": (
        edited(lambda d: put(d, _header(d, b"x/data/0") + 8, "H", 8)),
        "not as in the directory",
    ),
    "encrypted": (edited(_set_flags(1)), "encrypted"),
    "comment": (edited(_comment(b"comment")), _NO_END),
    "end in the comment": (
        edited(lambda d: _comment(bytes(d[-22:]))(d)),
        "does not end where its end record begins",
    ),
    "suffix": (edited(lambda d: d + b"\0"), _NO_END),
    "prefix": (edited(lambda d: b"#!/bin/sh\n" + d), "not a file of torch.save"),
    "prefix that looks like a record": (edited(_prefixed), "behind a gap"),
    "two archives": (edited(lambda d: d + d), "does not end where its end record begins"),
    "hidden record": (edited(_hidden_record), "behind a gap"),
    "two records at one place": (edited(_same_place), "another record"),
    "record in a record": (edited(_inner_record), "another record"),
    "too long for both": (
        edited(set_sizes(b"x/data/0", (40, 40), (40, 40))),
        "another record",
    ),
    "too long for the directory": (
        edited(set_sizes(b"x/data/0", (40, 40), None)),
        "another size",
    ),
    "two sizes": (edited(set_sizes(b"x/data/0", (24, 40), None)), "two sizes"),
    "beyond the file": (
        edited(set_sizes(b"x/version", (2**31, 2**31), (2**31, 2**31))),
        "does not end before the directory",
    ),
    "entry of no record": (edited(_set_entry(2, 0)), "damaged entry"),
    "entry with a comment": (edited(_set_entry(32, 1)), "one with a comment"),
    "entry on another disk": (edited(_set_entry(34, 1)), "damaged entry"),
    "entry that ends late": (edited(_set_entry(30, 9, b"x/version")), "shorter than it says"),
    "long names": (edited(_long_names), "shorter than it says"),
    "more records than it has": (
        edited(lambda d: put(d, end_of(d) + 8, "HH", 0xFFFF, 0xFFFF)),
        "for 65535 records",
    ),
    "fewer records than it has": (
        edited(lambda d: put(d, end_of(d) + 8, "HH", 2, 2)),
        "longer than it says",
    ),
    "on two disks": (edited(_set_end(4, 1)), "other disks"),
    "directory on another disk": (edited(_set_end(6, 1)), "other disks"),
    "records on another disk": (edited(_set_end(8, 3)), "other disks"),
    "comment that is not there": (edited(_set_end(20, 1)), "has a comment"),
    "large directory": (_large_directory, "directory of 1073741825 bytes"),
    "header of no record": (edited(_set_header((2, "H", 0))), "is damaged"),
    "other flags in the header": (edited(_set_header((6, "H", 8))), "not as in the directory"),
    "shorter name in the header": (
        edited(_set_header((26, "H", 6), (28, "H", 2))),
        "another name",
    ),
    "other size in the header": (edited(_set_header((18, "L", 25))), "another size"),
    "other whole size in the header": (edited(_set_header((22, "L", 25))), "another size"),
    "start alone": (edited(lambda d: d[:4]), _NO_END),
    "absolute name": (edited(_rename(b"x/data/0", b"/x/data0")), "is named '/x/data0'"),
    "name that goes up": (edited(_rename(b"x/data/0", b"x/../d/0")), "is named 'x/../d/0'"),
    "name with a zero": (edited(_rename(b"x/data/0", b"x/data\0001")), "is named"),
    "name with a backslash": (edited(_rename(b"x/data/0", b"x\\data/0")), "is named"),
    "name that is no text": (edited(_rename(b"x/data/0", b"x/data/\xff")), "no text"),
    "large pickle": (_large_pickle, "data.pkl has 1073741825 bytes"),
    "truncated": (edited(lambda d: d[:200]), _NO_END),
}
