"""What the studies of a finished model share: its questions, asking them, spreads and rows.

A study trains nothing. The model is one seed, so the spread that it can tell is that over
questions: 95 % of bootstrap samples of the questions have a mean between two values.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_hiermem import load, scoring
from mlx_hiermem.commands.tables import table
from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.errors import InputError
from mlx_hiermem.evaluation import facts
from mlx_hiermem.evaluation.questions import Question, read_questions
from mlx_hiermem.models import find_model
from mlx_hiermem.routing.tree import ClusterTree

from ...harness import Row, model_option

#: Questions of a smoke run.
SMOKE = 16
_SAMPLES = 1000


def options(parser: argparse.ArgumentParser) -> None:
    """The options of every study, beside ``--smoke`` and ``--json``."""
    model_option(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="ask only N questions, evenly drawn")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figure here")


@dataclass(frozen=True)
class Study:
    """A model and the questions that are asked.

    Attributes:
        home: the model's folder.
        lm: the model.
        control: the bare anchor of the same tokens, or None where the model has none.
        questions: those that are asked.
        every: all of the model's questions.
        buckets: their names, the most frequent facts first.
        paths: (N, p) int64, where the questions are routed.
    """

    home: Path
    lm: MemoryLM
    control: MemoryLM | None
    questions: list[Question]
    every: list[Question]
    buckets: list[str]
    paths: np.ndarray

    @property
    def tree(self) -> ClusterTree:
        """What routes the questions."""
        return self.lm.tree

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(prompt, continuation) of each question."""
        return [(question.prompt, question.continuation) for question in self.questions]


@contextmanager
def open_study(args: argparse.Namespace, limit: int, family: str | None = None) -> Iterator[Study]:
    """Open the model that the options name, and choose its questions.

    Args:
        limit: questions where ``--limit`` does not say.
        family: ask only questions of this one.

    Raises:
        InputError: an option is out of range, or the figure cannot be written.
        FormatError: the model has no questions.
    """
    count = args.limit if args.limit is not None else (SMOKE if args.smoke else limit)
    if count < 1:
        raise InputError(f"--limit is {count}; expected at least 1")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}; expected at least 0")
    home = find_model(args.model)
    every, buckets = read_questions(home / facts.QUESTIONS_FILE)
    asked = [question for question in every if family in (None, question.family)]
    if not asked:
        known = ", ".join(sorted({question.family for question in every}))
        raise InputError(f"--family {family}: the model has no such questions; it has {known}")
    questions = evenly(asked, count)
    lm = load(home)
    try:
        file = home / facts.CONTROL_FILE
        control = facts.load_control(lm, file) if file.exists() else None
        paths = lm.assign([question.prompt for question in questions])
        yield Study(home, lm, control, questions, every, buckets, paths)
    finally:
        lm.bank.close()


def evenly(every: Sequence[Any], count: int) -> list[Any]:
    """``count`` of all, at even distances; all where there are no more."""
    places = np.linspace(0, len(every), min(count, len(every)), endpoint=False).astype(int)
    return [every[i] for i in places]


def tuples(paths: np.ndarray) -> list[tuple[int, ...]]:
    """Paths (N, p) as :func:`facts.ask` takes them."""
    return [tuple(path) for path in paths.tolist()]


def same(memory: str, study: Study) -> list[str]:
    """One memory for every question."""
    return [memory] * len(study.questions)


# ---- asking ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What came of asking N questions in one way.

    Attributes:
        right: (N,) bool, exactly right.
        nats: (N,) float64, loss of the answer, in nats per token.
    """

    right: np.ndarray
    nats: np.ndarray


#: A way of asking: model, (prompt, continuation) pairs, memories, and what fetches these.
Way = tuple[MemoryLM, Sequence[tuple[str, str]], Sequence[Any], facts.Fetch | None]


def ask_all(ways: Mapping[str, Way]) -> dict[str, Asked]:
    """Ask in every way, under one progress bar."""
    found: dict[str, Asked] = {}
    lengths: dict[tuple[str, str], int] = {}
    total = sum(len(pairs) for _, pairs, _, _ in ways.values())
    with tqdm(total=total, unit="question", disable=None) as bar:
        for name, (lm, pairs, memories, fetch) in ways.items():
            bar.set_description(name)
            answers = facts.ask(lm, pairs, memories, fetch, bar)
            for pair in pairs:
                if pair not in lengths:
                    tokens, start = scoring.split_tokens(lm, *pair)
                    lengths[pair] = len(tokens) - start
            counts = np.array([lengths[pair] for pair in pairs])
            found[name] = Asked(answers.right, -answers.logprobs / counts)
    return found


# ---- spreads, rows, tables -------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """A mean over questions, and between what 95 % of bootstrap samples lie."""

    value: float
    low: float
    high: float
    count: int

    def show(self, scale: float = 100.0, digits: int = 1) -> str:
        """Such as "95.7 [94.2, 97.0]"."""
        value, low, high = (f"{scale * x:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Mean:
    """The mean of values (N,) with its bootstrap spread; of none, NaN."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return Mean(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(seed)
    means = [
        values[rng.integers(len(values), size=len(values))].mean() for _ in range(_SAMPLES)
    ]  # one by one: together they would be a thousand times the questions
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(float(values.mean()), float(low), float(high), len(values))


def row(id: str, found: Mean, about: str) -> Row:
    """A row of a mean, its spread and the number of questions in the detail."""
    spread = f"95 % of bootstrap samples {found.low:.4f} to {found.high:.4f}"
    return Row(id, found.value, "", f"{about}; {spread}; n {found.count}")


def both_rows(prefix: str, name: str, asked: Asked, seed: int, about: str) -> list[Row]:
    """Rows ``PREFIX.accuracy@NAME`` and ``PREFIX.loss@NAME``."""
    return [
        row(f"{prefix}.accuracy@{name}", mean(asked.right, seed), f"exact answers; {about}"),
        row(f"{prefix}.loss@{name}", mean(asked.nats, seed), f"nats per token; {about}"),
    ]


def show(
    title: str,
    header: Sequence[str],
    found: Mapping[str, Asked],
    seed: int,
    more: Callable[[str], Sequence[Any]] = lambda name: (),
) -> None:
    """Print a table: each way of asking with ``more`` cells, accuracy in % and loss."""
    rows = [
        (
            name, *more(name), mean(asked.right, seed).show(),
            mean(asked.nats, seed).show(1, 3), len(asked.right),
        )
        for name, asked in found.items()
    ]  # fmt: skip
    print(f"{title}\n{table([*header, 'exact, %', 'nats per token', 'n'], rows)}", end="\n\n")
