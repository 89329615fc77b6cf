"""``mlx_hiermem bank add``: teach a bank new documents, in clusters of their own."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import editable_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="model folder whose bank is added to"
    )
    parser.add_argument(
        "--corpus",
        required=True,
        nargs="+",
        metavar="PATH",
        help='documents: .jsonl with {"text": ...} a line, and maybe "prompt", the question or '
        "questions that the document answers; .jsonl.gz, .parquet, or .txt with blank lines "
        "between documents; files, folders or patterns",
    )
    parser.add_argument(
        "--name", required=True, metavar="NAME", help="of the memory: 1 to 32 of a-z, 0-9 and -"
    )
    parser.add_argument(
        "--bank", metavar="FOLDER", help="memory folder, if it is not memory/ of the model folder"
    )
    group = parser.add_argument_group("how it is made")
    group.add_argument(
        "--roots",
        type=int, metavar="N",
        help="clusters that it gets at level 1 (default: 1 to 4, for about 20 texts to a leaf)",
    )  # fmt: skip
    group.add_argument(
        "--text-field", default="text", metavar="NAME", help="the field that holds the text"
    )
    group.add_argument(
        "--views", metavar="VIEW,VIEW",
        help="what a document without prompts is routed by (default: text,prefix): text, prefix, "
        "first-sentence, sentences",
    )  # fmt: skip
    group.add_argument(
        "--iters", type=int, metavar="N",
        help="optimizer steps (default: 12 passes over the documents, 200 to 3000 steps)",
    )  # fmt: skip
    group.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="sequences of a step (default: 8)"
    )
    group.add_argument(
        "--learning-rate", type=float, default=1e-2, metavar="X",
        help="peak learning rate (default: 0.01)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of tree, order and start")
    parser.set_defaults(revision=None, levels=None, subtrees=None)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """What was added; see ``training.adding.add_memory``.

    Raises:
        InputError, ConfigError, FormatError, TrainingError: documents, bank or settings are not
            what they should be. Nothing has changed then.
    """
    from pathlib import Path

    from ...config import Added
    from ...corpus.private import DEFAULT_VIEWS
    from ...corpus.sources import find_files, find_units
    from ...loading import load
    from ...models import find_model
    from ...training.adding import AddSettings, add_memory

    views = DEFAULT_VIEWS if args.views is None else tuple(args.views.split(","))
    settings = AddSettings(
        args.name, args.roots, args.iters, args.batch_size, args.learning_rate, args.seed,
        args.text_field, views,
    )  # fmt: skip
    Added(args.name)  # before anything is loaded
    find_units(find_files(args.corpus), 1 << 40)
    editable_folder(args)
    folder = find_model(args.model)
    lm = load(folder, bank=args.bank and Path(args.bank).expanduser(), tiers="disk")
    with lm.bank:
        return add_memory(lm, folder, args.corpus, settings)


def to_text(report: dict[str, Any]) -> str:
    """The report for people."""
    last = report["first"] + report["roots"] - 1
    clusters = f"cluster {last}"
    if report["roots"] > 1:
        clusters = f"clusters {report['first']} to {last}"
    return "\n".join(
        [
            f"{report['folder']}: added {report['name']}, {clusters} of level 1, "
            f"{report['bytes']:,} bytes, revision {report['revision'][:12]}",
            f"{report['documents']:,} documents, {report['tokens']:,} tokens; loss "
            f"{report['loss_before']:.3f} -> {report['loss']:.3f} nats in {report['steps']} steps",
            f"{100 * report['lands']:.1f}% of the {report['texts']:,} texts that documents are "
            "routed by land in it",
        ]
    )
