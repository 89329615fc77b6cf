"""Where in the depth of the anchor memories are best: the paper's table 9.

``python -m benchmarks.placement [--smoke] [--json FILE] [--png FILE]``. FFN memories in all
layers, or in half of them with twice the rank, so that every fetch has the same size. Rows, for
placement P: ``placement.facts@P`` and ``placement.perplexity@P``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mlx_hiermem.backend import preload_blas

preload_blas()

from apps.atlas.recipe import Recipe  # noqa: E402  (after the BLAS)
from mlx_hiermem.commands.tables import table  # noqa: E402
from mlx_hiermem.config import PLACEMENTS, placement  # noqa: E402

from . import atlas_runs, score_figure  # noqa: E402
from .atlas_runs import Task  # noqa: E402
from .harness import Row, main  # noqa: E402

NAME = "placement"

#: Ranks of the two levels with memories in all layers.
RANKS = (8, 32)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    shared, depth, tasks = atlas_runs.settings(args), Recipe().anchor.num_hidden_layers, []
    for name in PLACEMENTS:
        layers = placement(name, depth)
        times = 1 if layers is None else depth // len(layers)
        tasks.append(Task(name, "ffn", tuple(times * rank for rank in RANKS), layers, **shared))
    found = atlas_runs.run_all(tasks, args.jobs)
    header = ["placement", "layers", "ranks", "fetch size", "loss", "facts %", "perplexity"]
    rows = [
        [
            name, "all" if one.task.layers is None else ",".join(map(str, one.task.layers)),
            ",".join(map(str, one.task.ranks)), f"{one.fetch_size:,}", f"{one.loss:.4f}",
            f"{100 * one.facts:.2f}", f"{one.perplexity:.3f}",
        ]
        for name, one in found.items()
    ]  # fmt: skip
    print(table(header, rows))
    for name, one in found.items():
        about = f"fetch size {one.fetch_size:,}, {one.task.steps} steps"
        yield Row(
            f"placement.facts@{name}", one.facts, "",
            f"share of exact answers, {one.bare_facts:.4f} without memory; {about}",
        )  # fmt: skip
        yield Row(
            f"placement.perplexity@{name}", one.perplexity, "",
            f"{one.bare_perplexity:.3f} without memory; {about}",
        )  # fmt: skip
    if args.png:
        score_figure.draw_bars(found, args.png)


if __name__ == "__main__":
    main(NAME, measure, options=atlas_runs.options)
