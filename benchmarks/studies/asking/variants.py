"""Other ways to type a question: shortened, misspelt, worded otherwise."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Sequence

from mlx_hiermem.evaluation.questions import Question

#: A word of a prompt belongs to its name where it stands in at most this share of the prompts of
#: the family.
_RARE = 0.1

_STATEMENT = re.compile(r"The (.+) is")


def names_of(questions: Sequence[Question], every: Sequence[Question]) -> list[tuple[int, int]]:
    """Where in each prompt its name stands: from the first to the last rare word, as characters.

    Args:
        every: all questions, from which it is counted what is rare.

    Returns:
        Per question (begin, end); the whole prompt where no word is rare.
    """
    totals: Counter[str] = Counter()
    within: dict[str, Counter[str]] = {}
    for question in every:
        totals[question.family] += 1
        within.setdefault(question.family, Counter()).update(set(question.prompt.split()))
    found = []
    for question in questions:
        most = _RARE * totals[question.family]
        words = [
            match.span()
            for match in re.finditer(r"\S+", question.prompt)
            if within[question.family][match[0]] <= most
        ]
        found.append((words[0][0], words[-1][1]) if words else (0, len(question.prompt)))
    return found


def without_words(prompt: str, left: int = 0, right: int = 0) -> str:
    """A prompt without so many words at its ends; one word stays."""
    words = prompt.split()
    left = min(left, len(words) - 1)
    return " ".join(words[left : max(left + 1, len(words) - right)])


def misspelt(text: str, edits: int, rng: random.Random, span: tuple[int, int] | None = None) -> str:
    """A text with random edits of letters: dropped, doubled, changed, or swapped with the next.

    Args:
        edits: how many; each changes the text.
        span: edit only from here to there.
    """
    begin, end = span or (0, len(text))
    for _ in range(edits):
        before = text
        places = [i for i in range(begin, end) if text[i].isalpha()]
        for _ in range(100):  # a swap of two equal letters changes nothing: draw again
            if not places:
                break
            i = rng.choice(places)
            kind = rng.choice(("drop", "double", "change", "swap"))
            if kind == "drop" and len(places) > 1:
                text = text[:i] + text[i + 1 :]
            elif kind == "double":
                text = text[:i] + text[i] + text[i:]
            elif kind == "change":
                text = text[:i] + rng.choice(string.ascii_lowercase) + text[i + 1 :]
            elif kind == "swap" and i + 1 < end:
                text = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
            if text != before:
                break
        end += len(text) - len(before)
    return text


def reworded(prompt: str) -> dict[str, str]:
    """ "The X of Y is" asked otherwise; nothing for a prompt that is no such statement."""
    match = _STATEMENT.fullmatch(prompt)
    if not match:
        return {}
    about = match[1]
    return {
        "question": f"What is the {about}?",
        "request": f"Tell me the {about}:",
        "doubt": f"Do you know the {about}? It is",
    }


def shortened(prompt: str, name: tuple[int, int]) -> dict[str, str]:
    """A prompt with words dropped, and its bare name."""
    begin, end = name
    return {
        **{f"left-{n}": without_words(prompt, left=n) for n in (1, 2, 3)},
        "from-name": prompt[begin:],
        **{f"right-{n}": without_words(prompt, right=n) for n in (1, 2, 3)},
        "name": prompt[begin:end],
    }
