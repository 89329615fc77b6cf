"""``mlx_hiermem evaluate --task leakage``: what a model still knows of what was removed from it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .evaluate_facts import open_model
from .generate import parse_block
from .tables import table

if TYPE_CHECKING:
    from ..engine import MemoryLM
    from ..evaluation.leakage import Known


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that this task alone reads."""
    group = parser.add_argument_group("--task leakage: what is still known of removed blocks")
    group.add_argument(
        "--removed",
        nargs="+",
        type=parse_block,
        metavar="LEVEL:CLUSTER",
        help="measure as if these blocks were removed (default: those that the bank lists)",
    )
    group.add_argument(
        "--removed-subtree",
        nargs="+",
        type=lambda text: parse_block(f"1:{text}")[1],
        metavar="CLUSTER",
        help="the same for clusters of level 1, each with all that is below it",
    )
    group.add_argument(
        "--never", metavar="FOLDER", help="a model of the same tree that never saw the topic"
    )
    group.add_argument("--before", metavar="FOLDER", help="the model as it was")
    group.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help="rank the true answer among N answers of its family (default: 16)",
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The JSON object of ``Leakage.to_dict`` and ``removed``, and the text.

    Raises:
        InputError: nothing was removed, or no question is about it.
        ConfigError, FormatError, PathError: as ``evaluation.leakage.measure``, and of the models.
    """
    from ..evaluation import leakage
    from ..evaluation.questions import read_questions
    from ..loading import load

    if args.candidates is not None and args.candidates < 2:
        raise InputError(f"--candidates is {args.candidates}; expected at least 2")
    lm = open_model(args)
    removed = _removed(args, lm)
    leaves = lm.bank.config.clusters(lm.bank.config.levels)
    pool, _ = read_questions(args.model / "evaluation" / "facts.jsonl.gz", leaves)
    questions = leakage.of_topic(lm, pool, removed)[: args.limit]
    most = args.candidates or leakage.CANDIDATES
    found = leakage.measure(
        lm,
        questions,
        removed,
        candidates=leakage.family_candidates(questions, pool, most, args.seed),
        before=None if args.before is None else load(args.before),
        never=None if args.never is None else load(args.never),
    )
    return {"removed": sorted(map(list, removed)), **found.to_dict()}, to_text(found, len(removed))


def _removed(args: argparse.Namespace, lm: MemoryLM) -> frozenset[tuple[int, int]]:
    from ..bank.address import check_block
    from ..bank.remove import subtree

    config = lm.bank.config
    if args.removed is None and args.removed_subtree is None:
        if not lm.bank.removed:
            raise InputError(
                f"{lm.bank.folder}: nothing was removed from this bank; say what to measure with "
                "--removed LEVEL:CLUSTER or --removed-subtree CLUSTER"
            )
        return lm.bank.removed
    found = {check_block(config, pair) for pair in args.removed or ()}
    for root in args.removed_subtree or ():
        found |= {pair for pair in subtree(config, root) if pair[0] in config.memory_levels}
    return frozenset(found)


def to_text(found: Any, removed: int) -> str:
    """A :class:`Leakage` for people."""
    header = ["condition", "exact %", "rank", "nats/token"]
    header += ["never: exact %", "rank", "nats/token", "left"] * (found.never is not None)
    rows = []
    for name, known in found.known.items():
        row = [name, *_cells(known)]
        if found.never is not None:
            left = {True: "yes", False: "no", None: "?"}[found.verdict(name)]
            row += [*_cells(found.never[name]), left]
        rows.append(row)
    title = (
        f"{found.questions} questions that are routed through {removed:,} removed "
        f"block{'s' * (removed != 1)}; guessing gives rank {found.chance:.1f}."
    )
    return "\n\n".join([title, table(header, rows), "\n".join(found.sentences())])


def _cells(known: Known) -> list[str]:
    means = known.to_dict()
    rank, loss = means["rank"], means["loss"]
    return [
        f"{100 * means['exact']:.1f}",
        "-" if rank is None else f"{rank:.2f}",
        "-" if loss is None else f"{loss:.3f}",
    ]
