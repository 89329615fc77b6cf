"""How many tokens a parameter of the bank wants: the paper's figure 7.

``python -m benchmarks.studies.tokens``. Banks of three sizes, each
trained for four lengths, with a schedule of its own. Rows, for bank size N and steps S:
``tokens.facts@N-S`` and ``tokens.perplexity@N-S``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..harness import Row, main
from .training import report, runs
from .training.report import Line
from .training.runs import RATE
from .training.task import Task

NAME = "tokens"

RANKS = ((4, 16), (8, 32), (16, 64))
STEPS = (100, 200, 400, 800)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows. ``--steps`` is the longest length; the others keep their ratio to it."""
    longest, args.steps = args.steps or STEPS[-1], None
    lengths = [max(1, longest * steps // STEPS[-1]) for steps in STEPS]
    tasks = [
        Task(f"{rank}-{steps}", steps, RATE, ranks=(rank, deep))
        for rank, deep in (RANKS[:1] if args.smoke else RANKS)
        for steps in (lengths[:1] if args.smoke else lengths)
    ]
    found = runs.study(args, tasks)
    print(
        report.show(
            "rank-steps", found, {"tokens ÷ parameters": lambda line: f"{per_parameter(line):.2f}"}
        )
    )
    if args.png:
        report.draw_groups(
            args.png, "tokens ÷ parameters of the bank", found,
            lambda line: f"bank of {line.first.bank_size:,}", per_parameter,
        )  # fmt: skip
    yield from report.rows(NAME, found)


def per_parameter(line: Line) -> float:
    """Tokens of the training for each number in the bank."""
    return line.first.tokens / line.first.bank_size


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=runs.options))
