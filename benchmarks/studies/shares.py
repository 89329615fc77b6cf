"""Memory against anchor, at one size at run time: the paper's figure 4b.

``python -m benchmarks.studies.shares``. What the fetched memory adds
to the width of the FFNs is taken from the anchor, which is trained for it; all have as many
parameters when they answer. Rows, for the memory's share S of them in %: ``shares.facts@S`` and
``shares.perplexity@S``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..harness import Row, main
from .training import report, runs
from .training.report import FACTS, PERPLEXITY, Curve, Line
from .training.runs import RATE, STEPS
from .training.task import Anchor, Task

NAME = "shares"

#: Width of the anchor's FFN and the memory's together.
WIDTH = 232
#: Memory configs, which take 5, 10, ... rows of it.
RANKS = ((1, 4), (2, 8), (4, 16), (8, 32), (16, 64), (32, 128))
ANCHOR_STEPS = 800


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    tasks = [
        Task(
            f"{100 * share(ranks):.0f}%", STEPS, RATE, ranks=ranks,
            anchor=Anchor(ffn=WIDTH - sum(ranks), steps=ANCHOR_STEPS),
        )
        for ranks in (RANKS[3:4] if args.smoke else RANKS)
    ]  # fmt: skip
    found = runs.study(args, tasks)
    print(
        report.show(
            "memory",
            found,
            {
                "anchor": lambda line: f"{line.first.anchor_size:,}",
                "alone %": lambda line: line.facts("none").show(),
            },
            bare=False,
        )
    )
    if args.png:
        x = [100 * line.first.fetch_size / run_time(line) for line in found]
        panels = {
            name: [
                Curve("with memory", x, [read(line) for line in found]),
                Curve("its anchor alone", x, [read(line, "none") for line in found]),
            ]
            for name, read in ((FACTS, Line.facts), (PERPLEXITY, Line.perplexity))
        }
        report.draw_curves(args.png, "memory, % of the size at run time", panels)
    yield from report.rows(NAME, found)


def share(ranks: tuple[int, ...]) -> float:
    """The memory's share of the parameters at run time."""
    anchor = Anchor(ffn=WIDTH - sum(ranks))
    per_layer = 4 * anchor.hidden**2 + 3 * anchor.hidden * WIDTH
    everything = anchor.layers * per_layer + 1536 * anchor.hidden
    return 3 * anchor.layers * anchor.hidden * sum(ranks) / everything


def run_time(line: Line) -> int:
    """Parameters of anchor and fetched memory together."""
    return line.first.anchor_size + line.first.fetch_size


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=runs.options))
