"""``mlx_hiermem evaluate --task facts``: exact answers to held-out questions, per memory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..models import find_model
from .options import load_model
from .tables import table

if TYPE_CHECKING:
    from ..engine import MemoryLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This task has no options of its own."""


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as an object for JSON, and as text for people."""
    from ..evaluation import facts

    lm, questions, buckets = open_questions(args)
    control = args.model / facts.CONTROL_FILE
    control_lm = facts.load_control(lm, control) if control.exists() else None
    hits = facts.answer(lm, questions, control_lm, args.seed)
    result = facts.by_bucket(questions, buckets, hits)
    families = facts.by_family(questions, hits)

    def row(name: str, counts: Sequence[int], shares: Sequence[float | None], n: int) -> list[str]:
        documents = f"{min(counts)}-{max(counts)}" if counts else ""
        return [name, str(n), documents, *map(percent, shares)]

    def counts(key: str, value: Any) -> list[int]:
        return [question.count for question in questions if getattr(question, key) == value]

    per_bucket = [
        row(name, counts("bucket", i), [result[key][i] for key in hits], result["n"][i])
        for i, name in enumerate(buckets)
    ]
    every = [question.count for question in questions]
    total = row("all", every, [float(right.mean()) for right in hits.values()], len(questions))
    columns = ["n", "documents", *hits]
    parts = [
        "Facts asked in a wording that no training text has: answers that are exactly right, in %.",
        table(["bucket", *columns], [*per_bucket, total]),
    ]
    if args.by_family:
        result["by_family"] = families
        per_family = [
            row(name, counts("family", name), [shares[key] for key in hits], shares["n"])
            for name, shares in families.items()
        ]
        parts.append(table(["family", *columns], per_family))
    if control_lm is None:
        parts.append(f"anchor_same_tokens was not measured: the model has no {facts.CONTROL_FILE}.")
    return result, "\n\n".join(parts)


def open_model(args: argparse.Namespace) -> MemoryLM:
    """The model, with its folder as ``args.model``, for what else is read from there.

    The folder is found once, with the revision and the part that are wanted, so that all is of one
    commit even if the branch of a Hub repository moves meanwhile.

    Raises:
        ConfigError, FormatError, BudgetError, PathError: as :func:`mlx_hiermem.load`.
    """
    from ..bank.parts import Part

    args.model = find_model(args.model, args.revision, Part.of(args.levels, args.subtrees))
    return load_model(args)


def open_questions(args: argparse.Namespace) -> tuple[Any, list[Any], list[str]]:
    """The model, its first ``--limit`` questions, and the names of the buckets."""
    from ..evaluation.facts import QUESTIONS_FILE, read_questions

    lm = open_model(args)
    leaf_clusters = lm.bank.config.clusters(lm.bank.config.levels)
    questions, buckets = read_questions(args.model / QUESTIONS_FILE, leaf_clusters)
    return lm, questions[: args.limit], buckets


def percent(share: float | None) -> str:
    """A share in %, or a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}"
