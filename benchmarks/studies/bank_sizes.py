"""A larger fetch against a larger bank: the paper's figure 4a.

``python -m benchmarks.studies.bank_sizes``. Fetches of three sizes,
each from one level of a tree with four children: the deeper the level, the larger the bank, while
what is fetched stays. Rows, for rank R and level L: ``bank_sizes.facts@R-L`` and
``bank_sizes.perplexity@R-L``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..harness import Row, main
from .levels import BRANCHING, LEVELS, RANK, at_level
from .training import report, runs
from .training.report import Line
from .training.runs import RATE, STEPS
from .training.task import Task

NAME = "bank_sizes"

#: Of the atlas.
FACTS_IN_ALL = 8710
RANKS = (RANK // 4, RANK // 2, RANK)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    tasks = [
        Task(
            f"{rank}-{level}", STEPS, RATE, ranks=at_level(level, rank), branching=BRANCHING,
            levels=LEVELS,
        )
        for rank in (RANKS[:1] if args.smoke else RANKS)
        for level in range(1, LEVELS + 1)
    ]  # fmt: skip
    found = runs.study(args, tasks)
    print(
        report.show("rank-level", found, {"facts per block": lambda line: f"{per_block(line):.0f}"})
    )
    if args.png:
        report.draw_groups(
            args.png, "bank size (numbers)", found,
            lambda line: f"{line.first.fetch_size:,} fetched", lambda line: line.first.bank_size,
        )  # fmt: skip
    yield from report.rows(NAME, found)


def per_block(line: Line) -> float:
    """Facts that each block of the bank has to hold, on average."""
    level = next(number for number, rank in enumerate(line.first.task.ranks, 1) if rank)
    return FACTS_IN_ALL / BRANCHING**level


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=runs.options))
