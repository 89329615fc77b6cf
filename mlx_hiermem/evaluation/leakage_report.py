"""What the leakage test found, as numbers and in plain words; see ``leakage``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: The conditions, in the order of the output; some are missing where they mean nothing.
CONDITIONS = ("before", "anchor", "generic", "after", "sibling", "any sibling", "parent")

#: What the conditions are called in sentences.
WORDS = {
    "before": "The fetched memory before the removal",
    "anchor": "The anchor alone",
    "generic": "The generic memory",
    "after": "The fetched memory after the removal",
    "sibling": "The nearest sibling of the removed cluster",
    "any sibling": "At least one of all siblings",
    "parent": "The parent block alone",
}

#: Fewer questions give no verdict.
FEWEST = 10


@dataclass(frozen=True)
class Known:
    """What is known under one condition, question by question.

    Attributes:
        exact: (n,) bool, whether the answer is exactly right.
        ranks: (n,) float, of the true answer among its candidates, 1 the first; a tie counts half.
            None for "any sibling".
        losses: (n,) float, nats per token of the true answer. None for "any sibling".
    """

    exact: np.ndarray
    ranks: np.ndarray | None = None
    losses: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """Means over the questions: ``{"exact", "rank", "loss"}``."""
        return {
            "exact": float(self.exact.mean()),
            "rank": None if self.ranks is None else float(self.ranks.mean()),
            "loss": None if self.losses is None else float(self.losses.mean()),
        }


@dataclass(frozen=True)
class Leakage:
    """What was measured.

    Attributes:
        questions: how many.
        elsewhere: of these, how many have a document under a leaf none of whose blocks was removed.
        chance: the rank that guessing among the candidates gives.
        known: condition -> what the model knows.
        never: condition -> what the model knows that never saw the topic; None without one.
    """

    questions: int
    elsewhere: int
    chance: float
    known: Mapping[str, Known]
    never: Mapping[str, Known] | None = None

    def verdict(self, condition: str) -> bool | None:
        """Whether more is known than by the model that never saw the topic; None: cannot be told.

        It is, if in the mean over the questions there are more exact answers, or a smaller loss, by
        more than two standard errors of the difference within a question.
        """
        if self.never is None or self.questions < FEWEST:
            return None
        ours, theirs = self.known[condition], self.never[condition]
        gains = [ours.exact.astype(float) - theirs.exact]
        if ours.losses is not None and theirs.losses is not None:
            gains.append(theirs.losses - ours.losses)
        return any(
            gain.mean() > max(0.0, 2 * gain.std(ddof=1) / len(gain) ** 0.5) for gain in gains
        )

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON."""
        conditions = {}
        for name, known in self.known.items():
            conditions[name] = {**known.to_dict(), "left": self.verdict(name)}
            if self.never is not None:
                conditions[name]["never"] = self.never[name].to_dict()
        return {
            "questions": self.questions,
            "elsewhere": self.elsewhere,
            "chance_rank": self.chance,
            "conditions": conditions,
            "sentences": self.sentences(),
        }

    def sentences(self) -> list[str]:
        """What is gone and what is not, in plain words made of the numbers."""
        told = [self._sentence(name) for name in self.known]
        if self.elsewhere:
            told.append(
                f"Of {self.elsewhere} of the {self.questions} questions documents were trained "
                "under other leaves too, from which nothing was removed."
            )
        if self.never is None:
            told.append(
                "No model that never saw the topic was given, so it is not known how much of this "
                "is guessing."
            )
        elif self.questions < FEWEST:
            told.append(f"{self.questions} questions are too few to tell what is left.")
        else:
            names = [name for name in self.known if name != "before"]
            for word, wanted in (("Gone from", False), ("Not gone from", True)):
                found = [_short(name) for name in names if self.verdict(name) is wanted]
                if found:
                    told.append(f"{word}: {', '.join(found)}.")
        return told

    def _sentence(self, name: str) -> str:
        ours = self.known[name]
        theirs = None if self.never is None else self.never[name]
        verb = "answered" if name == "before" else "still answers"
        share = f"{WORDS[name]} {verb} {_percent(ours)} of the {self.questions} questions"
        if theirs is not None:
            share += f"; of a model that never saw them it is {_percent(theirs)}"
        if ours.losses is None or ours.ranks is None:
            return f"{share}."
        rest = f"rank {ours.ranks.mean():.1f}, {ours.losses.mean():.2f} nats per token"
        if theirs is not None and theirs.losses is not None and theirs.ranks is not None:
            rest += f", against {theirs.ranks.mean():.1f} and {theirs.losses.mean():.2f}"
        return f"{share} ({rest})."


def _percent(known: Known) -> str:
    return f"{100 * known.exact.mean():.0f} %"


def _short(name: str) -> str:
    words = WORDS[name].removeprefix("The ")
    return words[0].lower() + words[1:]
