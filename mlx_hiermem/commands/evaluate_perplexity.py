"""``mlx_hiermem evaluate --task perplexity``: perplexity of documents, per memory."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import InputError
from .options import load_model
from .tables import table

ONLY = {"--text": "--text FILE names the documents of --task perplexity, and only of that"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this task reads."""
    group = parser.add_argument_group("the documents, for --task perplexity")
    group.add_argument(
        "--text",
        metavar="FILE",
        help=".jsonl with a text a line, or .txt with blank lines between them",
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as an object for JSON, and as text for people."""
    from ..evaluation import perplexity

    if args.text is None:
        raise InputError(
            "--task perplexity: no documents are given; name them with --text FILE (.jsonl with a "
            "text a line, or .txt with blank lines between them)"
        )
    documents = perplexity.read_documents(args.text)[: args.limit]
    result = perplexity.compare(load_model(args), documents)
    rows = [[memory, f"{result[memory]:.3f}"] for memory in perplexity.MEMORIES]
    title = f"Perplexity per token of {len(documents)} document{'s' * (len(documents) > 1)}."
    return result, f"{title}\n\n{table(['memory', 'perplexity'], rows)}"
