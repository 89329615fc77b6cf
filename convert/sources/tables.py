"""JSON objects in files of strangers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_hiermem.bank.files import read_text
from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import shown


def read_table(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in the file ``path`` of at most ``limit`` bytes.

    Raises:
        FormatError: it cannot be read, is no object, or has a key twice.
    """
    return parse_table(str(path), read_text(path.parent, path.name, limit))


def parse_table(
    where: str, text: str | bytes, entry: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any]:
    """The JSON object that ``text`` is.

    Args:
        where: for messages.
        entry: what to make of each object in it as soon as it is read (of the outer one too).

    Raises:
        FormatError: it is no object, or has a key twice.
    """

    def no_repeats(pairs: list[tuple[str, Any]]) -> Any:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise FormatError(f"{where}: the key {shown(key)} appears twice")
                seen.add(key)
        return table if entry is None else entry(table)

    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        table = json.loads(text, object_pairs_hook=no_repeats)
    except (ValueError, RecursionError):
        raise FormatError(f"{where}: not valid JSON") from None
    if not isinstance(table, dict):
        raise FormatError(f"{where}: not a JSON object")
    return table
