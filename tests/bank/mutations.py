"""Mutations of bank files for the fuzz test, and the one thing that may come of them.

- `mutated` makes a file that is not what it was: its bytes, its JSON or its header changed;
- `reseal` makes the manifest, and the checksums of blocks, agree with it again, as somebody
  would who changes a file on purpose;
- `refusing` lets a clear error pass, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from mlx_hiermem.errors import HierMemError

#: An error is a line to be read, not a dump.
LONGEST = 500
#: What looking at a tiny bank may take beyond what the process had before, whatever its files say.
MOST_MEMORY = 200 * 2**20


# ---- JSON that keeps repeats and may hold any text -------------------------------------


class Raw(str):
    """JSON text that is written as it is."""


class Pairs(list):
    """An object: lists [key, value], which may repeat a key."""


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))


def _dump(node: Any) -> str:
    if isinstance(node, Raw):
        return node
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{_dump(key)}: {_dump(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(_dump, node)) + "]"
    return json.dumps(node)


def _places(node: Any) -> Iterator[tuple[list, int]]:
    """Every value below ``node``, as a list and the place in it."""
    if isinstance(node, list):
        for number, item in enumerate(node):
            place = (item, 1) if isinstance(node, Pairs) else (node, number)
            yield place
            yield from _places(place[0][place[1]])


def _containers(node: Any) -> Iterator[list]:
    if isinstance(node, list):
        yield node
        for item in node:
            yield from _containers(item[1] if isinstance(node, Pairs) else item)


_NUMBERS = [
    0, 1, 2, 3, -1, 255, 4096, 2**31 - 1, 2**31, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63,
    2**64 - 1, 2**64, -(2**63), 10**30, 10**4000,
]  # fmt: skip
_NAMES = [
    "", "a\0b", "\ud800", "é", "\u202egnp", "a\nb", "../x", "/etc/passwd", "..", ".", "a/../../b",
    "x" * 5000, "a\\b", "~", "level-1-00000-of-00001.safetensors", "config.json", "manifest.json",
    "F32", "F16", "BF16", "U8", "F64", "I64", "BOOL", "F8_E4M3", "float32", "uint8", "affine",
    "mxfp4", "nvfp4", "mxfp8", "bert", "embeddings", "1", "0" * 64,
]  # fmt: skip
_TEXTS = [
    "null", "true", "false", "NaN", "Infinity", "-Infinity", "1e999", "1.0", "1.5", "-0", "2e0",
    "1" + "0" * 5000, "[]", "{}", "[[]]", '{"a":' * 400 + "1" + "}" * 400, "[" * 100_000,
    "[" + "0," * 30_000 + "0]", "[" + "1," * 70 + "1]", '"' + "\\u0000" * 600 + '"',
    '"\\ud800\\ud800"', "'x'", "",
    '{"bits": 4, "group_size": 32}', '{"mode": "affine", "bits": 4, "group_size": 1}',
    '{"mode": "nvfp4", "bits": 8, "group_size": 16}', '{"mode": "mxfp8", "bits": true}',
    '{"mode": [], "bits": {}, "group_size": null}', '{"bits": 1e9, "group_size": 0, "x": 1}',
]  # fmt: skip


def _value(random: Random) -> Any:
    """Anything that JSON can say, and some that it cannot."""
    kind = random.randrange(7)
    if kind == 0:
        return random.choice(_NAMES)
    if kind == 1:
        depth = random.randint(850, 1000)  # as deep as Python's own limit, and a little more
        return random.choice([random.random(), True, Raw("[" * depth + "]" * depth)])
    if kind == 2:
        return random.randint(-3, 300)
    return random.choice(_NUMBERS) if kind < 5 else Raw(random.choice(_TEXTS))


def mutated_json(random: Random, text: str) -> str:
    """The JSON of an object or list with a value, a key or an order changed, once or twice."""
    tree = _parse(text)
    for _ in range(random.randint(1, 2)):
        place, at = random.choice(list(_places(tree)) or [([tree], 0)])
        owner = random.choice(list(_containers(tree)))
        pairs = isinstance(owner, Pairs)
        kind = random.choice(["value"] * 5 + ["number", "key", "new", "drop", "repeat", "order"])
        if kind == "value":
            place[at] = _value(random)
        elif kind == "number":
            whole = type(place[at]) is int
            place[at] = place[at] + random.randint(-3, 3) if whole else _value(random)
        elif kind == "new":
            item = _value(random)
            owner.append([random.choice(_NAMES), item] if pairs else item)
        elif not owner:
            continue
        elif kind == "key" and pairs:
            random.choice(owner)[0] = random.choice([*_NAMES, Raw("1"), "level3", "blocks"])
        elif kind == "drop":
            del owner[random.randrange(len(owner))]
        elif kind == "repeat":
            item = random.choice(owner)
            if pairs:
                item = [item[0], random.choice([item[1], _value(random)])]
            owner.insert(random.randint(0, len(owner)), item)
        else:
            random.shuffle(owner)
    return _dump(tree)


def mutated_bytes(random: Random, data: bytes) -> bytes:
    """Bytes with a bit flipped, cut, or with something put in, taken out, or said twice."""
    out = bytearray(data)
    for _ in range(random.randint(1, 3)):
        # Headers and JSON are at the start, and there is where things go wrong.
        at = random.randrange(max(1, min(random.choice([16, 300, len(out)]), len(out))))
        size = random.randint(1, 64)
        kind = random.choice(["bit", "byte", "cut", "insert", "remove", "twice", "fill"])
        if kind == "bit" and out:
            out[at] ^= 1 << random.randrange(8)
        elif kind == "byte" and out:
            out[at] = random.choice(b'\x00\xff"{}[],:-09eE.\\\n\x7f\x80')
        elif kind == "cut":
            del out[at:]
        elif kind == "insert":
            out[at:at] = random.randbytes(size)
        elif kind == "remove":
            del out[at : at + size]
        elif kind == "twice":
            out[at:at] = out[at : at + size]
        else:
            out[at : at + size] = random.choice([b"\0", b"\xff", b" "]) * size
    return bytes(out)


_LENGTHS = [0, 1, 7, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1, 10**8]
# Little-endian: NaN and infinities of float32, bfloat16 and float16, and of 8-bit floats.
_MARKS = [b"\xff" * 4, b"\x80\x7f" * 2, b"\x00\x00\xc0\x7f", b"\x00\x7c", b"\x7f", b"\x80\xff"]


def split(data: bytes) -> tuple[bytes, bytes]:
    """A safetensors file as its header (JSON) and its numbers."""
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def mutated_safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with its header, the length of it, or its numbers changed."""
    header, rest = split(data)
    kind = random.choice(["header"] * 5 + ["length", "numbers", "numbers", "bytes", "padding"])
    if kind == "header":
        length = len(header)
        header = mutated_json(random, header.decode()).encode("utf-8", "surrogatepass")
        if random.random() < 0.5:  # where the numbers start is then as before
            header = header.ljust(length)
    elif kind == "length":
        said = random.choice([*_LENGTHS, max(0, len(header) + random.randint(-9, 9))])
        return said.to_bytes(8, "little") + data[8:]
    elif kind == "numbers":
        numbers = bytearray(rest)
        for _ in range(random.randint(1, 3)):
            mark = random.choice(_MARKS)
            at = random.randrange(len(rest) // 4) * 4
            numbers[at : at + len(mark)] = mark
        rest = bytes(numbers)
    elif kind == "padding":
        header = header.rstrip() + b" " * random.randint(0, 9000)
    else:
        return mutated_bytes(random, data)
    return len(header).to_bytes(8, "little") + header + rest


def mutated(random: Random, name: str, data: bytes, others: list[bytes]) -> bytes:
    """What the file ``name`` with ``data`` became; ``others`` are files to take it from.

    Never what it was: every example counts.
    """
    while True:
        kind = random.randrange(20)
        if kind == 0 and others:
            found = random.choice(others)
        elif not name.endswith(".json"):
            found = mutated_safetensors(random, data)
        elif kind < 6:
            found = mutated_bytes(random, data)
        else:
            found = mutated_json(random, data.decode()).encode("utf-8", "surrogatepass")
        if found != data:
            return found


# ---- an attacker who knows the format --------------------------------------------------


def reseal(folder: Path, names: list[str]) -> None:
    """Make size, sha256 and revision in the manifest agree with the files ``names``."""
    path = folder / "manifest.json"
    try:
        table = json.loads(path.read_text())
        for name in names:
            data = (folder / name).read_bytes()
            entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            table["files"][name] = entry
        lines = [f"{entry['sha256']}  {name}\n" for name, entry in sorted(table["files"].items())]
        table["revision"] = hashlib.sha256("".join(lines).encode()).hexdigest()
        path.write_text(json.dumps(table))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # what is there is no manifest any more


def redo_checksums(folder: Path, name: str, rows: list[bytes]) -> None:
    """Put the sha256 of ``rows`` where checksums.safetensors has those of the file ``name``."""
    data = bytearray((folder / "checksums.safetensors").read_bytes())
    header, _ = split(bytes(data))
    found = re.fullmatch(r"level-(\d+)-(\d+)-of-(\d+)\.safetensors", name)
    entry = json.loads(header)[f"level{found[1]}" if found else "generic"]
    first = int(found[2]) * len(rows) if found else 0
    start = 8 + len(header) + entry["data_offsets"][0] + 32 * first
    data[start : start + 32 * len(rows)] = b"".join(hashlib.sha256(row).digest() for row in rows)
    (folder / "checksums.safetensors").write_bytes(data)
    reseal(folder, ["checksums.safetensors"])


# ---- what may come of it ---------------------------------------------------------------


def check_error(error: HierMemError, folder: Path) -> None:
    """One line, not empty, not a dump, and it says where in ``folder``."""
    text = str(error)
    assert text.strip() and text.isprintable(), repr(text)
    assert len(text) < LONGEST, f"{len(text)} characters: {text[:LONGEST]!r}"
    assert str(folder) in text, f"names no file: {text!r}"


@contextmanager
def refusing(folder: Path) -> Iterator[list[HierMemError]]:
    """Lets a clear error about ``folder`` pass: it is in the list then."""
    caught: list[HierMemError] = []
    try:
        yield caught
    except HierMemError as error:
        check_error(error, folder)
        caught.append(error)


def state(folder):
    """Everything in a folder: kind, size, time of the last change, content."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            with open(path, "rb") as file:  # the first megabyte will do for the sparse ones
                content = hashlib.sha256(file.read(1 << 20)).hexdigest()
        else:
            content = ""
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


@contextmanager
def small_memory() -> Iterator[None]:
    """Raise AssertionError where the process grew by more than ``MOST_MEMORY``, be it for a moment.

    What is asked for far beyond that fails at once, so that the machine does not suffer. Linux
    only, where a process can forget its own peak.
    """
    if sys.platform != "linux":
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = _status("VmSize") + 10 * MOST_MEMORY
    if limits[1] == resource.RLIM_INFINITY or most < limits[1]:
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        before = _status("VmHWM")
        yield
        grown = _status("VmHWM") - before
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert grown < MOST_MEMORY, f"took {grown >> 20} MiB"


def _status(name: str) -> int:
    """A size of this process in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024
