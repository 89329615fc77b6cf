"""A scheduler that answers from a script, for tests of what is around it; and how to ask an app."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from mlx_hiermem.errors import InputError
from mlx_hiermem.serving.app import make_app
from mlx_hiermem.serving.job import (
    Dead,
    Event,
    Finished,
    Full,
    Job,
    Piece,
    Started,
    TokenLogprob,
    TopLogprob,
)
from mlx_hiermem.serving.settings import Settings

FETCH = {
    "bytes": 12,
    "ms": 0.5,
    "blocks": [
        {"level": 1, "cluster": 2, "bytes": 8, "ms": 0.2, "source": "resident", "blocked": False},
        {"level": 2, "cluster": 7, "bytes": 4, "ms": 0.3, "source": "disk", "blocked": False},
    ],
}
TOKENS = (
    TokenLogprob(5, "he", -0.5, (TopLogprob(5, "he", -0.5), TopLogprob(6, "ho", -2.0))),
    TokenLogprob(7, "llo", float("-inf"), (TopLogprob(7, "llo", float("-inf")),)),
)


@dataclass
class Facts:
    """What a scheduler tells of its model."""

    vocabulary: int | None = 257
    context_length: int | None = 64
    has_chat_template: bool = True


def hello(job: Job) -> Iterator[Event]:
    """An answer of two tokens."""
    told = TOKENS if job.top_logprobs is not None else ()
    yield Started((2, 7), job.memory.kind, FETCH, 3, len(job.tokens))
    yield Piece("he", told[:1])
    yield Piece("llo", told[1:])
    yield Finished("stop", len(job.tokens), 2, 3)


@dataclass
class FakeHandle:
    """Plays a script; ``ended`` is set when it was cancelled."""

    script: Callable[[Job], Iterator[Event]]
    job: Job
    ended: threading.Event = field(default_factory=threading.Event)

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        for event in self.script(self.job):
            yield event
            if self.ended.is_set():
                yield Finished("cancelled", len(self.job.tokens))
                return

    def cancel(self) -> None:
        self.ended.set()


class FakeScheduler:
    """Takes jobs and keeps them; ``room`` is how many more it takes."""

    def __init__(self, script: Callable[[Job], Iterator[Event]] = hello) -> None:
        self.script = script
        self.handles: list[FakeHandle] = []
        self.room = 10**6
        self.alive = True

    @property
    def job(self) -> Job:
        """The newest."""
        return self.handles[-1].job

    def submit(self, job: Job) -> FakeHandle:
        if not self.alive:
            raise Dead("the thread has ended")
        if len(self.handles) >= self.room:
            raise Full("as many wait as may")
        self.handles.append(FakeHandle(self.script, job))
        return self.handles[-1]

    def stats(self) -> dict[str, Any]:
        return {"waiting": 3, "running": 2}

    def tokenize(self, text: str) -> list[int]:
        if text == "unreadable":
            raise InputError("/home/somebody/model/tokenizer.json: it cannot read this")
        return list(text.encode())

    def tokenize_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return list("".join(one["content"] for one in messages).encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(token % 256 for token in tokens).decode("latin-1")


class Asker:
    """An app over a fake scheduler, and a client of it without a socket."""

    def __init__(self, script: Callable[[Job], Iterator[Event]] = hello, **settings: Any) -> None:
        self.scheduler = FakeScheduler(script)
        self.facts = Facts()
        self.app = make_app(self.scheduler, self.facts, Settings(model="tiny", **settings))

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        """One request, as httpx takes it."""
        return asyncio.run(self.send(method, path, **request))

    async def send(self, method: str, path: str, **request: Any) -> httpx.Response:
        """One request, within a loop."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    def post(self, path: str, body: Any) -> httpx.Response:
        """A POST of JSON, to a path under ``/v1``."""
        # In ASCII, so that it may hold what is no Unicode.
        headers = {"content-type": "application/json"}
        return self.ask("POST", f"/v1{path}", content=json.dumps(body), headers=headers)

    def complete(self, **body: Any) -> httpx.Response:
        """A completion; the prompt is "gold is" if none is named."""
        return self.post("/completions", {"prompt": "gold is", **body})

    def chat(self, **body: Any) -> httpx.Response:
        """A chat completion of one message, if none is named."""
        messages = [{"role": "user", "content": "gold is"}]
        return self.post("/chat/completions", {"messages": messages, **body})
