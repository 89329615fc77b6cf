"""ModelThread: the one thread that owns the model, and the queues through which others use it.

Notable:
- MLX arrays belong to the thread that makes them, and Gradio runs each step of a handler on any
  thread. So the model is loaded, used and closed in this thread alone; nothing that leaves it
  holds an MLX array.
- A visitor asks with :meth:`ModelThread.submit` and reads the answer from a :class:`Ticket`.
  Requests are answered one after another, in the order they came.
- A ticket that is withdrawn (Stop, or a visitor who left) ends within one token, at once if it
  still waits in line.
- An error ends its own request. If the thread itself ends, every request is told so: nobody waits
  for an answer that cannot come.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_hiermem.errors import HierMemError

if TYPE_CHECKING:
    from mlx_hiermem.engine import MemoryLM, Response


@dataclass(frozen=True)
class Level:
    """One level of the bank: ``level`` (from 1), how many ``clusters``, bytes of one block."""

    level: int
    clusters: int
    block_bytes: int


@dataclass(frozen=True)
class Facts:
    """What a page says about the model before anything is asked.

    Attributes:
        anchor_parameters: numbers in the anchor.
        context_length: in tokens, or None when the anchor's config does not say.
        levels: the levels with memory.
        fetch_bytes: of one fetched memory.
        bank_bytes: of the blocks of the whole bank.
        chat: whether the tokenizer has a chat template, so that a prompt is a question and not
            the beginning of a text.
    """

    anchor_parameters: int
    context_length: int | None
    levels: tuple[Level, ...]
    fetch_bytes: int
    bank_bytes: int
    chat: bool = False

    @classmethod
    def of(cls, lm: MemoryLM) -> Facts:
        from mlx.utils import tree_flatten

        table = [row for row in lm.bank.inspect()["levels"] if row["rank"]]
        return cls(
            anchor_parameters=sum(array.size for _, array in tree_flatten(lm.model.parameters())),
            context_length=lm.context_length,
            levels=tuple(Level(r["level"], r["clusters"], r["block_bytes"]) for r in table),
            fetch_bytes=sum(row["block_bytes"] for row in table),
            bank_bytes=sum(row["total_bytes"] for row in table),
            chat=bool(lm.tokenizer.has_chat_template),
        )


@dataclass(frozen=True)
class Ask:
    """One request: the arguments of ``MemoryLM.stream``."""

    prompt: str
    memory: str = "fetched"
    max_tokens: int = 64


@dataclass(frozen=True)
class End:
    """The last thing a ticket brings.

    Attributes:
        reason: "stop" (end of text), "length", "withdrawn" or "error".
        error: one line, for "error".
    """

    reason: str
    error: str | None = None


class Ticket:
    """A visitor's end of one request. Made by :meth:`ModelThread.submit`."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.withdrawn = threading.Event()
        self._updates: queue.SimpleQueue[Response | End] = queue.SimpleQueue()

    def take(self, timeout: float) -> list[Response | End]:
        """All that has come since the last call, in order; waits for the first.

        Args:
            timeout: seconds to wait; nothing within it gives an empty list. After an
                :class:`End`, which is always last, nothing comes any more.
        """
        updates: list[Response | End] = []
        try:
            updates.append(self._updates.get(timeout=timeout))
            while True:
                updates.append(self._updates.get_nowait())
        except queue.Empty:
            return updates

    def put(self, update: Response | End) -> None:
        """For the model's thread."""
        self._updates.put(update)


class ModelThread:
    """Owns a model.

    Args:
        load: makes the model; called in the thread.
    """

    def __init__(self, load: Callable[[], MemoryLM]) -> None:
        self._load = load
        self._line: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._change = threading.Condition()
        self._ended: str | None = None  # why no more requests are answered
        self._ready = threading.Event()
        self._facts: Facts | None = None
        self._failure: BaseException | None = None
        # A daemon: an interpreter that has to go does not wait for an answer to be written.
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    # ---- for any thread ----------------------------------------------------------------

    def start(self) -> Facts:
        """Start the thread and wait until the model is loaded.

        Raises:
            whatever ``load`` raised.
        """
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        assert self._facts is not None
        return self._facts

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._ended is None and self._thread.is_alive()

    def submit(self, ask: Ask) -> Ticket:
        """Put a request in the line."""
        ticket = Ticket(ask)
        with self._change:
            if self._ended is None:
                self._line.append(ticket)
                self._change.notify()
            else:
                ticket.put(End("error", self._ended))
        return ticket

    def ahead(self, ticket: Ticket) -> int:
        """How many requests are answered before this one; 0 when it is its turn or over."""
        with self._change:
            if ticket not in self._line:
                return 0
            return self._line.index(ticket) + (self._current is not None)

    def withdraw(self, ticket: Ticket) -> None:
        """End a request. Does not wait, and does nothing to one that has ended."""
        ticket.withdrawn.set()
        with self._change:
            if ticket in self._line:
                self._line.remove(ticket)
                ticket.put(End("withdrawn"))

    def close(self, timeout: float = 10.0) -> None:
        """End all requests, then the thread; waits ``timeout`` seconds at most."""
        self._end("the model was closed")
        with self._change:
            if self._current is not None:
                self._current.withdrawn.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # ---- in the thread -----------------------------------------------------------------

    def _run(self) -> None:
        import mlx.core as mx

        try:
            self._serve()
        finally:
            # MLX wants it of every thread that used it. Without it the process may abort when it
            # ends soon after the thread.
            mx.clear_streams()

    def _serve(self) -> None:
        try:
            lm = self._load()
            self._facts = Facts.of(lm)
        except BaseException as error:
            self._failure = error
            self._end("the model could not be loaded")
            return
        finally:
            self._ready.set()
        try:
            while (ticket := self._next()) is not None:
                self._answer(lm, ticket)
        finally:
            self._end("the model's thread has ended; start the demo again")
            lm.bank.close()

    def _next(self) -> Ticket | None:
        with self._change:
            self._current = None
            while not self._line and self._ended is None:
                self._change.wait()
            if self._ended is None:
                self._current = self._line.popleft()
            return self._current

    def _answer(self, lm: MemoryLM, ticket: Ticket) -> None:
        end = End("error", "the model's thread has ended; start the demo again")
        try:
            # Closed by name: a generator left to the garbage collector could end anywhere.
            with closing(_stream(lm, ticket.ask)) as responses:
                for response in responses:
                    if ticket.withdrawn.is_set():
                        end = End("withdrawn")
                        break
                    ticket.put(response)
                    if response.finish_reason is not None:
                        end = End(response.finish_reason)
        except HierMemError as error:
            end = End("error", str(error))
        except Exception as error:
            traceback.print_exc()
            end = End("error", f"{type(error).__name__}: {error} (a fault of ours; see the log)")
        finally:
            ticket.put(end)

    def _end(self, reason: str) -> None:
        with self._change:
            if self._ended is None:
                self._ended = reason
            for ticket in self._line:
                ticket.put(End("error", self._ended))
            self._line.clear()
            self._change.notify_all()


def _stream(lm: MemoryLM, ask: Ask) -> Iterator[Response]:
    from mlx_hiermem.conversation import chat_tokens

    prompt: str | list[int] = ask.prompt
    if lm.tokenizer.has_chat_template and prompt.strip():
        prompt = chat_tokens(lm, [{"role": "user", "content": prompt}])
    return lm.stream(prompt, ask.memory, ask.max_tokens, route_on=ask.prompt)
