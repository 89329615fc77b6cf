"""Names of tensors: without the prefixes of wrappers, and renamed by the user's own table."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from mlx_hiermem.errors import ConfigError, FormatError
from mlx_hiermem.shapes import shown

from .tables import read_table

# DistributedDataParallel, torch.compile, FSDP and activation checkpointing name their child so.
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_LONGEST = 1 << 24
#: Seconds of computing that a key map has for one name, which takes microseconds.
_SECONDS = 3


def clean(names: Iterable[str]) -> dict[str, str]:
    """Each name, and what it is without the parts that wrappers put in.

    Raises:
        FormatError: two names become one, or nothing is left of one.
    """
    cleaned: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in names:
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if not short:
            raise FormatError(f"a tensor is named {shown(name)}: nothing but a wrapper's prefix")
        if (other := seen.setdefault(short, name)) != name:
            raise FormatError(
                f"{shown(other)} and {shown(name)} are both {shown(short)} without the prefixes of "
                "wrappers; save the checkpoint again without one of them"
            )
        cleaned[name] = short
    return cleaned


@dataclass
class KeyMap:
    """New names by regular expressions: the first one that fits a whole name counts.

    Attributes:
        path: where it is from, for messages.
        rules: (expression, replacement); a replacement of None leaves the tensor out.
        unused: expressions that have fitted no name yet.
    """

    path: Path
    rules: list[tuple[re.Pattern[str], str | None]]
    unused: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.unused = [pattern.pattern for pattern, _ in self.rules]

    def apply(self, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """({original: new name}, names that are left out). A name that nothing fits stays.

        Raises:
            ConfigError: two names become one, or a name becomes empty; or an expression takes
                for ever.
        """
        at: list[str] = ["", ""]  # what is being tried, and on which name
        try:
            with _clock() as wind_up:
                return self._apply(names, wind_up, at)
        except _TooLong:
            raise ConfigError(
                f"{self.path}: {shown(at[0])} takes longer than {_SECONDS} seconds on "
                f"{shown(at[1])}; write it without a repeat within a repeat"
            ) from None

    def _apply(
        self, names: Iterable[str], wind_up: Callable[[], object], at: list[str]
    ) -> tuple[dict[str, str], list[str]]:
        renamed: dict[str, str] = {}
        seen: dict[str, str] = {}
        left_out: list[str] = []
        used: set[str] = set()
        for name in names:
            wind_up()
            new: str | None = name
            for pattern, replacement in self.rules:
                at[:] = pattern.pattern, name
                if match := pattern.fullmatch(name):
                    used.add(pattern.pattern)
                    new = None if replacement is None else match.expand(replacement)
                    break
            if new is None:
                left_out.append(name)
                continue
            if not new:
                raise ConfigError(f"{self.path}: gives {shown(name)} an empty name")
            if (other := seen.setdefault(new, name)) != name:
                raise ConfigError(
                    f"{self.path}: gives {shown(other)} and {shown(name)} the same name, "
                    f"{shown(new)}"
                )
            renamed[name] = new
        self.unused = [pattern for pattern in self.unused if pattern not in used]
        return renamed, left_out


class _TooLong(Exception):
    """The time of a name is over."""


@contextmanager
def _clock() -> Iterator[Callable[[], object]]:
    """A clock that raises ``_TooLong`` in what computes for so many seconds after it was wound up.

    A few letters make an expression that would be tried in more ways than anybody can wait for, and
    key maps are handed on. Signals come to the main thread alone; elsewhere nothing is watched.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, ring)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def load_key_map(path: Path) -> KeyMap:
    """Read a key map: a JSON object {regular expression: replacement, or null to leave it out}.

    Raises:
        ConfigError: it is no such object, or an expression or a replacement is not valid.
    """
    try:
        table: Any = read_table(path, _LONGEST)
    except FormatError as error:
        raise ConfigError(f"{error}; expected a JSON object of expression: replacement") from None
    rules: list[tuple[re.Pattern[str], str | None]] = []
    for text, replacement in table.items():
        if replacement is not None and not isinstance(replacement, str):
            raise ConfigError(
                f"{path}: {shown(text)} is mapped to {shown(replacement)}; expected a name or null"
            )
        try:
            pattern = re.compile(text)
            pattern.sub(replacement or "", "")  # reads the replacement, whether it is used or not
        except (re.error, OverflowError, RecursionError, IndexError) as error:
            raise ConfigError(
                f"{path}: {shown(text)}: {shown(replacement)}: not a valid regular expression or "
                f"replacement ({shown(str(error))})"
            ) from None
        rules.append((pattern, replacement))
    return KeyMap(path, rules)
