"""The leakage test: what does a model still know of a topic whose blocks were removed?

Each question of the topic is asked under these conditions, of the model, and of one that never saw
the topic, if one is given:

- ``before``: the path of the prompt, with all its blocks;
- ``anchor``: memory off;
- ``generic``: the generic memory;
- ``after``: the path of the prompt, the removed blocks on it zeros;
- ``sibling``: the path through the nearest sibling of the removed cluster: in place of the highest
  removed cluster on the path comes the nearest of its siblings, and below it the nearest children;
- ``any sibling``: the same for each sibling, and one that answers is enough;
- ``parent``: of the path, the block above the highest removed one alone.

Measured are exact answers (as in ``facts``), the rank of the true answer among candidates by
log-probability, and the loss: nats per token of the answer with its full stop.

Notable: an answer that a model gives without ever having seen it is a guess, and guesses can be
good. So what is left is the difference to the model that never saw the topic, question by question,
and it counts as something if it is more than two standard errors (``Leakage.verdict``).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from .. import scoring
from ..bank.address import check_block
from ..errors import ConfigError, InputError
from .leakage_report import CONDITIONS, Known, Leakage
from .questions import Question

if TYPE_CHECKING:
    from ..engine import MemoryLM

__all__ = [
    "CANDIDATES",
    "CONDITIONS",
    "Known",
    "Leakage",
    "family_candidates",
    "measure",
    "of_topic",
]

Pair = tuple[int, int]

#: Answers that a question's true one is ranked with, itself included, if they are not given.
CANDIDATES = 16

#: Texts in a batch, and the bytes that their memories may take, one copy for each text.
BATCH, BATCH_BYTES = 64, 2**29


# ---- the questions of a topic ----------------------------------------------------------


def of_topic(
    lm: MemoryLM, questions: Sequence[Question], removed: Collection[Pair]
) -> list[Question]:
    """The questions whose prompt is routed through a removed block.

    Raises:
        InputError: there are none.
    """
    levels = lm.bank.config.memory_levels
    paths: Iterable[np.ndarray] = []
    if questions:
        paths = lm.assign([question.prompt for question in questions])
    found = [
        question
        for question, path in zip(questions, paths, strict=True)
        if any((level, path[level - 1]) in removed for level in levels)
    ]
    if not found:
        raise InputError("no question is routed through a removed block; there is nothing to ask")
    return found


def family_candidates(
    questions: Sequence[Question], pool: Sequence[Question], most: int = CANDIDATES, seed: int = 0
) -> list[list[str]]:
    """For each question wrong answers to rank its true one with: those of its family in ``pool``.

    Args:
        most: candidates with the true one; more are drawn, evenly.
    """
    families: dict[str, set[str]] = {}
    for question in pool:
        families.setdefault(question.family, set()).add(question.continuation)
    chosen = []
    for number, question in enumerate(questions):
        others = sorted(families.get(question.family, set()) - {question.continuation})
        draw = random.Random(f"{seed}:{number}")
        chosen.append(draw.sample(others, min(most - 1, len(others))))
    return chosen


# ---- measuring -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ask:
    """One question with one memory: "none", "generic", or a path and its blocked blocks."""

    memory: str | tuple[int, ...]
    blocked: frozenset[Pair] = frozenset()

    @property
    def key(self) -> tuple[Any, ...]:
        """What puts equal ones side by side."""
        return self.memory, tuple(sorted(self.blocked))


def measure(
    lm: MemoryLM,
    questions: Sequence[Question],
    removed: Collection[Pair],
    *,
    candidates: Sequence[Sequence[str]] | None = None,
    before: MemoryLM | None = None,
    never: MemoryLM | None = None,
) -> Leakage:
    """Measure what is left of a topic.

    Args:
        lm: the model; whether the blocks have been removed from its bank or are only to be does not
            matter, since they are blocked here.
        questions: of the topic: the path of each prompt holds a removed block (:func:`of_topic`).
        removed: pairs (level, cluster).
        candidates: per question wrong continuations; by default answers of these very questions.
        before: the model as it was; by default ``lm`` if its bank still has all of the blocks, or
            else that condition is left out.
        never: a model with a bank of the same tree that never saw the topic.

    Raises:
        InputError: there are no questions, or one is not of the topic.
        PathError: there is no such block.
        ConfigError: ``never`` or ``before`` has another tree or another tokenizer.
    """
    if not questions:
        raise InputError("there are no questions to ask; give at least one")
    gone = frozenset(check_block(lm.bank.config, pair) for pair in removed)
    others = [model for model in (before, never) if model is not None]
    for other in others:
        _check_same(lm, other, questions)
    if before is None and not gone & lm.bank.removed:
        before = lm
    if candidates is None:
        candidates = family_candidates(questions, questions)
    plan = _plan(lm, questions, gone)
    if before is None:
        del plan["before"]
    rounds = [(lm, name) for name in plan] + [(never, name) for name in plan] * (never is not None)
    known: dict[bool, dict[str, Known]] = {False: {}, True: {}}
    steps = sum(len(plan[name][0]) for _, name in rounds) * len(questions)
    with tqdm(total=steps, unit="question", disable=None) as bar:
        for model, name in rounds:
            assert model is not None
            bar.set_description(name)
            asked = before if name == "before" and model is lm else model
            assert asked is not None
            known[model is never][name] = _known(asked, questions, candidates, plan[name], bar)
    return Leakage(
        len(questions),
        sum(_elsewhere(lm, question, gone) for question in questions),
        float(np.mean([1 + len(others) / 2 for others in candidates])),
        known[False],
        None if never is None else known[True],
    )


def _check_same(lm: MemoryLM, other: MemoryLM, questions: Sequence[Question]) -> None:
    ours, theirs = lm.bank.config, other.bank.config
    shapes = [
        (config.branching, config.levels, config.clusters(1), config.memory_levels)
        for config in (ours, theirs)
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{other.bank.folder}: has another tree than {lm.bank.folder} (branching, levels, "
            f"clusters of level 1 and levels with memory are {shapes[1]} and {shapes[0]}); give a "
            "model that was trained on the same tree"
        )
    for question in questions:
        pair = question.prompt, question.continuation
        if scoring.split_tokens(lm, *pair) != scoring.split_tokens(other, *pair):
            raise ConfigError(
                f"{other.bank.folder}: its model has another tokenizer, so nats per token cannot "
                "be compared; give a model with the same one"
            )


def _plan(
    lm: MemoryLM, questions: Sequence[Question], gone: frozenset[Pair]
) -> dict[str, list[list[_Ask]]]:
    """Condition -> what to ask with: one list with an entry per question, or several of them."""
    prompts = [question.prompt for question in questions]
    paths = [tuple(path) for path in lm.assign(prompts).tolist()]
    assert lm.encoder is not None  # or nothing would have been routed
    vectors = lm.encoder.encode(prompts)
    levels = lm.bank.config.memory_levels
    parents, siblings = [], []
    for question, path, vector in zip(questions, paths, vectors, strict=True):
        hit = [level for level in levels if (level, path[level - 1]) in gone]
        if not hit:
            raise InputError(
                f"question {question.prompt[:60]!r}: no removed block is on its path; it is not of "
                "the topic"
            )
        siblings.append([_Ask(one, gone) for one in _siblings(lm, path, vector, hit[0], gone)])
        above = [level for level in levels if level < hit[0]]
        if above:
            off = {(level, path[level - 1]) for level in levels if level != above[-1]}
            parents.append(_Ask(path, frozenset(off)))
    count = len(questions)
    plan = {
        "before": [[_Ask(path) for path in paths]],
        "anchor": [[_Ask("none")] * count],
        "generic": [[_Ask("generic")] * count],
        "after": [[_Ask(path, gone) for path in paths]],
    }
    if most := min(map(len, siblings)):
        plan["sibling"] = [[one[0] for one in siblings]]
        if most > 1:
            plan["any sibling"] = [[one[turn] for one in siblings] for turn in range(most)]
    if len(parents) == count:
        plan["parent"] = [parents]
    return plan


def _siblings(
    lm: MemoryLM, path: tuple[int, ...], vector: np.ndarray, level: int, gone: frozenset[Pair]
) -> list[tuple[int, ...]]:
    """Paths that leave ``path`` at ``level``, the nearest first; the rest as the vector is routed
    among children."""
    tree, k = lm.tree, lm.bank.config.branching
    assert tree is not None
    first = path[level - 1] // k * k if level > 1 else 0

    def distances(level: int, clusters: list[int]) -> np.ndarray:
        return np.linalg.norm(tree.centroids[level - 1][clusters] - vector, axis=1)

    free = [c for c in range(first, first + k) if c != path[level - 1] and (level, c) not in gone]
    found = []
    for cluster in np.array(free, int)[np.argsort(distances(level, free), kind="stable")].tolist():
        ids = [*path[: level - 1], cluster]
        for below in range(level + 1, tree.levels + 1):
            children = list(range(ids[-1] * k, (ids[-1] + 1) * k))
            ids.append(children[int(distances(below, children).argmin())])
        found.append(tuple(ids))
    return found


def _elsewhere(lm: MemoryLM, question: Question, gone: frozenset[Pair]) -> bool:
    """Whether a document of the fact lies under a leaf none of whose blocks was removed."""
    config = lm.bank.config

    def kept(leaf: int) -> bool:
        on_path = (
            (level, leaf // config.branching ** (config.levels - level))
            for level in config.memory_levels
        )
        return not any(pair in gone for pair in on_path)

    return any(map(kept, question.leaves))


def _known(
    lm: MemoryLM,
    questions: Sequence[Question],
    candidates: Sequence[Sequence[str]],
    asks: list[list[_Ask]],
    bar: tqdm[Any],
) -> Known:
    if len(asks) > 1:  # exact answers alone; one of them is enough
        exact = np.zeros(len(questions), bool)
        for each in asks:
            for i, (_, greedy) in _scored(lm, questions, [[]] * len(questions), each, bar):
                exact[i] |= greedy[0]
        return Known(exact)
    exact = np.zeros(len(questions), bool)
    ranks, losses = np.zeros(len(questions)), np.zeros(len(questions))
    for i, (logprobs, greedy) in _scored(lm, questions, candidates, asks[0], bar):
        tokens, start = scoring.split_tokens(lm, questions[i].prompt, questions[i].continuation)
        exact[i], losses[i] = greedy[0], -logprobs[0] / (len(tokens) - start)
        others = np.array(logprobs[1:])
        ranks[i] = 1 + (others > logprobs[0]).sum() + (others == logprobs[0]).sum() / 2
    return Known(exact, ranks, losses)


def _scored(
    lm: MemoryLM,
    questions: Sequence[Question],
    candidates: Sequence[Sequence[str]],
    asks: Sequence[_Ask],
    bar: tqdm[Any],
) -> Iterator[tuple[int, tuple[list[float], list[bool]]]]:
    """For each question log-probabilities of its true answer and of the candidates, and whether
    each is the greedy one."""
    # Pairs of one memory follow each other, so that each memory is fetched once.
    order = sorted(range(len(questions)), key=lambda i: (asks[i].key, len(questions[i].prompt)))
    size = BATCH
    if asks[order[0]].key != asks[order[-1]].key:  # each text gets a copy of its memory
        nbytes = lm.bank.config.fetch_size() * lm.dtype.size
        size = min(BATCH, max(1, BATCH_BYTES // nbytes))
    found: dict[int, list[tuple[float, bool]]] = {i: [] for i in order}
    batch: list[tuple[int, str, Any]] = []

    def score() -> None:
        pairs = [(questions[i].prompt, text) for i, text, _ in batch]
        scores = scoring.score(lm, pairs, [memory for _, _, memory in batch])
        for (i, _, _), one in zip(batch, scores, strict=True):
            found[i].append(one)
        batch.clear()

    last, memory = None, None
    for i in order:
        if asks[i] != last:
            last, memory = asks[i], lm.fetch(asks[i].memory, blocked=asks[i].blocked).memory
        for text in (questions[i].continuation, *candidates[i]):
            batch.append((i, text, memory))
            if len(batch) == size:
                score()
        bar.update()
    if batch:
        score()
    for i, scores in found.items():
        yield i, ([value for value, _ in scores], [greedy for _, greedy in scores])
