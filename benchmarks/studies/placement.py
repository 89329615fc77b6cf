"""Where in the depth of the anchor memories are best: the paper's table 9.

``python -m benchmarks.studies.placement``. FFN memories in all
layers, or in half of them with twice the rank, so that every fetch has the same size. Rows, for
placement P: ``placement.facts@P`` and ``placement.perplexity@P``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mlx_hiermem.config import PLACEMENTS, placement

from ..harness import Row, main
from .training import report, runs
from .training.runs import RATE, STEPS
from .training.task import Anchor, Task

NAME = "placement"

#: Ranks of the two levels with memories in all layers.
RANKS = (8, 32)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    depth, tasks = Anchor().layers, []
    for name in PLACEMENTS:
        layers = placement(name, depth)
        times = 1 if layers is None else depth // len(layers)
        ranks = tuple(times * rank for rank in RANKS)
        tasks.append(Task(name, STEPS, RATE, ranks=ranks, layers=layers))
    found = runs.study(args, tasks)
    print(
        report.show(
            "placement",
            found,
            {"layers": lambda line: ",".join(map(str, line.first.task.layers or ["all"]))},
        )
    )
    if args.png:
        report.draw_scores(args.png, found)
    yield from report.rows(NAME, found)


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=runs.options))
