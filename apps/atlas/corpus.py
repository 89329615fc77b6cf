"""The atlas corpus: short documents about facts, popular entities far more often than rare ones.

Entities are ranked by how common their names are in English (wordfreq); the number of
documents per fact follows Zipf-Mandelbrot, ``max(minimum, round(C / (rank + q)^s))`` with
rank counted from 0. Everything is a function of the config alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from .facts import Fact, facts, popularity, stable_hash
from .wordings import held_out_wording, training_wordings

BUCKETS = 5


@dataclass(frozen=True)
class CorpusConfig:
    """All knobs of the corpus.

    seed: order of documents, ties between entities, who gets which wording first.
    documents_top, offset, exponent: C, q and s of Zipf-Mandelbrot.
    minimum: documents of the rarest facts.
    """

    seed: int = 0
    documents_top: float = 2_400.0
    offset: float = 10.0
    exponent: float = 0.8
    minimum: int = 4


@dataclass(frozen=True)
class Document:
    """One training text = prompt + " answer."; ``wording`` is an index into the training wordings.

    ``fact_index`` points into ``facts()``.
    """

    text: str
    prompt: str
    fact_index: int
    wording: int


@dataclass(frozen=True)
class HeldOut:
    """A test question: the held-out prompt of a fact, and how often the fact was trained."""

    prompt: str
    answer: str
    continuation: str
    fact_index: int
    count: int
    family: str


@lru_cache(maxsize=4)
def counts(config: CorpusConfig) -> tuple[int, ...]:
    """Documents per fact, in the order of ``facts()``; equal for all facts of an entity."""
    known = facts()
    entities = sorted(
        {(f.family, f.entity) for f in known},
        key=lambda e: (-popularity(e[1]), stable_hash("/".join(e), config.seed)),
    )
    number = {
        entity: max(
            config.minimum,
            round(config.documents_top / (rank + config.offset) ** config.exponent),
        )
        for rank, entity in enumerate(entities)
    }
    return tuple(number[f.family, f.entity] for f in known)


def documents(config: CorpusConfig) -> Iterator[Document]:
    """All documents, shuffled, one at a time.

    A fact goes round its wordings, so they are used equally often up to one; facts start
    at different wordings, so none is favoured where the count is not a multiple.
    """
    known = facts()
    plan = [
        (index, (turn + stable_hash(fact.key, config.seed)) % len(training_wordings(fact)))
        for index, (fact, count) in enumerate(zip(known, counts(config), strict=True))
        for turn in range(count)
    ]
    random.Random(config.seed).shuffle(plan)
    for index, wording in plan:
        yield _document(known[index], index, wording)


def fact_documents(index: int) -> list[Document]:
    """The fact in each of its training wordings, once: its views for the routing."""
    fact = facts()[index]
    return [_document(fact, index, i) for i in range(len(training_wordings(fact)))]


def _document(fact: Fact, index: int, wording: int) -> Document:
    prompt, continuation = training_wordings(fact)[wording].render(fact)
    return Document(prompt + continuation, prompt, index, wording)


def held_out(config: CorpusConfig) -> list[HeldOut]:
    """The held-out question of every fact, in the order of ``facts()``."""
    questions = []
    for index, (fact, count) in enumerate(zip(facts(), counts(config), strict=True)):
        prompt, continuation = held_out_wording(fact).render(fact)
        questions.append(HeldOut(prompt, fact.answer, continuation, index, count, fact.family))
    return questions


def buckets(config: CorpusConfig) -> list[list[int]]:
    """Five lists of fact indices of equal size (up to one), most frequent first.

    Facts with the same count are put in order by a seeded hash.
    """
    known, number = facts(), counts(config)
    order = sorted(
        range(len(known)),
        key=lambda i: (-number[i], stable_hash(known[i].key, config.seed)),
    )
    edges = [round(i * len(order) / BUCKETS) for i in range(BUCKETS + 1)]
    return [order[a:b] for a, b in pairwise(edges)]
