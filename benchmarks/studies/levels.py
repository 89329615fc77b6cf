"""Which level of the tree is worth most, at one fetch size: the paper's figure 3b.

``python -m benchmarks.studies.levels``. A tree of four levels with
four children each (256 leaves, as many as the atlas's); all of the rank at one level, or the same
at each. Rows, for "level-1" ... or "all" L: ``levels.facts@L`` and ``levels.perplexity@L``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..harness import Row, main
from .training import report, runs
from .training.runs import RATE, STEPS
from .training.task import Task

NAME = "levels"

#: k and p of the tree, and the rank that is shared out.
BRANCHING, LEVELS, RANK = 4, 4, 32


def at_level(level: int, rank: int = RANK) -> tuple[int, ...]:
    """Memory config with all of the rank at one level."""
    return tuple(rank if number == level else 0 for number in range(1, LEVELS + 1))


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    shares = {f"level-{level}": at_level(level) for level in range(1, LEVELS + 1)}
    shares["all"] = (RANK // LEVELS,) * LEVELS
    tasks = [
        Task(name, STEPS, RATE, ranks=ranks, branching=BRANCHING, levels=LEVELS)
        for name, ranks in shares.items()
    ]
    found = runs.study(args, tasks)
    print(report.show("memory at", found))
    if args.png:
        report.draw_scores(args.png, found)
    yield from report.rows(NAME, found)


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=runs.options))
