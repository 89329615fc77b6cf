"""blocked.json: the blocks of a bank that are switched off or removed, in a form that lasts.

A blocked block is there, and reads as zeros until it is unblocked. A removed one is gone: its bytes
in the level file are zeros, and no list brings them back (``remove``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config import MemoryConfig
from ..errors import FormatError, PathError
from .address import check_block
from .files import read_text

BLOCKED = "blocked.json"

#: Most bytes of the file: no reader takes more.
MOST_BYTES = 1 << 24

Pair = tuple[int, int]


class BlockedBlocks(frozenset[Pair]):
    """The blocked blocks of a bank, as pairs (level, cluster).

    Attributes:
        removed: the pairs of those whose numbers are gone; none of them is blocked too.
    """

    removed: frozenset[Pair]

    def __new__(cls, blocked: Iterable[Pair] = (), removed: Iterable[Pair] = ()) -> BlockedBlocks:
        gone = frozenset(removed)
        made = super().__new__(cls, (pair for pair in blocked if pair not in gone))
        made.removed = gone
        return made


def read_blocked(folder: Path, config: MemoryConfig, name: str | None) -> BlockedBlocks:
    """What the file ``name`` of ``folder`` lists; None: there is no such file.

    Raises:
        FormatError: it is not what docs/format.md says, or names blocks that do not exist.
    """
    if name is None:
        return BlockedBlocks()
    path = folder / BLOCKED

    def wrong(found: str) -> FormatError:
        return FormatError(f"{path}: {found}; download the bank again, or block the blocks anew")

    try:
        table: Any = json.loads(read_text(folder, name, limit=MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise wrong(f"not valid JSON ({str(error)[:80]})") from None
    if not isinstance(table, dict) or set(table) not in ({"blocked"}, {"blocked", "removed"}):
        raise wrong("expected an object with exactly blocked, or with blocked and removed")
    lists = {}
    for key, pairs in table.items():
        if not isinstance(pairs, list):
            raise wrong(f"{key} is not a list")
        try:
            lists[key] = frozenset(check_block(config, pair) for pair in pairs)
        except PathError as error:
            raise wrong(str(error)) from None
    if both := lists["blocked"] & lists.get("removed", frozenset()):
        level, cluster = min(both)
        raise wrong(f"block {cluster} of level {level} is both blocked and removed")
    return BlockedBlocks(**lists)


def blocked_bytes(blocked: BlockedBlocks) -> bytes:
    """The file. Without removed blocks it is what it was before there could be any."""
    table = {"blocked": sorted(map(list, blocked))}
    if blocked.removed:
        table["removed"] = sorted(map(list, blocked.removed))
    return (json.dumps(table) + "\n").encode()


def show_blocks(pairs: Iterable[Pair], most: int = 3) -> str:
    """Blocks as the commands take them, for a line of text: "1:3, 2:40 and 7 more"."""
    found = sorted(pairs)
    more = f" and {len(found) - most:,} more" if len(found) > most else ""
    return ", ".join(f"{level}:{cluster}" for level, cluster in found[:most]) + more


def removed_error(folder: Path, level: int, cluster: int) -> PathError:
    """The error for who wants a removed block back."""
    return PathError(
        f"{folder}: block {cluster} of level {level} was removed: its numbers are gone, and there "
        "is nothing to switch on; get it from a copy of the bank, or train it again"
    )
