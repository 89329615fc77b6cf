"""Many names on few lines: ``layers.{0..34}.attention.in_proj.weight``."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])")


def fold(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in whole numbers only, under one pattern.

    Returns:
        Patterns, in the order of their first names, with the names of each.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("{}", name), []).append(name)
    return {_pattern(template, members): members for template, members in groups.items()}


def _pattern(template: str, names: list[str]) -> str:
    columns = list(zip(*(_NUMBER.findall(name) for name in names), strict=True))
    pieces = template.split("{}")
    pattern = pieces[0]
    for column, piece in zip(columns, pieces[1:], strict=True):
        values = sorted({int(value) for value in column})
        span = str(values[0]) if len(values) == 1 else f"{{{values[0]}..{values[-1]}}}"
        if len(values) > 1 and len(values) != values[-1] - values[0] + 1:
            span = f"{{{values[0]}..{values[-1]}: {len(values)}}}"
        pattern += span + piece
    return pattern
