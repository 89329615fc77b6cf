"""Files made to hurt whoever opens them. Those that run code would create the file ``canary``.

Each is checked for the reason that it is refused for, so each is an honest file but for its trick.
"""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Maker = Callable[[Path, Path], None]  # (the file to make, the canary)


class Call:
    """Pickled as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


class Table(OrderedDict):
    """A subclass that would run code when it is filled."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError("code of the file was run")

    @classmethod
    def filled(cls) -> Table:
        """One with an item."""
        table = cls()
        OrderedDict.__setitem__(table, "a", 1)
        return table


class Stateful:
    """Runs code when its state is set."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["canary"]).touch()


def touch(canary: Path) -> str:
    """A command of the shell that leaves the canary."""
    return f"touch {canary}"


def records(data: bytes, numbers: bytes = bytes(range(24))) -> dict[str, bytes]:
    """The records of an honest archive with one storage, around the pickle ``data``."""
    return {
        "x/data.pkl": data,
        "x/byteorder": b"little",
        "x/data/0": numbers,
        "x/version": b"3\n",
    }


def archive(content: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these records."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in content.items():
            file.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def text(value: str) -> bytes:
    """The opcode of a text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    """The opcode of an integer, of any size."""
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def sizes(values: tuple[int, ...]) -> bytes:
    """The opcodes of a tuple of integers."""
    return b"(" + b"".join(map(integer, values)) + b"t"


def storage(key: bytes = text("0"), numel: int = 6, kind: str = "torch\nFloatStorage") -> bytes:
    """The opcodes of a storage."""
    return (
        b"(" + text("storage") + b"c" + kind.encode() + b"\n" + key + text("cpu") + integer(numel)
    ) + b"tQ"


def tensor(
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    offset: int = 0,
    held: bytes | None = None,
    rest: bytes = b"",
) -> bytes:
    """The opcodes of a tensor."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage() if held is None else held)
        + integer(offset)
        + sizes(shape)
        + sizes(strides)
        + b"\x89ccollections\nOrderedDict\n)R"
        + rest
        + b"tR"
    )


def checkpoint(value: bytes, key: bytes = text("w")) -> bytes:
    """The pickle of {"w": value}."""
    return b"\x80\x02}" + key + value + b"s."


def honest() -> bytes:
    """An archive that opens: "w" is (2, 3) in float32."""
    return archive(records(checkpoint(tensor())))


def of_bytes(content: bytes | Callable[[Path], bytes]) -> Maker:
    """A file of these bytes, which may depend on the canary."""

    def make(path: Path, canary: Path) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content(canary))

    return make


def _object(make: Callable[[Path], Any]) -> Maker:
    """An archive whose weights stand beside what ``make`` gives."""

    def content(canary: Path) -> bytes:
        return archive(records(pickle.dumps({"a": make(canary)}, 2)))

    return of_bytes(content)


def of_pickle(data: bytes) -> Maker:
    """An archive with this pickle."""
    return of_bytes(archive(records(data)))


def _nested(depth: int, start: bytes = b")") -> bytes:
    return start + b"\x85" * depth


def _doubled(depth: int) -> bytes:
    """A tuple of two tuples of two tuples ... all the same: 2**depth when it is gone through."""
    return b")" + b"q\x07h\x07\x86" * depth


def _chain(canary: Path) -> Any:
    module = Call(builtins.__import__, "os")
    return Call(_call, Call(getattr, module, "system"), touch(canary))


def _call(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


def _numpy(_: Path) -> Any:
    import numpy as np

    return np.float64(1.0)


def _arguments(_: Path) -> Any:
    import argparse

    return argparse.Namespace(lr=1e-3)


def _partial(canary: Path) -> Any:
    import functools

    return functools.partial(os.system, touch(canary))


def _from_bytes(canary: Path) -> bytes:
    inner = pickle.dumps(Call(os.system, touch(canary)), 2)
    call = b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(inner)) + inner + b"\x85R"
    return archive(records(checkpoint(call)))


#: Pickles that run code, or make what only runs code when it is used: name -> (maker, reason).
CODE: dict[str, tuple[Maker, str]] = {
    "os.system": (_object(lambda c: Call(os.system, touch(c))), "'posix.system'"),
    "eval": (_object(lambda c: Call(eval, f"open({str(c)!r}, 'w')")), "eval'"),
    "exec": (_object(lambda c: Call(exec, f"open({str(c)!r}, 'w')")), "exec'"),
    "open": (_object(lambda c: Call(open, str(c), "w")), "open'"),
    "nested reduce": (
        _object(lambda c: Call(list, (Call(tuple, (Call(os.system, touch(c)),)),))),
        "'__builtin__.list'",
    ),
    "getattr chain": (_object(_chain), "refused"),
    "partial": (_object(_partial), "'functools.partial'"),
    "subclass of OrderedDict": (_object(lambda c: Table.filled()), "Table'"),
    "setstate": (_object(lambda c: Stateful(str(c))), "refused"),
    "load_from_bytes": (of_bytes(_from_bytes), "'torch.storage._load_from_bytes'"),
    "numpy scalar": (_object(_numpy), "numpy.*item"),
    "namespace": (_object(_arguments), "'argparse.Namespace'.*without them"),
    "torch.load itself": (of_pickle(checkpoint(b"ctorch\nload\n")), "'torch.load'"),
    "dotted name": (
        of_pickle(checkpoint(text("torch") + text("_utils.os.system") + b"\x93")),
        "'torch._utils.os.system'",
    ),
    "instance": (of_pickle(checkpoint(b"(ios\nsystem\n")), "damaged"),
    "object": (of_pickle(checkpoint(b"(ctorch\nTensor\no")), "damaged"),
    "extension": (of_pickle(checkpoint(b"\x82\x01")), "damaged"),
    "call of a text": (of_pickle(checkpoint(text("os") + b")R")), "calls something"),
    "call of a dtype": (of_pickle(checkpoint(b"ctorch\nfloat32\n)R")), "calls something"),
    "call with a list": (
        of_pickle(checkpoint(b"ccollections\nOrderedDict\n]R")),
        "calls something",
    ),
    "state of a function": (
        of_pickle(checkpoint(b"ctorch._utils\n_rebuild_tensor_v2\n}b")),
        "sets the state",
    ),
    "items of a tensor": (of_pickle(checkpoint(tensor() + text("a") + b"Ns")), "sets items"),
    "appends to a tensor": (of_pickle(checkpoint(tensor() + b"Na")), "appends"),
}

#: Pickles that use up time, memory or the C stack.
BOMBS: dict[str, tuple[Maker, str]] = {
    "memo index": (of_pickle(b"\x80\x02}r\xff\xff\xff\x7f."), "no tensors"),
    "deep key": (of_pickle(checkpoint(b"N", _nested(2_000_000))), "no tensors"),
    "deep value": (of_pickle(checkpoint(_nested(2_000_000))), "no tensors"),
    "deep lists": (of_pickle(b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b"."), "but a list"),
    "deep top": (of_pickle(b"\x80\x02" + _nested(2_000_000) + b"."), "but a tuple"),
    "deep function": (of_pickle(checkpoint(_nested(2_000_000) + b")R")), "calls something"),
    "doubled key": (of_pickle(checkpoint(b"N", _doubled(60))), "no tensors"),
    "doubled storage key": (
        of_pickle(checkpoint(tensor(held=storage(_doubled(60))))),
        "no storage",
    ),
    "doubled shape": (
        of_pickle(checkpoint(b"ctorch\nSize\n" + _doubled(60) + b"\x85R")),
        "no size",
    ),
    "bytearray": (
        of_pickle(checkpoint(b"c__builtin__\nbytearray\n" + integer(2**50) + b"\x85R")),
        "bytearray'",
    ),
    "bytearray opcode": (
        of_pickle(checkpoint(b"\x96" + struct.pack("<Q", 2**50))),
        "damaged",
    ),
    "long text": (of_pickle(checkpoint(b"\x8d" + struct.pack("<Q", 2**62) + b"a")), "damaged"),
    "long frame": (of_pickle(b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}."), "no tensors"),
    "empty tensor of PyTorch": (
        of_pickle(checkpoint(b"ctorch\nFloatTensor\n" + integer(2**50) + b"\x85R")),
        "'torch.FloatTensor'",
    ),
    "table of pairs": (
        of_pickle(checkpoint(b"ccollections\nOrderedDict\n]" + _nested(9) + b"a\x85R")),
        "unknown way",
    ),
    "no stop": (of_pickle(b"\x80\x02}"), "damaged"),
    "empty pickle": (of_pickle(b""), "damaged"),
}
