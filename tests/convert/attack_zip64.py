"""Archives of torch.save with tricks in what zip has for sizes of more than 32 bits."""

from __future__ import annotations

import struct

from .attack_zips import Edit, edited, end_of, entry_of, put, set_sizes
from .attacks import Maker


def zip64_end(data: bytes, change: tuple[int, str, int] | None = None) -> bytes:
    """With a zip64 end record and its locator; one field (place, form, value) of them changed."""
    end = end_of(data)
    _, _, _, here, count, length, start, _ = struct.unpack_from("<4s4H2LH", data, end)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, here, count, length, start)
    added = bytearray(record + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
    if change is not None:
        put(added, *change)
    return data[:end] + added + data[end:]


def _zip64(place: int, form: str, value: int) -> Maker:
    return edited(lambda data: zip64_end(bytes(data), (place, form, value)))


def _zip64_field(extra: bytes) -> Edit:
    """Where the entry asks for one value of 64 bits: this field."""

    def edit(data: bytearray) -> None:
        at = entry_of(data, b"x/data/0")
        put(data, at + 20, "L", 0xFFFFFFFF)
        put(data, at + 30, "H", len(extra))
        name = at + 46 + len("x/data/0")
        data[name:name] = extra
        end = end_of(data)
        length = struct.unpack_from("<L", data, end + 12)[0]
        put(data, end + 12, "L", length + len(extra))

    return edit


#: name -> (maker, reason)
ZIP64: dict[str, tuple[Maker, str]] = {
    "zip64 without a field": (
        edited(set_sizes(b"x/data/0", (2**32 - 1, 2**32 - 1), None)),
        "lacks its zip64 field",
    ),
    "zip64 field of another size": (
        edited(_zip64_field(struct.pack("<2H2Q", 1, 16, 24, 24))),
        "zip64 field",
    ),
    "zip64 field twice": (
        edited(_zip64_field(struct.pack("<2HQ", 1, 8, 24) * 2)),
        "zip64 field",
    ),
    "zip64 field that ends early": (
        edited(_zip64_field(struct.pack("<2HL", 1, 8, 24))),
        "zip64 field",
    ),
    "zip64 directory elsewhere": (_zip64(48, "Q", 0), "contradict each other"),
    "zip64 directory of another size": (_zip64(40, "Q", 0), "contradict each other"),
    "zip64 count of another size": (_zip64(24, "Q", 9), "other disks"),
    "zip64 locator to nowhere": (_zip64(64, "Q", 2**63), "not where it should be"),
    "zip64 end of no record": (_zip64(2, "H", 0), "not where it should be"),
    "zip64 end of another length": (_zip64(4, "Q", 45), "not where it should be"),
    "zip64 end on another disk": (_zip64(16, "L", 1), "other disks"),
    "zip64 directory on another disk": (_zip64(20, "L", 1), "other disks"),
    "zip64 locator to another disk": (_zip64(60, "L", 1), "other disks"),
    "zip64 locator of two disks": (_zip64(72, "L", 2), "other disks"),
}
