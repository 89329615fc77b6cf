"""The tensors of a checkpoint, sorted: those of a memory, those of an anchor, all others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from mlx_hiermem.errors import FormatError, InputError

from ..sources import Source, SourceTensor, open_source
from ..sources.names import KeyMap
from .description import Entry
from .keys import parse

_SUBTREE = re.compile(r"subtree[-_. ]?(\d{1,6})(?!\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Sorted:
    """What a checkpoint holds.

    Attributes:
        memory: tensors of a memory.
        others: all other tensors, by name.
        renamed: names that the key map has changed, old to new.
        left_out: names that the key map or ``--ignore`` has left out.
    """

    memory: Sequence[Entry]
    others: Mapping[str, SourceTensor]
    renamed: Mapping[str, str] = field(default_factory=dict)
    left_out: Sequence[str] = ()


def open_checkpoints(path: Path, stack: ExitStack) -> list[tuple[Source, int | None]]:
    """Open a checkpoint, or one for each level-1 subtree.

    Args:
        path: a file or a folder; or a folder whose entries have ``subtree`` and a number in their
            names: one checkpoint each.
        stack: closes them.

    Returns:
        Sources, each with its subtree; None: it is no part of a bank.

    Raises:
        FormatError: one of them is damaged or unsafe, or two are of the same subtree.
    """
    parts: dict[int, Path] = {}
    try:
        inside = sorted(path.iterdir()) if path.is_dir() else []
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    for one in inside:
        if one.name.startswith(".") or not (found := _SUBTREE.search(one.name)):
            continue
        if one.is_symlink() and not one.resolve().is_relative_to(path.resolve()):
            raise FormatError(
                f"{one}: is a link out of the folder; put the checkpoint itself there"
            )
        if (other := parts.setdefault(int(found[1]), one)) is not one:
            raise FormatError(
                f"{one}: of subtree {int(found[1])}, as {other.name} is; leave one out"
            )
    if parts:
        return [(stack.enter_context(open_source(one)), n) for n, one in sorted(parts.items())]
    found = _SUBTREE.search(path.name)
    number = int(found[1]) if found else None
    return [(stack.enter_context(open_source(path)), number)]


def sort_tensors(
    sources: Iterable[tuple[Source, int | None]],
    key_map: KeyMap | None = None,
    ignore: str | None = None,
) -> Sorted:
    """Sort the tensors of checkpoints by their names.

    Args:
        key_map: renames before anything else looks at a name.
        ignore: a regular expression; names that it fits as a whole are left out.

    Raises:
        FormatError: two tensors get the same name.
        InputError: ``ignore`` is no regular expression.
    """
    leave = _pattern(ignore)
    memory: list[Entry] = []
    others: dict[str, SourceTensor] = {}
    renamed: dict[str, str] = {}
    left_out: list[str] = []
    for source, subtree in sources:
        names = {name: name for name in source.tensors}
        if key_map is not None:
            names, left = key_map.apply(list(names))
            left_out += left
            renamed |= {old: new for old, new in names.items() if old != new}
        for old, new in names.items():
            if leave(new) or leave(old):
                left_out.append(old)
            elif (place := parse(new)) is not None:
                memory.append(Entry(place, source.tensors[old], subtree))
            else:
                # The anchor's weights in each subtree's checkpoint are copies of one another.
                others.setdefault(new, source.tensors[old])
    return Sorted(memory, others, renamed, left_out)


def _pattern(text: str | None) -> Callable[[str], bool]:
    if text is None:
        return lambda name: False
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise InputError(f"--ignore {text[:80]!r}: no regular expression ({error})") from None
    return lambda name: pattern.fullmatch(name) is not None
