"""Job: what a request asks for; the events that answer it; Handle: the asker's end of both.

Nothing here holds an MLX array, so all of it may cross from thread to thread.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import HierMemError, InputError
from ..owner import Owned, Owner
from .memory import MemoryChoice


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the names are OpenAI's and mlx-lm's.

    Attributes:
        temperature: from 0 on; 0 takes the likeliest token.
        top_p: share of the probability that is drawn from, above 0, at most 1 (all of it).
        top_k: so many of the likeliest tokens are drawn from; 0 is all.
        min_p: least probability ÷ that of the likeliest token, 0 to 1; 0 is off.
        seed: any integer; equal seeds draw equal answers, whatever else is being answered. None is
            another one each time.
        frequency_penalty, presence_penalty: taken off a token's logit for each time, or once, that
            it is among the newest 20 tokens; 0 is off.
        repetition_penalty: its logit is divided by it, from 0 on; 0 and 1 are off.
        logit_bias: added to the logits of these tokens.

    Raises:
        InputError: a number is out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature >= 0, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        _check("frequency_penalty", self.frequency_penalty, True, "a number")
        _check("presence_penalty", self.presence_penalty, True, "a number")
        _check(
            "repetition_penalty", self.repetition_penalty, self.repetition_penalty >= 0, "0 or more"
        )
        for token, bias in self.logit_bias.items():
            _check(f"logit_bias[{token}]", bias, token >= 0, "a number for a token from 0 on")


def _check(name: str, value: float, good: bool, expected: str) -> None:
    if not (good and math.isfinite(value)):
        raise InputError(f"{name} is {value!r}; expected {expected}")


@dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        tokens: of the prompt, at least one.
        text: what is routed, if the memory is fetched and names no text of its own.
        memory: which memory it is answered with.
        max_tokens: the longest answer; the context's end stops it too.
        sampling: how tokens are drawn.
        stop: texts that end the answer and are not shown.
        top_logprobs: so many of the likeliest tokens are told at each place, with the token drawn
            itself; None tells no log-probabilities at all.
        time_limit: seconds from submission to the end; None is the scheduler's own.
    """

    tokens: list[int]
    text: str | None
    memory: MemoryChoice
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    time_limit: float | None = None


# ---- events ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """The first event: the memory is fetched, the prompt comes next.

    Attributes:
        path: the cluster path that was fetched, if there is one.
        memory: "fetched", "generic", "none" or "path".
        fetch: ``FetchReport.to_dict()``.
        cached_tokens: of the prompt's tokens, those whose keys and values were there already.
        prompt_tokens: of the whole prompt.
    """

    path: tuple[int, ...] | None
    memory: str
    fetch: dict[str, Any]
    cached_tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class TopLogprob:
    """A token that might have been drawn: ``token``, its ``text``, its ``logprob`` in nats."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was drawn.

    Attributes:
        token: its id.
        text: the token alone, decoded; a part of a character shows as a replacement mark.
        logprob: in nats, after penalties and bias, before temperature; at least -9999.
        top: the likeliest tokens, the likeliest first.
    """

    token: int
    text: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Some of the answer.

    Attributes:
        text: since the last piece; may be empty at the end, where ``tokens`` show as nothing.
        tokens: that it comes from, if log-probabilities were asked for.
    """

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event of an answer.

    Attributes:
        reason: "stop" (end of text, or a stop word), "length" or "cancelled".
        prompt_tokens: of the whole prompt.
        completion_tokens: that were drawn, with the one that ended it.
        cached_tokens: as in :class:`Started`.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be answered.

    Attributes:
        message: one line, which may be shown to anybody.
        client_error: whether the request was wrong; otherwise the server is at fault.
        timed_out: whether its time limit has passed.
    """

    message: str
    client_error: bool = False
    timed_out: bool = False

    @property
    def reason(self) -> str:
        """In one word: "client", "timeout" or "server"."""
        return "timeout" if self.timed_out else "client" if self.client_error else "server"


Told = Started | Piece | Finished
Event = Told | Failed


# ---- the asker's end -------------------------------------------------------------------


class Full(HierMemError):
    """As many requests wait as may."""


class Dead(HierMemError):
    """No more requests are taken: the model's thread has ended, or is about to."""


class Handle:
    """The asker's end of one request. Made by ``Scheduler.submit``; for any thread.

    Attributes:
        job: what was asked.
        deadline: ``time.monotonic()`` when its time limit passes, or None.
        cancelled: whether :meth:`cancel` was called.
    """

    def __init__(
        self, job: Job, time_limit: float | None, withdraw: Callable[[Handle], None]
    ) -> None:
        self.job = job
        self.deadline = None if time_limit is None else time.monotonic() + time_limit
        self._cancelled = threading.Event()
        self._withdraw = withdraw
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._over = False  # whether the last event was taken
        self._reader: dict[str, Owner] = {}  # who has asked first

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """The events, in order, up to and with the last: ``Finished`` or ``Failed``.

        For one thread, the first that asks. Every request gets a last event, also if the model's
        thread ends.

        Args:
            timeout: seconds to wait for one event; None waits as long as it takes.

        Raises:
            TimeoutError: none came. The events may be asked for again.
            ThreadError: another thread reads them.
        """
        owner = self._reader.setdefault("reader", Owner("the answer to a request"))
        owner.check()
        return Owned(owner.check, self._take(timeout))

    def _take(self, timeout: float | None) -> Generator[Event, None, None]:
        while not self._over:
            try:
                event = self._events.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"no event within {timeout} seconds") from None
            self._over = isinstance(event, Finished | Failed)
            yield event

    def cancel(self) -> None:
        """End the request, within one token. Does not wait; once it has ended it does nothing."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self._withdraw(self)

    def put(self, event: Event) -> None:
        """For the scheduler."""
        self._events.put(event)
