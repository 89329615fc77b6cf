"""The five kinds of memory at equal fetch size, at three sizes: the paper's figure 3a.

``python -m benchmarks.kinds [--smoke] [--json FILE] [--png FILE]``. Each kind is trained on the
same frozen anchor, on the same sequences in the same order, with the same settings. Rows, for kind
K and fetch size N: ``kinds.facts@K-N`` and ``kinds.perplexity@K-N``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from mlx_hiermem.backend import preload_blas

preload_blas()

from mlx_hiermem.commands.tables import table  # noqa: E402  (after the BLAS)
from mlx_hiermem.config import KINDS  # noqa: E402

from . import atlas_runs, score_figure  # noqa: E402
from .atlas_runs import Result, Task  # noqa: E402
from .harness import Row, main  # noqa: E402

NAME = "kinds"

#: Ranks of the two levels for which all kinds have the same fetch size; all sizes are multiples.
RANKS = {
    "ffn": (4, 16),
    "lora_ffn": (1, 4),
    "lora_qk": (3, 12),
    "lora_vo": (3, 12),
    "kv": (6, 24),
}
SIZES = (1, 2, 4)
#: Peak learning rates, unless ``--rate`` is given: of 3e-3, 1e-2 and 3e-2 the one with the lowest
#: loss after 300 steps at the smallest size.
RATES = {"kv": 3e-2}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    shared = atlas_runs.settings(args)
    sizes = SIZES[:1] if args.smoke else SIZES
    tasks = [
        Task(
            f"{kind}-{size}",
            kind,
            tuple(size * rank for rank in RANKS[kind]),
            None,
            **shared | {"rate": args.rate or RATES.get(kind, atlas_runs.RATE)},
        )
        for size in sizes
        for kind in KINDS
    ]
    found = atlas_runs.run_all(tasks, args.jobs)
    print(show(found))
    for result in found.values():
        where = f"{result.task.kind}-{result.fetch_size}"
        about = (
            f"ranks {','.join(map(str, result.task.ranks))}, {result.task.steps} steps, rate "
            f"{result.task.rate:g}"
        )
        yield Row(
            f"kinds.facts@{where}", result.facts, "",
            f"share of exact answers, {result.bare_facts:.4f} without memory; {about}",
        )  # fmt: skip
        yield Row(
            f"kinds.perplexity@{where}", result.perplexity, "",
            f"{result.bare_perplexity:.3f} without memory; {about}",
        )  # fmt: skip
    if args.png:
        lines: dict[str, list[Result]] = {}
        for result in found.values():
            lines.setdefault(result.task.kind, []).append(result)
        score_figure.draw_lines(lines, args.png)


def show(found: Mapping[str, Result]) -> str:
    """A table of all runs."""
    header = ["kind", "ranks", "fetch size", "bank size", "loss", "facts %", "perplexity"]
    rows = [
        [
            one.task.kind, ",".join(map(str, one.task.ranks)), f"{one.fetch_size:,}",
            f"{one.bank_size:,}", f"{one.loss:.4f}", f"{100 * one.facts:.2f}",
            f"{one.perplexity:.3f}",
        ]
        for one in found.values()
    ]  # fmt: skip
    bare = next(iter(found.values()))
    rows.append(
        ["none", "", "0", "0", "", f"{100 * bare.bare_facts:.2f}", f"{bare.bare_perplexity:.3f}"]
    )
    return table(header, rows)


if __name__ == "__main__":
    main(NAME, measure, options=atlas_runs.options)
