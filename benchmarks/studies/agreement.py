"""Do questions arrive where their facts were trained, and what does it cost where they do not?

``python -m benchmarks.studies.agreement``. The paper routes a document
by its whole text and a question by the question, and does not measure whether both arrive at the
same leaf. Here each encoder and each way to route documents trains memories of its own. Rows, for
encoder E and views V: ``agreement.landed@E-V``, ``agreement.facts@E-V``.

``--bert MODEL`` adds a BERT, such as the paper's sentence-transformers/all-MiniLM-L6-v2.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..harness import Row, main
from .training import report, runs
from .training.report import FACTS, Line, Spread
from .training.runs import RATE, STEPS
from .training.task import Task

NAME = "agreement"

#: As in ``training/routes.py``, which needs MLX.
ENCODERS = ("sif", "mean", "hidden", "trained")
VIEWS = ("prompt", "text", "once")


def options(parser: argparse.ArgumentParser) -> None:
    runs.options(parser)
    parser.add_argument(
        "--bert", metavar="MODEL", help="besides the others: a BERT encoder, a folder or Hub repo"
    )


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    encoders = {name: name for name in ENCODERS}
    if args.smoke:
        encoders = {name: name for name in ("sif", "trained")}
    if args.bert:
        encoders["bert"] = f"bert:{args.bert}"
    tasks = [
        Task(f"{label}-{views}", STEPS, RATE, encoder=encoder, views=views)
        for label, encoder in encoders.items()
        for views in (VIEWS[:1] if args.smoke else VIEWS)
    ]
    found = runs.study(args, tasks)
    print(
        report.show(
            "encoder-views",
            found,
            {
                "landed %": lambda line: landed(line).show(),
                "leaves per fact": lambda line: f"{line.first.leaves_per_fact:.2f}",
            },
        )
    )
    if args.png:
        report.draw_bars(
            args.png,
            {
                "questions that land, %": {line.label: landed(line) for line in found},
                FACTS: {line.label: line.facts() for line in found},
            },
            {FACTS: 100 * found[0].first.scores["none"].facts},
        )
    for line in found:
        value = landed(line)
        yield Row(
            f"{NAME}.landed@{line.label}", value.mean / 100, "",
            "share of the questions that arrive in a leaf in which their fact was trained; "
            f"a fact is in {line.first.leaves_per_fact:.2f} leaves",
        )  # fmt: skip
    yield from report.rows(NAME, found)


def landed(line: Line) -> Spread:
    """Questions that land, in per cent."""
    return Spread.of(100 * (run.landed or 0.0) for run in line.runs)


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=options))
