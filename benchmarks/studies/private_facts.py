"""Made-up facts that no model knows: things of a made-up firm, each with three properties.

As in the atlas a text is a prompt that names the thing, and the answer behind it; each fact is said
in four of six wordings, and asked in one that no text has.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from mlx_hiermem.evaluation.questions import Question

_SYLLABLES = (
    "bar", "cal", "dor", "el", "fen", "gar", "hol", "in", "jor", "kel", "lum", "mar", "nor", "or",
    "pel", "quil", "ros", "sel", "tor", "ul", "ven", "wil", "yor", "zan", "vik", "dra", "mi", "the",
)  # fmt: skip
_KINDS = ("pump", "valve", "lamp", "crane", "drill", "cable", "motor", "sensor")

#: Property -> how its answer is made.
_PROPERTIES = ("shelf number", "part code", "supplier code")

#: {x} the thing, {r} the property.
TRAINING = (
    "{X} has the {r}",
    "What is the {r} of {x}?",
    "{X}'s {r} is",
    "{R} of {x}:",
    "The {r} that belongs to {x} is",
    "For {x}, the {r} is",
)
HELD_OUT = "The {r} of {x} is"


@dataclass(frozen=True)
class PrivateFacts:
    """Documents, and the questions that they answer.

    Attributes:
        documents: ``{"text", "prompt"}`` each.
        questions: one for each fact, in the held-out wording.
    """

    documents: list[dict[str, str]]
    questions: list[Question]

    def write(self, path: Path) -> Path:
        """One JSON object a line."""
        lines = (json.dumps(document) + "\n" for document in self.documents)
        path.write_text("".join(lines), "utf-8")
        return path


def make(things: int, seed: int, wordings: int = 4) -> PrivateFacts:
    """Facts about ``things`` things, three of each."""
    rng = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < things:
        word = "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))).capitalize()
        names[f"the {word} {rng.choice(_KINDS)}"] = None
    documents, questions = [], []
    for name in names:
        for relation in _PROPERTIES:
            answer = _answer(relation, rng)
            for wording in rng.sample(TRAINING, wordings):
                prompt = _say(wording, name, relation)
                documents.append({"text": f"{prompt} {answer}.", "prompt": prompt})
            prompt = _say(HELD_OUT, name, relation)
            questions.append(Question(prompt, f" {answer}.", answer, relation, wordings, 0, []))
    rng.shuffle(documents)
    return PrivateFacts(documents, questions)


def _say(wording: str, name: str, relation: str) -> str:
    return wording.format(
        x=name, X=name[0].upper() + name[1:], r=relation, R=relation[0].upper() + relation[1:]
    )


def _answer(relation: str, rng: random.Random) -> str:
    if relation == "shelf number":
        return str(rng.randint(100, 999))
    return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=2 if "part" in relation else 3))
