"""OpenAI's answers: objects of chat completions, completions, models, and chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .job import Finished, Piece, Started, TokenLogprob, TopLogprob

_LEAST_LOGPROB = -9999.0  # as OpenAI writes what is out of the question; -Infinity is no JSON


def to_json(value: Any) -> bytes:
    """JSON in ASCII, so that no reader of lines takes a character of a text for their end."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def memory_of(started: Started) -> dict[str, Any]:
    """The field ``memory`` of an answer."""
    path = None if started.path is None else list(started.path)
    return {"kind": started.memory, "path": path, "fetch": dict(started.fetch)}


def usage_of(finished: Sequence[Finished]) -> dict[str, Any]:
    """The field ``usage``: tokens, summed over all choices."""
    prompt = sum(one.prompt_tokens for one in finished)
    answer = sum(one.completion_tokens for one in finished)
    cached = sum(one.cached_tokens for one in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def model_object(name: str, created: int) -> dict[str, Any]:
    """An entry of ``/v1/models``; ``created`` is in seconds since 1970."""
    return {"id": name, "object": "model", "created": created, "owned_by": "mlx-hiermem"}


def chat_logprobs(tokens: Sequence[TokenLogprob], top: int) -> dict[str, Any]:
    """Log-probabilities as chat completions tell them, with ``top`` alternatives."""
    content = [
        {**_told(one), "top_logprobs": [_told(other) for other in one.top[:top]]} for one in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprob], top: int, offset: int) -> dict[str, Any]:
    """Log-probabilities as completions tell them.

    Args:
        tokens: of a piece, or a whole answer.
        top: how many alternatives.
        offset: characters of the answer before the first of ``tokens``.
    """
    offsets = []
    for one in tokens:
        offsets.append(offset)
        offset += len(one.text)
    return {
        "tokens": [one.text for one in tokens],
        "token_logprobs": [max(one.logprob, _LEAST_LOGPROB) for one in tokens],
        "top_logprobs": [
            {other.text: max(other.logprob, _LEAST_LOGPROB) for other in one.top[:top]}
            for one in tokens
        ],
        "text_offset": offsets,
    }


def _told(one: TokenLogprob | TopLogprob) -> dict[str, Any]:
    return {
        "token": one.text,
        "logprob": max(one.logprob, _LEAST_LOGPROB),
        "bytes": list(one.text.encode("utf-8", "replace")),
    }


@dataclass
class Choice:
    """One answer as it grows.

    Attributes:
        text: so far.
        tokens: so far, if log-probabilities were asked for.
        started, finished: its events, once they are there.
    """

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None
    offset: int = 0  # characters of the tokens that were told

    def add(self, piece: Piece) -> None:
        """Take in a piece."""
        self.text += piece.text
        self.tokens += piece.tokens


class Writer:
    """Writes the answer to one request, whole or in chunks.

    Args:
        chat: whether it is a chat completion.
        model: the name that the model is served under.
        count: of choices.
        several: whether the prompts came as a list, so that ``memory`` is a list too.
        top_logprobs: as in ``protocol.Request``.
        include_usage: whether the stream ends with the usage.
    """

    def __init__(
        self,
        chat: bool,
        model: str,
        count: int = 1,
        several: bool = False,
        top_logprobs: int | None = None,
        include_usage: bool = False,
    ) -> None:
        self.chat, self.several, self.top = chat, several, top_logprobs
        self.include_usage = include_usage
        self.choices = [Choice() for _ in range(count)]
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_head = {**self._head, "object": f"{kind}.chunk" if chat else kind}
        if include_usage:
            self._chunk_head["usage"] = None

    @property
    def ended(self) -> bool:
        """Whether all choices have."""
        return all(choice.finished is not None for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        """The tokens of all choices that have ended."""
        return usage_of([one.finished for one in self.choices if one.finished is not None])

    def whole(self) -> dict[str, Any]:
        """The answer, once all choices have ended."""
        choices = []
        for index, choice in enumerate(self.choices):
            said = (
                {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                if self.chat
                else {"text": choice.text}
            )
            logprobs = self._logprobs(choice.tokens, 0)
            choices.append(_choice(index, said, logprobs, choice.finished))
        memories = [memory_of(one.started) for one in self.choices if one.started is not None]
        memory: Any = memories if self.several else next(iter(memories), None)
        return {**self._head, "choices": choices, "usage": self.usage(), "memory": memory}

    def chunk(self, index: int, event: Started | Piece | Finished) -> dict[str, Any] | None:
        """The chunk that tells an event of one choice, which is taken in before; None: nothing."""
        choice = self.choices[index]
        if isinstance(event, Started):
            said: Mapping[str, Any] = self._said("", {"role": "assistant"})
            return self._chunk(index, said, (), None, memory_of(event))
        if isinstance(event, Finished):
            memory = None if choice.started is None else memory_of(choice.started)
            return self._chunk(index, self._said(None), (), event, memory)
        if not event.text and not event.tokens:
            return None
        return self._chunk(index, self._said(event.text), event.tokens, None, None)

    def last_chunk(self) -> dict[str, Any]:
        """The chunk of the usage, which has no choice."""
        return {**self._chunk_head, "choices": [], "usage": self.usage()}

    def take(self, index: int, event: Started | Piece | Finished) -> None:
        """Take in an event of one choice."""
        choice = self.choices[index]
        if isinstance(event, Started):
            choice.started = event
        elif isinstance(event, Finished):
            choice.finished = event
        else:
            choice.add(event)

    def _said(self, text: str | None, role: Mapping[str, str] | None = None) -> dict[str, Any]:
        if not self.chat:
            return {"text": text or ""}
        return {"delta": {**(role or {}), **({} if text is None else {"content": text})}}

    def _chunk(
        self,
        index: int,
        said: Mapping[str, Any],
        tokens: Sequence[TokenLogprob],
        finished: Finished | None,
        memory: dict[str, Any] | None,
    ) -> dict[str, Any]:
        choice = self.choices[index]
        logprobs = self._logprobs(tokens, choice.offset) if tokens else None
        choice.offset += sum(len(one.text) for one in tokens)
        chunk = {**self._chunk_head, "choices": [_choice(index, said, logprobs, finished)]}
        return chunk if memory is None else {**chunk, "memory": memory}

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if self.top is None:
            return None
        if self.chat:
            return chat_logprobs(tokens, self.top)
        return completion_logprobs(tokens, self.top, offset)


def _choice(
    index: int,
    said: Mapping[str, Any],
    logprobs: dict[str, Any] | None,
    finished: Finished | None,
) -> dict[str, Any]:
    reason = None if finished is None else finished.reason
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
