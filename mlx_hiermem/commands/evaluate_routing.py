"""``mlx_hiermem evaluate --task routing``: questions that land where their fact was trained."""

from __future__ import annotations

import argparse
from typing import Any

from .evaluate_facts import open_questions, percent
from .tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This task has no options of its own."""


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as an object for JSON, and as text for people."""
    from ..evaluation import routing

    lm, questions, _ = open_questions(args)
    right = routing.landed(lm, questions)
    result, families = routing.summary(right), routing.by_family(questions, right)
    rows = [
        [name, str(shares["n"]), *map(percent, shares["levels"])]
        for name, shares in {**families, "all": result}.items()
    ]
    header = ["family", "n", *(f"level {level}" for level in range(1, lm.bank.config.levels + 1))]
    if args.by_family:
        result = {**result, "by_family": families}
    title = "Questions that land where their fact was trained, in %."
    return result, f"{title}\n\n{table(header, rows)}"
