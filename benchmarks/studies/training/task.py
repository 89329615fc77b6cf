"""What a training study runs: an anchor, the memories that are trained with it, what is asked then.

Pure data, so that a run can be handed to another process and found again among results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

#: Goes into the names of results; raised when a run of the same settings would give others.
VERSION = 1


@dataclass(frozen=True)
class Anchor:
    """An anchor of the atlas's family, trained bare for so many steps; the rest is its recipe.

    Attributes:
        hidden: d.
        ffn: width of the FFN.
        layers: how many.
        steps: optimizer steps on the whole corpus; 0: fresh start values.
    """

    hidden: int = 64
    ffn: int = 192
    layers: int = 4
    steps: int = 600


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        label: of its line in the table; runs of one label differ in their seed alone.
        regime: "frozen", "cotrain" or "scratch" (``training/config.py``); "anchor" is no memory.
        steps, rate: of the memories, or of the anchor.
        seed: of start values and order, and of an anchor that is trained for it.
        kind, ranks, layers: of the memory.
        anchor: to be trained first; None is the atlas's second control, which is bare and has
            seen as many tokens as its anchor and memories together.
        branching, levels: of the tree; (16, 2) is the atlas's own.
        encoder, views: what routes, and what of a document is routed; see ``routes.py``.
        generic: whether the generic memory is trained too, alone and for as many steps, after the
            others.
        every: ask after every so many steps; 0: at the end alone.
        questions: how many, evenly drawn; None is all.
    """

    label: str
    steps: int
    rate: float
    regime: str = "frozen"
    seed: int = 0
    kind: str = "ffn"
    ranks: tuple[int, ...] = (8, 32)
    layers: tuple[int, ...] | None = None
    anchor: Anchor | None = None
    branching: int = 16
    levels: int = 2
    encoder: str = "sif"
    views: str = "prompt"
    generic: bool = False
    every: int = 0
    questions: int | None = None

    def key(self) -> str:
        """Names its result: equal for runs that are equal but for their label."""
        known = {**asdict(self), "label": "", "version": VERSION}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Task:
        """The task that ``asdict`` made this of."""
        found = dict(known)
        for name in ("ranks", "layers"):
            found[name] = None if found[name] is None else tuple(found[name])
        found["anchor"] = None if found["anchor"] is None else Anchor(**found["anchor"])
        return cls(**found)


@dataclass(frozen=True)
class Score:
    """What a model answers under one memory.

    Attributes:
        facts: share of the held-out questions that are answered exactly.
        buckets: the same by how often the fact was trained, the most frequent first.
        perplexity: per token, of questions and answers.
    """

    facts: float
    buckets: list[float | None]
    perplexity: float


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        anchor_size, fetch_size, bank_size: numbers of the anchor, of a fetched memory, of the bank.
        tokens: that were trained on, padding included; of the memories, or of a bare anchor.
        loss: of the last tenth of the steps, nats per token.
        scores: by memory ("none", "fetched", "generic").
        landed: share of the questions that arrive in a leaf in which their fact was trained.
        leaves_per_fact: in how many leaves a fact was trained, on average.
        curve: (step, mean loss since the one before, share of exact answers with fetched memory).
    """

    task: Task
    anchor_size: int
    fetch_size: int
    bank_size: int
    tokens: int
    loss: float
    scores: dict[str, Score]
    landed: float | None = None
    leaves_per_fact: float | None = None
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    def to_json(self) -> str:
        """One object, from which :meth:`of` makes it again."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Result:
        """The result that :meth:`to_json` wrote."""
        known = json.loads(text)
        known["task"] = Task.of(known["task"])
        known["scores"] = {name: Score(**one) for name, one in known["scores"].items()}
        known["curve"] = [tuple(point) for point in known["curve"]]
        return cls(**{one.name: known[one.name] for one in fields(cls)})
