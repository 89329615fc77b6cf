"""Clients of the server, and the two ways to it: the scheduler itself, and HTTP.

A client is a thread that asks and reads, as a program elsewhere would.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.serving.job import Failed, Finished, Job, Piece, Sampling
from mlx_hiermem.serving.memory import MemoryChoice
from mlx_hiermem.serving.scheduler import Scheduler

from .harness import resident_memory

_ROOT = Path(__file__).parents[1]
_PATIENCE = 300.0  # seconds without a word, after which a request counts as lost


@dataclass(frozen=True)
class Question:
    """What a client asks, greedily.

    Attributes:
        text: the prompt.
        memory: a word, or a path.
        max_tokens: of the answer.
    """

    text: str
    memory: str | tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Told:
    """What a client was told.

    Attributes:
        text: the answer.
        tokens: of the answer; of one that vanished, pieces; 0 where the end never came.
        first, last: seconds until the first and the last piece.
        ended: False for one that vanished.
    """

    text: str
    tokens: int
    first: float
    last: float
    ended: bool = True


class Server(Protocol):
    """A way to ask."""

    def ask(self, question: Question, vanish_after: int | None = None) -> Told:
        """Ask, and read to the end, or go away after so many pieces."""

    def resident(self) -> int:
        """Resident memory of the server's process, in bytes."""

    def close(self) -> None:
        """End it."""


class _Watch:
    """The pieces of one answer, with their times."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._texts: list[str] = []
        self._times: list[float] = []

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._times.append(time.perf_counter() - self._started)

    def told(self, tokens: int, ended: bool = True) -> Told:
        times = self._times or [time.perf_counter() - self._started]
        return Told("".join(self._texts), tokens, times[0], times[-1], ended)


class Direct:
    """The scheduler in this process."""

    def __init__(self, load: Callable[[], MemoryLM], prompt_cache_bytes: int) -> None:
        self._scheduler = Scheduler(load, prompt_cache_bytes=prompt_cache_bytes)
        self._scheduler.start()

    def ask(self, question: Question, vanish_after: int | None = None) -> Told:
        """As :class:`Server`."""
        named = isinstance(question.memory, str)
        memory = MemoryChoice(question.memory) if named else MemoryChoice("path", question.memory)
        tokens = self._scheduler.tokenize(question.text)
        watch = _Watch()
        job = Job(tokens, question.text, memory, question.max_tokens, Sampling(temperature=0.0))
        handle = self._scheduler.submit(job)
        for event in handle.events(_PATIENCE):
            if isinstance(event, Piece):
                watch.add(event.text)
                if len(watch) == vanish_after:
                    handle.cancel()
                    return watch.told(len(watch), ended=False)
            elif isinstance(event, Finished):
                return watch.told(event.completion_tokens)
            elif isinstance(event, Failed):
                raise HierMemError(event.message)
        raise HierMemError("a request ended without an end")

    def resident(self) -> int:
        """As :class:`Server`."""
        return resident_memory()

    def close(self) -> None:
        """As :class:`Server`."""
        self._scheduler.close(drain=False)


class Http:
    """``mlx_hiermem serve`` in a process of its own."""

    def __init__(self, folder: Path, prompt_cache_bytes: int) -> None:
        command = [sys.executable, "-m", "mlx_hiermem", "serve", "--model", str(folder)]
        command += ["--port", "0", "--log-level", "error"]
        command += ["--prompt-cache-bytes", str(prompt_cache_bytes)]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if "//" not in line:
            raise HierMemError("the server did not start; see above")
        self._address = line.split("//")[1].split("/")[0]

    def ask(self, question: Question, vanish_after: int | None = None) -> Told:
        """As :class:`Server`."""
        named = isinstance(question.memory, str)
        body = {
            "prompt": question.text,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "memory": question.memory if named else {"path": question.memory},
        }
        watch, tokens = _Watch(), 0
        with closing(http.client.HTTPConnection(self._address, timeout=_PATIENCE)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            for chunk in _chunks(connection.getresponse()):
                for choice in chunk["choices"]:
                    if choice["text"]:
                        watch.add(choice["text"])
                        if len(watch) == vanish_after:
                            return watch.told(len(watch), ended=False)
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
        return watch.told(tokens)

    def resident(self) -> int:
        """As :class:`Server`."""
        import psutil

        return psutil.Process(self._process.pid).memory_info().rss

    def close(self) -> None:
        """As :class:`Server`."""
        self._process.terminate()
        self._process.wait(_PATIENCE)


def _chunks(response: http.client.HTTPResponse) -> Iterator[dict]:
    """The objects of a stream of server-sent events."""
    if response.status != 200:
        raise HierMemError(f"the server answered {response.status}: {response.read()[:300]!r}")
    for line in response:
        data = line.decode().removeprefix("data:").strip()
        if line.startswith(b"data:") and data != "[DONE]":
            chunk = json.loads(data)
            if "error" in chunk:
                raise HierMemError(f"the server answered {data[:300]}")
            yield chunk
    # A stream that broke off has no usage, and counts as lost.


def together(server: Server, questions: Sequence[Question]) -> list[Told]:
    """One client for each question, all at once.

    Raises:
        HierMemError: an answer did not come, or is shorter than was asked for.
    """
    told: list[Told | Exception] = [HierMemError("no answer")] * len(questions)

    def ask(number: int) -> None:
        try:
            told[number] = server.ask(questions[number])
        except Exception as error:
            told[number] = error

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = []
    for one, question in zip(told, questions, strict=True):
        if isinstance(one, Exception):
            raise one
        if one.tokens != question.max_tokens:
            raise HierMemError(f"{one.tokens} tokens came where {question.max_tokens} were due")
        found.append(one)
    return found
