"""``mlx_hiermem evaluate --task atomic``: atomic numbers by how often elements are named."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import InputError
from .evaluate_facts import open_model, percent
from .tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this task reads."""
    group = parser.add_argument_group("the training corpus, for --task atomic")
    group.add_argument(
        "--corpus",
        nargs="+",
        metavar="PATH",
        help="what the model was trained on, in which the elements' names are counted: files "
        "(.txt, .jsonl, .jsonl.gz, .parquet), folders, or a corpus folder of cluster; without it "
        "there are no buckets",
    )
    group.add_argument(
        "--text-field", default="text", metavar="NAME", help="of .jsonl and .parquet"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as an object for JSON, and as text for people.

    Raises:
        InputError: the corpus is none, or the bank has no tree.
    """
    from ..evaluation import atomic, facts
    from ..evaluation.names import corpus_texts

    lm = open_model(args)
    counts = None
    if args.corpus:
        counts = atomic.count_elements(corpus_texts(args.corpus, args.text_field))
        if not any(counts):
            raise InputError(
                f"--corpus {' '.join(args.corpus)}: names no element; is it the training corpus?"
            )
    asked, buckets = atomic.questions(counts)
    asked = asked[: args.limit]
    control_file = args.model / facts.CONTROL_FILE
    control = facts.load_control(lm, control_file) if control_file.exists() else None
    hits = atomic.answer(lm, asked, control)
    result: dict[str, Any] = facts.by_bucket(asked, buckets, hits)
    rows = []
    for index, name in enumerate(buckets):
        within = [question.count for question in asked if question.bucket == index]
        spread = f"{min(within)}-{max(within)}" if within and counts else ""
        shares = [result[condition][index] for condition in hits]
        rows.append([name, len(within), spread, *map(percent, shares)])
    if counts:
        result["occurrences"] = dict(zip(atomic.ELEMENTS, counts, strict=True))
        every = [question.count for question in asked]
        total = [percent(float(right.mean())) for right in hits.values()]
        rows.append(["all", len(asked), f"{min(every)}-{max(every)}", *total])
    title = f"Atomic numbers of {len(asked)} elements: answers that are right, in %."
    text = f"{title}\n\n{table(['bucket', 'n', 'occurrences', *hits], rows)}"
    if not counts:
        text += "\n\nNo buckets: --corpus names the training corpus in which names are counted."
    return result, text
