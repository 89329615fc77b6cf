"""What following a change of topic is worth, and whether to keep or to recompute keys and values.

``python -m benchmarks.refetch [--smoke] [--json FILE] [--png FILE]``. Perplexity per token of
documents of two topics (``refetch_documents``). The first half is prompt or first turn, its memory
routed on it; the second half is what follows. Under each policy P:

- ``refetch.second@P`` and ``refetch.both@P``: perplexity of the second half, and of the whole;
- ``refetch.prefilled@P``: tokens that were prefilled, of both halves, ÷ those of the first half.

Policies: ``none`` (memory off), ``never`` (the first half's memory), ``oracle`` (each half with the
memory of its topic, everything recomputed), ``turn`` (the second half is a turn of its own, routed
by its text) and ``tokens:N`` (the second half is an answer that goes on after the first), the last
two with keys and values kept and recomputed. ``refetch.window@W`` is ``tokens:16`` with W tokens
routed. Scores come from ``scoring.score_answer``, the mechanism of ``stream`` itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_hiermem.backend import backend_name, keep_freed_memory, preload_blas

preload_blas()

import numpy as np  # noqa: E402  (after the BLAS)
from tqdm import tqdm  # noqa: E402

from mlx_hiermem import load  # noqa: E402
from mlx_hiermem.commands.tables import table  # noqa: E402
from mlx_hiermem.conversation import KeptCache  # noqa: E402
from mlx_hiermem.engine import Memory, MemoryLM  # noqa: E402
from mlx_hiermem.errors import InputError  # noqa: E402
from mlx_hiermem.evaluation.facts import QUESTIONS_FILE  # noqa: E402
from mlx_hiermem.evaluation.questions import read_questions  # noqa: E402
from mlx_hiermem.models import find_model  # noqa: E402
from mlx_hiermem.refetch import KV_CACHES, WINDOW, Refetch  # noqa: E402
from mlx_hiermem.scoring import Scored, score_answer  # noqa: E402

from . import refetch_documents  # noqa: E402
from .harness import Row, main, model_option  # noqa: E402
from .refetch_documents import Document  # noqa: E402

NAME = "refetch"

EVERY = (8, 16, 32)
WINDOWS = (8, 16, 32, 64, 128)
#: N of "tokens:N" with which windows are compared.
_WINDOWS_AT = 16
#: Tokens that one point of the figure is the mean of.
_BIN = 8


def options(parser: argparse.ArgumentParser) -> None:
    model_option(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="of the anchor's training; 0: none")
    parser.add_argument(
        "--sentences", type=int, default=5, metavar="N", help="about each topic (default: 5)"
    )
    parser.add_argument("--documents", type=int, metavar="N", help="how many (default: 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figure here")


@dataclass(frozen=True)
class Found:
    """What a policy came to, over all documents.

    Attributes:
        first, second: nats of the tokens of the first halves (all but the first token of each) and
            of the second halves; one array per document.
        refetches: memories that were fetched within second halves.
        prefilled: tokens prefilled.
    """

    first: list[np.ndarray]
    second: list[np.ndarray]
    refetches: int
    prefilled: int

    @property
    def after(self) -> float:
        """Perplexity of the second halves."""
        return perplexity(self.second)

    @property
    def both(self) -> float:
        """Perplexity of the whole documents."""
        return perplexity([*self.first, *self.second])


def perplexity(nats: Sequence[np.ndarray]) -> float:
    """Per token, over all arrays."""
    return math.exp(float(np.concatenate(nats).mean()))


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    steps = args.steps if args.steps is not None else (3 if args.smoke else 200)
    count = args.documents if args.documents is not None else (3 if args.smoke else 100)
    for name, value, least in (
        ("steps", steps, 0), ("documents", count, 1), ("sentences", args.sentences, 1),
    ):  # fmt: skip
        if value < least:
            raise InputError(f"--{name} is {value}; expected at least {least}")
    home = find_model(args.model)
    questions, _ = read_questions(home / QUESTIONS_FILE)
    lm = load(home)
    train, test = refetch_documents.topics(lm, questions)
    given = refetch_documents.documents(lm, test, args.sentences, count, args.seed)
    bare = run_all(lm, given, {"oracle": POLICIES["oracle"]})["oracle"]
    if steps:
        refetch_documents.adapt(lm, train, steps, args.seed)
    found = run_all(lm, given, POLICIES)
    windows = run_all(lm, given, {str(w): tokens(_WINDOWS_AT, window=w) for w in WINDOWS})
    first = sum(len(nats) + 1 for nats in found["never"].first)
    second = sum(map(len, found["never"].second))
    about = f"{count} documents, {first / count:.0f} + {second / count:.0f} tokens"
    print(
        f"{home.name}: {about}, {args.sentences} sentences about each of two topics; anchor "
        f"adapted for {steps} steps; {backend_name()}"
    )
    print(_table(found, first, count), end="\n\n")
    header = ["window", "second half", "refetches a document"]
    rows = [(w, f"{one.after:.3f}", f"{one.refetches / count:.1f}") for w, one in windows.items()]
    print(f"tokens:{_WINDOWS_AT}, keep, with other windows (the default is {WINDOW})")
    print(table(header, rows), end="\n\n")
    for name, one in found.items():
        detail = f"{one.refetches / count:.1f} refetches a document; {about}"
        yield Row(f"refetch.second@{name}", one.after, "", f"perplexity; {detail}")
        yield Row(f"refetch.both@{name}", one.both, "", f"perplexity of both halves; {detail}")
        yield Row(
            f"refetch.prefilled@{name}", one.prefilled / first, "",
            f"{one.prefilled:,} tokens ÷ {first:,} of the first halves",
        )  # fmt: skip
    for w, one in windows.items():
        detail = f"{one.refetches / count:.1f} refetches a document"
        yield Row(
            f"refetch.window@{w}", one.after, "", f"tokens:{_WINDOWS_AT}, keep; {detail}"
        )  # fmt: skip
    yield Row(
        "refetch.unadapted@oracle", bare.after, "",
        f"the anchor as it is; guessing would be {lm.model.args.vocab_size}",
    )  # fmt: skip
    if args.png is not None:
        draw(found, args.png)
    lm.bank.close()


# ---- policies --------------------------------------------------------------------------

#: Scores the second half of a document, given its tokens: (model, document, first, second).
Policy = Callable[[MemoryLM, Document, list[int], list[int]], Scored]


def fixed(memory: str) -> Policy:
    """One memory for all, or that of the first half."""
    return lambda lm, document, first, second: score_answer(
        lm, first, second, memory, route_on=document.first
    )


def oracle(lm: MemoryLM, document: Document, first: list[int], second: list[int]) -> Scored:
    """The memory of the second topic, from the start."""
    return score_answer(lm, first, second, document.paths[1])


def turn(kv_cache: str) -> Policy:
    """The second half as a turn of its own, routed by its text; the first half is in the cache."""

    def run(lm: MemoryLM, document: Document, first: list[int], second: list[int]) -> Scored:
        kept = KeptCache()
        score_answer(lm, first[:1], first[1:], route_on=document.first, kept=kept)
        return score_answer(
            lm, first, second, route_on=document.second, kv_cache=kv_cache, kept=kept
        )

    return run


def tokens(every: int, kv_cache: str = "keep", window: int = WINDOW) -> Policy:
    """The second half as an answer that is routed on the way."""
    refetch = Refetch("tokens", every, kv_cache, window)
    return lambda lm, document, first, second: score_answer(
        lm, first, second, route_on=document.first, refetch=refetch
    )


POLICIES: dict[str, Policy] = {
    "none": fixed("none"),
    "never": fixed("fetched"),
    "oracle": oracle,
    **{f"turn,{kv}": turn(kv) for kv in KV_CACHES},
    **{f"tokens:{n},{kv}": tokens(n, kv) for n in EVERY for kv in KV_CACHES},
}


def run_all(
    lm: MemoryLM, given: Sequence[Document], policies: Mapping[str, Policy]
) -> dict[str, Found]:
    """Every policy on every document."""
    found = {name: Found([], [], 0, 0) for name in policies}
    for document in tqdm(given, desc="score", unit="document", disable=None):
        first = lm.tokenize(document.first)
        second = lm.tokenizer.encode(" " + document.second, add_special_tokens=False)
        begins: dict[Memory, np.ndarray] = {}  # most policies begin alike
        for name, policy in policies.items():
            memory = {"none": "none", "oracle": document.paths[0]}.get(name, "fetched")
            if memory not in begins:
                begin = score_answer(lm, first[:1], first[1:], memory, route_on=document.first)
                begins[memory] = -begin.logprobs
            scored = policy(lm, document, first, second)
            one = found[name]
            found[name] = Found(
                [*one.first, begins[memory]],
                [*one.second, -scored.logprobs],
                one.refetches + scored.refetches,
                one.prefilled + scored.prefilled,
            )
    return found


# ---- table and figure ------------------------------------------------------------------


def _table(found: Mapping[str, Found], first: int, count: int) -> str:
    header = ["policy", "second half", "both", "refetches a document", "prefilled ÷ first half"]
    rows = [
        (
            name, f"{one.after:.3f}", f"{one.both:.3f}", f"{one.refetches / count:.1f}",
            f"{one.prefilled / first:.2f}",
        )
        for name, one in found.items()
    ]  # fmt: skip
    return table(header, rows)


def draw(found: Mapping[str, Found], path: Path) -> None:
    """Perplexity over the tokens after the border, and of the whole second half."""
    from matplotlib.figure import Figure  # no window, no global state

    figure = Figure(figsize=(11, 4), layout="constrained")
    course, bars = figure.subplots(1, 2)
    for name, one in found.items():
        if name.endswith(",recompute"):
            continue
        length = min(map(len, one.second)) // _BIN * _BIN
        bins = np.stack([nats[:length] for nats in one.second]).reshape(len(one.second), -1, _BIN)
        style = {"none": ":", "never": "--", "oracle": "-."}.get(name, "-")
        places = _BIN * (np.arange(bins.shape[1]) + 0.5)
        course.plot(places, np.exp(bins.mean((0, 2))), style, label=name)
    course.set_yscale("log")
    course.set_xlabel("tokens after the border")
    course.set_title("perplexity per token of the second topic")
    course.set_ylim(top=2 * course.get_ylim()[1])  # room for the legend
    course.legend(fontsize=8, ncols=3, loc="upper center")
    names = [name.removesuffix(",keep") for name in found if name.endswith(",keep")]
    for shift, kv in zip((-0.2, 0.2), KV_CACHES, strict=True):
        values = [found[f"{name},{kv}"].after for name in names]
        bars.bar(np.arange(len(names)) + shift, values, 0.4, label=kv)
    bars.axhline(found["oracle"].after, color="grey", linestyle="-.", label="oracle")
    bars.set_xticks(range(len(names)), names)
    bars.set_title("second half, keys and values kept or recomputed")
    bars.legend(fontsize=8)
    for axis in (course, bars):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    keep_freed_memory()  # as the training of the atlas does
    raise SystemExit(main(NAME, measure, options=options))
