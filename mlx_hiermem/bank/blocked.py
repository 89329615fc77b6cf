"""blocked.json: the blocks of a bank that are switched off, in a form that lasts."""

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


def read_blocked(
    folder: Path, config: MemoryConfig, name: str | None
) -> frozenset[tuple[int, int]]:
    """The pairs (level, cluster) of the file ``name`` of ``folder``; None: there are none.

    Raises:
        FormatError: it is not what docs/format.md says, or names blocks that do not exist.
    """
    if name is None:
        return frozenset()
    path = folder / BLOCKED

    def wrong(found: str) -> FormatError:
        return FormatError(f"{path}: {found}; download the bank again, or block the blocks anew")

    try:
        table: Any = json.loads(read_text(folder, name, limit=1 << 24))
    except (ValueError, RecursionError) as error:
        raise wrong(f"not valid JSON ({str(error)[:80]})") from None
    if not isinstance(table, dict) or set(table) != {"blocked"}:
        raise wrong("expected an object with exactly blocked")
    if not isinstance(table["blocked"], list):
        raise wrong("blocked is not a list")
    try:
        return frozenset(check_block(config, pair) for pair in table["blocked"])
    except PathError as error:
        raise wrong(str(error)) from None


def blocked_bytes(pairs: Iterable[tuple[int, int]]) -> bytes:
    """The file for these pairs."""
    return (json.dumps({"blocked": sorted(map(list, set(pairs)))}) + "\n").encode()
