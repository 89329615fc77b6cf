"""A bank that is moved to another anchor of the same shape: a question of the reviewers.

``python -m benchmarks.studies.anchor``. The bank
was trained with its own anchor; the other one is the model's bare control, of the same shape and
tokenizer but another training. With ``--other``, a second model of the same memory config, each
bank is put on each anchor. Routing belongs to the bank and moves with it. Rows, for bank B on
anchor A: ``anchor.accuracy@B-on-A-C`` and ``anchor.loss@B-on-A-C``; C is none, generic or fetched.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mlx_hiermem.backend import backend_name, keep_freed_memory, preload_blas

preload_blas()

from mlx_hiermem import load  # noqa: E402  (after the BLAS)
from mlx_hiermem.engine import MemoryLM  # noqa: E402
from mlx_hiermem.errors import InputError  # noqa: E402
from mlx_hiermem.memories import attach, detach  # noqa: E402
from mlx_hiermem.models import find_model  # noqa: E402

from ..harness import Row, main  # noqa: E402
from .asking import figures  # noqa: E402
from .asking.table import (  # noqa: E402
    Study,
    ask_all,
    both_rows,
    mean,
    open_study,
    same,
    show,
    tuples,
)
from .asking.table import options as shared_options  # noqa: E402

NAME = "anchor"
LIMIT = 2000
CONDITIONS = ("none", "generic", "fetched")


def options(parser: argparse.ArgumentParser) -> None:
    shared_options(parser)
    parser.add_argument(
        "--other", metavar="PATH_OR_REPO",
        help="a second model, of the same anchor's shape, memory config and tokenizer",
    )  # fmt: skip


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    with open_study(args, LIMIT) as study:
        placed = placements(study, args.other)
        ways = {}
        for name, lm in placed.items():
            paths = lm.assign([prompt for prompt, _ in study.pairs])  # by the bank's own routing
            for condition in CONDITIONS:
                memories = tuples(paths) if condition == "fetched" else same(condition, study)
                ways[f"{name}-{condition}"] = lm, study.pairs, memories, None
        found = ask_all(ways)
        print(f"{study.home.name}: {len(study.questions)} questions; {backend_name()}", end="\n\n")
        show("Banks on anchors", ["bank-on-anchor-memory"], found, args.seed)
        for name, asked in found.items():
            yield from both_rows("anchor", name, asked, args.seed, name.replace("-", " "))
        if args.png is not None:
            means = {
                condition: [
                    mean(found[f"{name}-{condition}"].right, args.seed) for name in placed
                ]
                for condition in CONDITIONS
            }  # fmt: skip
            panel = figures.Panel(
                "a bank on another anchor", "", "exact answers, %", means, list(placed), bars=True
            )
            figures.draw([panel], args.png)


def placements(study: Study, other: str | None) -> dict[str, MemoryLM]:
    """Each bank on each anchor: "own-on-own", "own-on-control", and with a second model all four.

    Raises:
        InputError: there is no other anchor, or it differs in shape, memory config or tokenizer.
    """
    found = {"own-on-own": study.lm}
    if study.control is not None:
        found["own-on-control"] = study.control
    if other is not None:
        home = find_model(other)
        theirs = load(home)
        for what, ours_is, theirs_is in (
            ("memory config", _config(study.lm), _config(theirs)),
            ("vocabulary", study.lm.tokenizer.get_vocab(), theirs.tokenizer.get_vocab()),
        ):
            if ours_is != theirs_is:
                raise InputError(
                    f"--other {other}: its {what} is another one than that of {study.home.name}; "
                    "give a model that differs in its training alone"
                )
        found["other-on-other"] = theirs
        found["own-on-other"] = _moved(study.lm, load(home))
        found["other-on-own"] = _moved(theirs, load(study.home))
    if len(found) < 2:
        raise InputError(f"{study.home}: has no control to put its bank on; name a model: --other")
    return found


def _config(lm: MemoryLM) -> dict:
    """What two memory configs must share: all but the encoder, and the name of the anchor."""
    config = lm.bank.config
    return {
        "kind": config.kind, "ranks": config.ranks, "branching": config.branching,
        "layers": config.layers, "shape": config.anchor_shape(),
    }  # fmt: skip


def _moved(bank_of: MemoryLM, anchor_of: MemoryLM) -> MemoryLM:
    """The bank and the routing of one model on the anchor of another, which is used up."""
    anchor_of.bank.close()
    model = attach(detach(anchor_of.model), bank_of.bank.config)
    config = {"max_position_embeddings": anchor_of.context_length}
    return MemoryLM(model, anchor_of.tokenizer, bank_of.bank, bank_of.tree, bank_of.encoder, config)


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main(NAME, measure, options=options))
