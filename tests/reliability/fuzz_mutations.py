"""Mutations for what is fuzzed beside banks: bytes, JSON, texts, zip archives and pickles.

They build on those of the banks' tests (``tests.bank.mutations``).
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Sequence
from random import Random

from tests.bank.mutations import mutated_bytes, mutated_json, mutated_safetensors

#: What stands in texts and names where something else is expected.
WORDS = [
    "", " ", "a\0b", "\u202egnp", "é", "\ufeff", "a\nb", "x" * 70_000, "../../x", "/etc/passwd",
    "~", "NaN", "-1", "1e999", "9" * 400, "null", "true", "[]", "{}", "model.safetensors", "*",
    "%s", "{0.__class__}", "{{ 7*7 }}", "{% for i in range(10**9) %}x{% endfor %}", "<|endoftext|>",
    "$(touch x)", "`touch x`", "\\", "\\1", "(", ")", "|", "😀" * 500,
]  # fmt: skip
_INTEGERS = [0, 1, 2**7, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
#: Bytes that are no UTF-8: a lone surrogate, one too long, half of a character.
_NO_UTF8 = [b"\xed\xa0\x80", b"\xc0\x80", b"\xff\xfe", b"\xe2\x82", b"\xf4\x90\x80\x80"]


def anywhere(random: Random, data: bytes) -> bytes:
    """Bytes with some changed anywhere in them: flips, integers, parts that change places."""
    out = bytearray(data)
    for _ in range(random.randint(1, 3)):
        if not out:
            return random.randbytes(random.randint(1, 99))
        at, size = random.randrange(len(out)), random.randint(1, 64)
        kind = random.choice(["near", "flip", "integer", "swap", "twice", "drop", "text", "cut"])
        if kind == "near":
            out = bytearray(mutated_bytes(random, bytes(out)))
        elif kind == "flip":
            out[at] = random.randrange(256)
        elif kind == "integer":
            packed = struct.pack(random.choice("<>") + "Q", random.choice(_INTEGERS))
            packed = packed[: random.choice([2, 4, 8])]
            out[at : at + len(packed)] = packed
        elif kind == "swap":
            other = random.randrange(len(out))
            first, second = sorted((at, other))
            size = min(size, second - first)
            part = out[first : first + size]
            out[first : first + size] = out[second : second + size]
            out[second : second + size] = part
        elif kind == "twice":
            out[at:at] = out[at : at + size] * random.choice([1, 2, 500])
        elif kind == "drop":
            del out[at : at + size]
        elif kind == "text":
            out[at:at] = random.choice(_NO_UTF8)
        else:
            del out[at:]
    return bytes(out)


def as_json(random: Random, data: bytes) -> bytes:
    """A JSON file with its structure changed, or its bytes."""
    if random.random() < 0.25:
        return anywhere(random, data)
    return mutated_json(random, data.decode()).encode("utf-8", "surrogatepass")


def as_safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with its header, its numbers or its bytes changed."""
    return anywhere(random, data) if random.random() < 0.2 else mutated_safetensors(random, data)


def as_lines(random: Random, data: bytes) -> bytes:
    """A file of lines with a line changed, moved, or gone, or its bytes changed."""
    lines = data.splitlines(keepends=True)
    kind = random.choice(["bytes", "line", "line", "word", "move", "drop", "twice", "join"])
    if kind == "bytes" or not lines:
        return anywhere(random, data)
    at = random.randrange(len(lines))
    if kind == "line":
        try:
            lines[at] = as_json(random, lines[at].strip()) + b"\n"
        except (ValueError, RecursionError):
            lines[at] = anywhere(random, lines[at])
    elif kind == "word":
        word = random.choice(WORDS).encode("utf-8", "surrogatepass")
        lines.insert(at, word + random.choice([b"\n", b"\r\n", b"\r", b""]))
    elif kind == "move":
        random.shuffle(lines)
    elif kind == "drop":
        del lines[at]
    elif kind == "twice":
        lines[at:at] = lines * random.choice([1, 3])
    else:
        lines[at] = lines[at].strip() * random.choice([1, 2, 300])
    return b"".join(lines)


def as_zip(random: Random, data: bytes) -> bytes:
    """An archive with its entries changed, or the bytes of its structure."""
    if random.random() < 0.5:
        ends = [data.rfind(mark) for mark in (b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04")]
        at = max(0, random.choice(ends)) + random.randrange(46)
        out = bytearray(data)
        packed = struct.pack("<Q", random.choice(_INTEGERS))[: random.choice([1, 2, 4])]
        out[at : at + len(packed)] = packed
        return bytes(out) if out != data else anywhere(random, data)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        entries = [(info.filename, file.read(info)) for info in file.infolist()]
    at = random.randrange(len(entries))
    name, content = entries[at]
    kind = random.choice(["content", "content", "name", "drop", "twice", "order", "new", "packed"])
    if kind == "content":
        entries[at] = (name, anywhere(random, content))
    elif kind == "name":
        entries[at] = (random.choice([name + "x", "../" + name, "/" + name, *WORDS[4:11]]), content)
    elif kind == "drop":
        del entries[at]
    elif kind == "twice":
        entries.insert(random.randint(0, len(entries)), (name, anywhere(random, content)))
    elif kind == "order":
        random.shuffle(entries)
    elif kind == "new":
        entries.append((name.rpartition("/")[0] + "/" + random.choice(WORDS[:12]), b"x"))
    method = random.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]) if kind == "packed" else 0
    return zip_of(entries, method)


def zip_of(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of these entries, which may repeat a name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in entries:
            info = zipfile.ZipInfo("x")
            info.filename = name.replace("\0", "")[:9000] or "x"
            file.writestr(info, content, method)
    return out.getvalue()


def in_zip(random: Random, data: bytes, name: str, calls: Sequence[bytes] = ()) -> bytes:
    """An archive in which the pickle that ends with ``name`` is changed, and nothing else."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        entries = [(info.filename, file.read(info)) for info in file.infolist()]
    return zip_of(
        [
            (one, as_pickle(random, content, calls) if one.endswith(name) else content)
            for one, content in entries
        ]
    )


def as_pickle(random: Random, data: bytes, calls: Sequence[bytes] = ()) -> bytes:
    """A pickle with opcodes put in, taken out or changed; ``calls`` are some to put in."""
    out = bytearray(data)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(max(1, len(out)))
        kind = random.choice(["opcode", "insert", "name", "bytes", "deep"])
        if kind == "opcode" and out:
            out[at] = random.choice(_OPCODES)
        elif kind == "insert":
            out[at:at] = bytes(random.choices(_OPCODES, k=random.randint(1, 4)))
        elif kind == "name":
            out[at:at] = random.choice([*_CALLS, *calls])
        elif kind == "deep":
            out[at:at] = random.choice([b"]", b"}", b"(", b")\x85", b"h\x00h\x00\x86"]) * 3000
        else:
            out = bytearray(anywhere(random, bytes(out)))
    return bytes(out)


_OPCODES = bytes(range(0x28, 0x7E)) + bytes(range(0x80, 0x98))
#: Pickles within a pickle that would do something.
_CALLS = [
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cposix\nsystem\nX\x02\x00\x00\x00id\x85R",
    b"c__builtin__\nexec\n", b"ctorch\nload\n", b"cbuiltins\ngetattr\n", b"(ios\nsystem\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n)R", b"\x8c\x02os\x8c\x06",
    b"csubprocess\nPopen\n", b"cbuiltins\nbytearray\n\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85R",
]  # fmt: skip
