"""The five kinds of memory at equal fetch size, at three sizes: the paper's figure 3a.

``python -m benchmarks.studies.kinds``. Each kind is trained on the
same frozen anchor, on the same sequences, with the same settings. Rows, for kind K and fetch size
N: ``kinds.facts@K-N`` and ``kinds.perplexity@K-N``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mlx_hiermem.config import KINDS

from ..harness import Row, main
from .training import report, runs
from .training.runs import RATE, STEPS
from .training.task import Task

NAME = "kinds"

#: Ranks of the two levels for which all kinds have the same fetch size; all sizes are multiples.
RANKS = {
    "ffn": (4, 16),
    "lora_ffn": (1, 4),
    "lora_qk": (3, 12),
    "lora_vo": (3, 12),
    "kv": (6, 24),
}
#: Numbers of a fetched memory of these ranks, on the atlas's anchor.
FETCH_SIZE = 15_360
SIZES = (1, 2, 4)
#: Peak learning rates, unless ``--rate`` is given: of 3e-3, 1e-2 and 3e-2 the one with the lowest
#: loss after 300 steps at the smallest size.
RATES = {"kv": 3e-2}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    tasks = [
        Task(
            f"{kind}-{size * FETCH_SIZE}", STEPS, RATES.get(kind, RATE), kind=kind,
            ranks=tuple(size * rank for rank in RANKS[kind]),
        )
        for size in (SIZES[:1] if args.smoke else SIZES)
        for kind in KINDS
    ]  # fmt: skip
    found = runs.study(args, tasks)
    print(report.show("kind", found))
    if args.png:
        report.draw_groups(
            args.png, "fetch size (numbers)", found,
            lambda line: line.first.task.kind, lambda line: line.first.fetch_size,
        )  # fmt: skip
    yield from report.rows(NAME, found)


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=runs.options))
