"""The figures of long runs, put into docs/reliability.md.

``python -m tests.reliability.page FILE...``: files of ``--figures``, as `make soak` and `make fuzz`
write them. A table stands between the marks of its group, the first word of the names in it, with
the rows of all files that have some; what no file has stays as it was.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_MARKED = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def filled(page: str, runs: Iterable[Mapping[str, Any]]) -> str:
    """The page with the tables of some runs."""
    # By group, and by what is said of the run: of the same commit and machine there is one table.
    tables: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        about = _about(run)
        for row in run["rows"]:
            group, _, name = row["name"].partition(".")
            cells = (name or group, row["value"], row["detail"])
            lines = tables.setdefault(group, {}).setdefault(about, [])
            lines.append("| " + " | ".join(map(str, cells)) + " |")

    def put(match: re.Match[str]) -> str:
        begin, group, end = match.groups()
        if group not in tables:
            return match[0]
        return begin + "".join(_table(*one) for one in tables[group].items()) + end

    return _MARKED.sub(put, page)


def _about(run: Mapping[str, Any]) -> str:
    machine, share = run["machine"], run["share"]
    length = "in full length" if share == 1 else f"at {share:g} of the full length"
    return (
        f"{machine['cores']} cores, Python {machine['python']}, MLX {machine['mlx']} "
        f"({machine['backend']}), commit {run['commit']}, {length}:"
    )


def _table(about: str, lines: list[str]) -> str:
    return "\n".join([about, "", "| | | |", "|---|---|---|", *lines, "", ""])


def main(argv: list[str] | None = None) -> int:
    """Fill the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.page")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    files = parser.parse_args(argv).files
    PAGE.write_text(filled(PAGE.read_text(), [json.loads(file.read_text()) for file in files]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
