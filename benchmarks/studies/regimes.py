"""The regimes of training and their controls: the rows A1 to A4 and B3 of the paper's table 1.

``python -m benchmarks.studies.regimes``. A1: the anchor, trained on
without memory; A2: co-trained; A3: memories on a frozen anchor; A4: both from scratch, for all the
steps; B3: memories on a larger frozen anchor. CK are the most frequent facts, SK the rarest.
Generic memories are trained for as many steps as fetched ones. Rows, for line R:
``regimes.SK@R``, ``regimes.CK@R``, ``regimes.perplexity@R``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mlx_hiermem.commands.tables import table

from ..harness import Row, main
from .learning import ANCHOR_RATE
from .training import report, runs
from .training.report import Line, Spread
from .training.runs import RATE
from .training.task import Anchor, Task

NAME = "regimes"

#: Of the memories, and before that of the anchors: as many as 20 minutes on two cores allow.
STEPS = 300
ANCHOR = Anchor(steps=300)
LARGER = Anchor(hidden=96, ffn=288, steps=300)
#: The buckets that stand for common and for specific knowledge.
CK, SK = 0, 4


def tasks() -> list[Task]:
    """One for each line."""
    both = ANCHOR.steps + STEPS
    fresh = Anchor(steps=0)
    return [
        Task("A1-none", STEPS, ANCHOR_RATE, regime="anchor", anchor=ANCHOR),
        Task("A2-co-trained", STEPS, RATE, regime="cotrain", anchor=ANCHOR, generic=True),
        Task("A3-frozen", STEPS, RATE, regime="frozen", anchor=ANCHOR, generic=True),
        Task("A4-from-scratch", both, ANCHOR_RATE, regime="scratch", anchor=fresh, generic=True),
        Task("B3-larger-frozen", STEPS, RATE, regime="frozen", anchor=LARGER, generic=True),
    ]


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    found = runs.study(args, tasks())
    reads = {
        "CK %": lambda line, memory: line.facts(memory, CK),
        "SK %": lambda line, memory: line.facts(memory, SK),
        "perplexity": lambda line, memory: line.perplexity(memory),
    }
    header = ["row", "anchor"]
    header += [f"{name}, {memory}" for name in reads for memory in ("generic", "fetched")]
    print(
        table(
            header,
            [
                [line.label, f"{line.first.anchor_size:,}"]
                + [
                    _show(line, read, memory)
                    for read in reads.values()
                    for memory in ("generic", "fetched")
                ]
                for line in found
            ],
        )
    )
    if args.png:
        report.draw_bars(
            args.png,
            {
                name: {
                    f"{line.label.split('-')[0]} {memory}": read(line, memory)
                    for line in found
                    for memory in ("none", "generic", "fetched")
                    if memory in line.first.scores
                }
                for name, read in reads.items()
            },
        )
    for line in found:
        memory = "fetched" if "fetched" in line.first.scores else "none"
        for name, read in reads.items():
            value: Spread = read(line, memory)
            times = 1 if name == "perplexity" else 100
            yield Row(
                f"{NAME}.{name.split()[0]}@{line.label}", value.mean / times, "",
                f"{memory}; {value.low:.2f} to {value.high:.2f}; {report.about(line)}",
            )  # fmt: skip


def _show(line: Line, read, memory: str) -> str:
    if memory in line.first.scores:
        return read(line, memory).show()
    return read(line, "none").show() if memory == "generic" else ""


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=runs.options))
