"""How large a fetched memory should be, on one tree: the paper's figures 3c and 3d.

``python -m benchmarks.studies.sizes``. The atlas's tree, and its
shares of the rank by level, from an eighth of the atlas's ranks to twice them. Rows, for fetch size
N: ``sizes.facts@N`` and ``sizes.perplexity@N``; the table has the facts by how often they were
trained too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..harness import Row, main
from .training import report, runs
from .training.report import FACTS, PERPLEXITY, Curve, Line
from .training.runs import RATE, STEPS
from .training.task import Task

NAME = "sizes"

RANKS = tuple((rank, 4 * rank) for rank in (2, 4, 8, 16, 32))


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    per_rank = 768  # numbers of one row of each level: 3 matrices, 4 layers, width 64
    tasks = [
        Task(str(per_rank * sum(ranks)), STEPS, RATE, ranks=ranks)
        for ranks in (RANKS[:2] if args.smoke else RANKS)
    ]
    found = runs.study(args, tasks)
    print(report.show("fetched", found, report.by_bucket()))
    if args.png:
        x = [line.first.fetch_size for line in found]
        buckets = [
            Curve(name, x, [line.facts(bucket=number) for line in found])
            for number, name in enumerate(report.BUCKETS)
        ]
        panels = {
            FACTS: [Curve("all", x, [line.facts() for line in found]), *buckets],
            PERPLEXITY: [Curve("all", x, list(map(Line.perplexity, found)))],
        }
        report.draw_curves(args.png, "fetch size (numbers)", panels)
    yield from report.rows(NAME, found)


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=runs.options))
