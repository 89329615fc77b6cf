"""What the scheduler's tests share: a running scheduler on a tiny model, and its answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_hiermem import load
from mlx_hiermem.serving.job import (
    Failed,
    Finished,
    Handle,
    Job,
    Piece,
    Sampling,
    Started,
    TokenLogprob,
)
from mlx_hiermem.serving.memory import MemoryChoice
from mlx_hiermem.serving.scheduler import Scheduler

LONG = 240  # tokens: an answer that is still going on
WAIT = 60.0  # seconds, after which something hangs
GREEDY = Sampling(temperature=0.0)


@dataclass
class Answered:
    """All that came of a request."""

    started: Started | None
    pieces: list[Piece]
    end: Finished | Failed

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[TokenLogprob]:
        return [token for piece in self.pieces for token in piece.tokens]


def read(handle: Handle) -> Answered:
    """Wait for a request's end."""
    events = list(handle.events(WAIT))
    started = [event for event in events if isinstance(event, Started)]
    pieces = [event for event in events if isinstance(event, Piece)]
    assert isinstance(events[-1], Finished | Failed)
    assert len(events) == len(started) + len(pieces) + 1
    return Answered(started[0] if started else None, pieces, events[-1])


def memory(what: Any = "fetched", blocked: Any = (), route_on: str | None = None) -> MemoryChoice:
    """A choice, written as ``MemoryLM.generate`` takes it."""
    kind, path = (what, None) if isinstance(what, str) else ("path", tuple(what))
    return MemoryChoice(kind, path, route_on, frozenset(blocked))


def job(prompt: str, what: Any = "fetched", max_tokens: int = 16, **options: Any) -> Job:
    """A job on the tiny model, whose tokens are bytes; greedy unless told otherwise."""
    choice = what if isinstance(what, MemoryChoice) else memory(what)
    options.setdefault("sampling", GREEDY)
    return Job(list(ids(prompt)), prompt, choice, max_tokens, **options)


def ids(text: str) -> Iterator[int]:
    """The tiny model's tokens of ASCII text: its letters are numbered in their order."""
    from tests.tiny import _LETTERS

    return (_LETTERS.index("Ġ" if letter == " " else letter) for letter in text)


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Scheduler]:
    """A scheduler on the model in ``folder``."""
    scheduler = Scheduler(lambda: load(folder), **options)
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.close(drain=False, timeout=WAIT)
        assert not scheduler.alive


def answers(scheduler: Scheduler, jobs: list[Job]) -> list[Answered]:
    """Ask all at once, and wait for all."""
    return [read(handle) for handle in [scheduler.submit(one) for one in jobs]]


def begun(handle) -> Started:
    """Wait until a request is in the batch."""
    event = next(handle.events(WAIT))
    assert isinstance(event, Started)
    return event


class Gate:
    """A model that goes on only when it is let: so that a test knows who waits and who runs."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.open = threading.Event()
        self.calls = 0
        self.error: BaseException | None = None

    def __call__(self):
        lm = load(self.folder)
        anchor = lm.model.anchor
        gate = self

        class Gated(type(anchor)):
            def __call__(self, *args, **options):
                gate.calls += 1
                gate.open.wait(WAIT)
                if gate.error is not None:
                    raise gate.error
                return super().__call__(*args, **options)

        anchor.__class__ = Gated
        return lm
