"""``mlx_hiermem evaluate``: facts, routing or perplexity of a model, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..models import find_model
from .options import add_model_arguments, load_model
from .tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--task",
        choices=TASKS,
        required=True,
        help="facts: exact answers per memory; routing: how often a question lands where its fact "
        "was trained; perplexity: of the documents in --text",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="documents for perplexity: .jsonl with a text a line, or .txt with blank lines "
        "between them",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N questions or texts"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the wrong paths (default: 0)")
    parser.add_argument("--by-family", action="store_true", help="figures per family of facts too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit is {args.limit}; expected at least 1")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}; expected at least 0")
    if (args.text is not None) != (args.task == "perplexity"):
        raise InputError("--text FILE names the documents of --task perplexity, and only of that")
    result, text = TASKS[args.task](args)
    print(json.dumps(result) if args.json else text)
    return 0


def _facts(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..evaluation import facts

    lm, questions, buckets = _open(args)
    control = args.model / facts.CONTROL_FILE
    control_lm = facts.load_control(lm, control) if control.exists() else None
    hits = facts.answer(lm, questions, control_lm, args.seed)
    result = facts.by_bucket(questions, buckets, hits)
    families = facts.by_family(questions, hits)

    def row(name: str, counts: Sequence[int], shares: Sequence[float | None], n: int) -> list[str]:
        documents = f"{min(counts)}-{max(counts)}" if counts else ""
        return [name, str(n), documents, *map(_percent, shares)]

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


def _routing(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..evaluation import routing

    lm, questions, _ = _open(args)
    right = routing.landed(lm, questions)
    result, families = routing.summary(right), routing.by_family(questions, right)
    rows = [
        [name, str(shares["n"]), *map(_percent, shares["levels"])]
        for name, shares in {**families, "all": result}.items()
    ]
    header = ["family", "n", *(f"level {level}" for level in range(1, lm.bank.config.levels + 1))]
    if args.by_family:
        result = {**result, "by_family": families}
    title = "Questions that land where their fact was trained, in %."
    return result, f"{title}\n\n{table(header, rows)}"


def _perplexity(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..evaluation import perplexity

    documents = perplexity.read_documents(args.text)[: args.limit]
    result = perplexity.compare(load_model(args), documents)
    rows = [[memory, f"{result[memory]:.3f}"] for memory in perplexity.MEMORIES]
    title = f"Perplexity per token of {len(documents)} document{'s' * (len(documents) > 1)}."
    return result, f"{title}\n\n{table(['memory', 'perplexity'], rows)}"


#: Task -> what gives its JSON object and its text.
TASKS = {"facts": _facts, "routing": _routing, "perplexity": _perplexity}


def _open(args: argparse.Namespace) -> tuple[Any, list[Any], list[str]]:
    """The model, its first ``--limit`` questions, and the names of the buckets."""
    from ..evaluation.facts import QUESTIONS_FILE, read_questions

    args.model = find_model(args.model)
    lm = load_model(args)
    leaf_clusters = lm.bank.config.clusters(lm.bank.config.levels)
    questions, buckets = read_questions(args.model / QUESTIONS_FILE, leaf_clusters)
    return lm, questions[: args.limit], buckets


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
