"""Answer: tokens in, pieces of text out, up to a stop word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .job import Piece, TokenLogprob, TopLogprob

#: Told in place of less, as OpenAI does; JSON knows no infinity.
LEAST = -9999.0


class StopWords:
    """Cuts a text that comes in pieces at the first stop word that is complete.

    What is shown does not depend on where the pieces begin. (mlx-lm's own text matcher came with
    0.32, and holds back more than it must.)

    Attributes:
        found: whether there was one; nothing is shown after it.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._held = ""  # what may be the beginning of a word
        self.found = False

    def feed(self, text: str) -> str:
        """Some more text; returns what can be shown."""
        text = self._held + text
        places = [(text.find(word) + len(word), text.find(word)) for word in self._words]
        ends = [(end, start) for end, start in places if start >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        start = min((_begins(text, word) for word in self._words), default=len(text))
        self._held = text[start:]
        return text[:start]

    def flush(self) -> str:
        """What was held back, at the end of a text."""
        held, self._held = self._held, ""
        return held


def _begins(text: str, word: str) -> int:
    """Where, at the end of ``text``, ``word`` may have begun; its length if nowhere."""
    start = text.find(word[0], max(0, len(text) - len(word) + 1))
    while start >= 0 and not word.startswith(text[start:]):
        start = text.find(word[0], start + 1)
    return start if start >= 0 else len(text)


class Answer:
    """The text of one answer.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        stop: texts that end the answer and are not shown.
        top: so many of the likeliest tokens are told with each; None tells no log-probabilities.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], top: int | None) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer
        self._stop = StopWords(stop)
        self._top = top
        self._read = self._shown = 0  # characters
        self._waiting: list[tuple[int, TokenLogprob]] = []  # where in the text they begin

    @property
    def stopped(self) -> bool:
        """Whether a stop word has ended it."""
        return self._stop.found

    def add(self, token: int, logprobs: mx.array, ended: str | None = None) -> Piece | None:
        """The next token.

        Args:
            logprobs: (vocabulary,) of all tokens at this place.
            ended: "stop" if it is the end of the text, which is not shown, "length" if it is the
                last; None if the answer goes on.

        Returns:
            What can be shown since the last piece; None if that is nothing.
        """
        begin = self._read
        if ended != "stop":
            self._detokenizer.add_token(token)
            if self._top is not None:
                self._waiting.append((begin, self._logprob(token, logprobs)))
        if ended is not None:
            self._detokenizer.finalize()
        text = self._detokenizer.last_segment
        self._read += len(text)
        shown = self._stop.feed(text)
        whole = ended is not None and not self.stopped
        if whole:
            shown += self._stop.flush()
        self._shown += len(shown)
        count = sum(1 for begin, _ in self._waiting if whole or begin < self._shown)
        tokens = tuple(one for _, one in self._waiting[:count])
        del self._waiting[:count]
        return Piece(shown, tokens) if shown or tokens else None

    def _logprob(self, token: int, logprobs: mx.array) -> TokenLogprob:
        numbers = np.array(logprobs.astype(mx.float32))
        best: list[int] = []
        if count := min(self._top or 0, len(numbers)):
            likeliest = np.argpartition(-numbers, count - 1)[:count]
            best = sorted(map(int, likeliest), key=lambda one: (-numbers[one], one))
        top = tuple(TopLogprob(one, self._text(one), _told(numbers[one])) for one in best)
        return TokenLogprob(token, self._text(token), _told(numbers[token]), top)

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])


def _told(logprob: float) -> float:
    return max(float(logprob), LEAST)
