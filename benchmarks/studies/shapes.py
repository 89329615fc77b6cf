"""Other trees: children k and levels p, at one fetch size.

``python -m benchmarks.studies.shapes``. The paper takes k = 16 and
p = 4 and tries no other. Here k is 4, 8, 16 or 32 and p from 1 to 4, as far as there are at most
1,024 leaves (there are 8,710 facts); the rank is shared out evenly over the levels. Rows, for k-p:
``shapes.landed@k-p``, ``shapes.facts@k-p`` and ``shapes.perplexity@k-p``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..harness import Row, main
from .agreement import landed
from .training import report, runs
from .training.report import FACTS, Curve, Line
from .training.runs import RATE, STEPS
from .training.task import Task

NAME = "shapes"

RANK, LEAVES = 24, 1024


def shapes() -> list[tuple[int, int]]:
    """All (k, p)."""
    return [(k, p) for k in (4, 8, 16, 32) for p in range(1, 5) if k**p <= LEAVES]


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    tasks = [
        Task(f"{k}-{p}", STEPS, RATE, ranks=(RANK // p,) * p, branching=k, levels=p)
        for k, p in shapes()
    ]
    found = runs.study(args, tasks[:1] if args.smoke else tasks)
    print(report.show("k-p", found, {"landed %": lambda line: landed(line).show()}))
    if args.png:
        by_k: dict[int, list[Line]] = {}
        for line in found:
            by_k.setdefault(line.first.task.branching, []).append(line)
        panels = {
            name: [
                Curve(f"k = {k}", [leaves(one) for one in some], [read(one) for one in some])
                for k, some in by_k.items()
            ]
            for name, read in ((FACTS, Line.facts), ("questions that land, %", landed))
        }
        report.draw_curves(args.png, "leaves", panels)
    for line in found:
        yield Row(f"{NAME}.landed@{line.label}", landed(line).mean / 100, "", "of the questions")
    yield from report.rows(NAME, found)


def leaves(line: Line) -> int:
    """k^p."""
    return line.first.task.branching**line.first.task.levels


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=runs.options))
