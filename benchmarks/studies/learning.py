"""How fast memories learn, on a frozen anchor and together with it: the paper's figure 6a.

``python -m benchmarks.studies.learning``. The anchor that both begin
with is trained first; the third line trains it on, without memory, for as many steps. Rows, for
regime R: ``learning.facts@R`` and ``learning.perplexity@R``; the figure has the whole way.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mlx_hiermem.commands.tables import table

from ..harness import Row, main
from .training import report, runs
from .training.report import FACTS, Curve, Line, Spread
from .training.runs import RATE
from .training.task import Anchor, Task

NAME = "learning"

STEPS, EVERY = 600, 60
ANCHOR = Anchor(steps=600)
#: Peak learning rate of the bare anchor.
ANCHOR_RATE = 4e-3


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    tasks = [
        Task("frozen", STEPS, RATE, regime="frozen", anchor=ANCHOR, every=EVERY),
        Task("co-trained", STEPS, RATE, regime="cotrain", anchor=ANCHOR, every=EVERY),
        Task("anchor-alone", STEPS, ANCHOR_RATE, regime="anchor", anchor=ANCHOR, every=EVERY),
    ]
    found = runs.study(args, tasks)
    steps = [step for step, *_ in found[0].first.curve]
    facts = {line.label: [_at(line, number, 2) for number in range(len(steps))] for line in found}
    print(
        table(
            ["step", *facts],
            [
                [str(step), *(some[number].show() for some in facts.values())]
                for number, step in enumerate(steps)
            ],
        )
    )
    if args.png:
        losses = [
            Curve(line.label, steps, [_at(line, number, 1) for number in range(len(steps))])
            for line in found
        ]
        panels = {
            FACTS: [Curve(label, steps, some) for label, some in facts.items()],
            "loss, nats per token": losses,
        }
        report.draw_curves(args.png, "step", panels, log=False)
    yield from report.rows(NAME, found)


def _at(line: Line, number: int, column: int) -> Spread:
    times = 100 if column == 2 else 1
    return Spread.of(times * run.curve[number][column] for run in line.runs)


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=runs.options))
