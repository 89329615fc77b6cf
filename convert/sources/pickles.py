"""Reading pickles of strangers without running any of them.

A pickle is a program. Here it may name only what is on a list, and each name on it stands for a
stand-in of ours: no class of PyTorch or of anybody else is made, and nothing is imported.
Notable: ``torch.load(weights_only=True)`` is safe from code, but not from files made to hurt: a
key of a million nested tuples ends the process (their hash overflows the C stack), and thirty
tuples that each hold the one before twice keep it busy for hours. So only text, numbers and the
keys of DCP can be keys here, and nothing out of the file is compared, hashed or printed before
its type is known. What a file can cost is memory in proportion to the length of its pickle.
"""

from __future__ import annotations

import io
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_hiermem.shapes import shown

#: Longest pickle that is read, in bytes.
MAX_PICKLE = 1 << 30


class Refused(Exception):
    """A pickle that is not read. Its text says why: what follows the name of the file."""


@dataclass(frozen=True)
class Name:
    """What stands for a class, function or constant that a pickle names.

    Attributes:
        text: the name.
        call: what stands for calling it; None: it cannot be called.
    """

    text: str
    call: Callable[..., Any] | None = None


class Ignored:
    """Stands for an object that nothing is wanted of."""

    def __init__(self, *_: Any) -> None:
        pass


class Built(ABC):
    """Stands for an object whose fields are wanted: ``take`` gets its state."""

    @abstractmethod
    def take(self, state: Any) -> None:
        """Check and keep the fields.

        Raises:
            Refused: they are not as expected.
        """


# What torch.save (protocol 2) and DCP (the protocol of the Python that wrote it: 4 or 5) write.
# Left out on purpose: persistent ids as text, INST, OBJ, EXT, sets, bytearrays (which reserve
# what they claim to be long), numbers as text and LONG4 (whose digits take quadratic time).
_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 "
    "TUPLE3 EMPTY_LIST EMPTY_DICT GLOBAL STACK_GLOBAL BINPERSID"
).split()


class _Unpickler(pickle._Unpickler):
    """The one of the standard library that is written in Python, where each step can be replaced.

    That its memo is a dictionary matters too: in C it is an array as long as the largest index.
    """

    def __init__(
        self,
        data: bytes,
        find: Callable[[str], Name],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(io.BytesIO(data), fix_imports=False, encoding="utf-8", errors="replace")
        self._find = find
        self._persistent = persistent

    # What the stub of the standard library does not tell of.
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in _OPCODES)
    }

    def find_class(self, module: str, name: str) -> Name:
        return self._find(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise Refused("refers to objects outside of the file")
        return self._persistent(pid)

    def _call(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if type(function) is not Name or function.call is None or type(arguments) is not tuple:
            raise Refused("calls something that is no class of a checkpoint")
        self.stack.append(function.call(*arguments))

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Built):
            target.take(state)
        elif type(target) not in (dict, Ignored):  # an OrderedDict may have attributes: not wanted
            raise Refused("sets the state of something that is no class of a checkpoint")

    def _set(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if type(table) is not dict:
            raise Refused("sets items of something that is no dictionary")
        for number in range(0, len(items), 2):
            key, value = items[number : number + 2]
            # Other keys (of an optimizer, say) name no weights. Large integers may share a hash.
            if type(key) is str or isinstance(key, Built) or type(key) is int and key >> 60 == 0:
                table[key] = value

    def _set_one(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._set(items)

    def _set_many(self) -> None:
        self._set(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("appends to something that is no list")
        self.stack[-1].extend(items)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _append_many(self) -> None:
        self._extend(self.pop_mark())

    dispatch |= {
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_one,
        pickle.SETITEMS[0]: _set_many,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _append_many,
    }


def read_pickle(
    data: bytes,
    names: Mapping[str, Name],
    advice: Callable[[str], str] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """What the pickle ``data`` holds, made of stand-ins.

    Args:
        names: what it may name.
        advice: what to say of a name that is not among them.
        persistent: stands for what lies outside of the pickle (the storages of torch.save).

    Returns:
        dict, list, tuple, str, bytes, int, float, bool, None, and what ``names`` makes. Nothing
        in it may be compared, hashed or printed before its type is known.

    Raises:
        Refused: it names something else, or is damaged.
    """

    def find(text: str) -> Name:
        if text in names:
            return names[text]
        said = advice(text) if advice is not None else ""
        raise Refused(f"its pickle names {shown(text)}, which is refused{said}")

    try:
        return _Unpickler(data, find, persistent).load()
    except Refused:
        raise
    except (EOFError, pickle.UnpicklingError) as error:
        raise Refused(f"its pickle is damaged ({shown(str(error))})") from None
    except Exception as error:  # anything can go wrong in a pickle; its text may be endless
        raise Refused(f"its pickle is damaged ({type(error).__name__})") from None
