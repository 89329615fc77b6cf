"""ModelThread: the one thread that owns the model, and the queues through which others use it.

Notable:
- MLX arrays belong to the thread that makes them, and Gradio runs each step of a handler on any
  thread. So the model is loaded, used and closed in this thread alone; nothing that leaves it
  holds an MLX array.
- A visitor asks with :meth:`ModelThread.submit` and reads the answer from a :class:`Ticket`. One
  group of requests is answered after another; visitors take turns (``line.FairLine``).
- The requests of one group are answered together, a token of each in turn.
- A ticket that is withdrawn (Stop, or a visitor who left) ends within one token, at once if it
  still waits in line.
- An error ends its own request. If the thread itself ends, every request is told so: nobody waits
  for an answer that cannot come.
- What a visitor has (blocks, a pinned path, a conversation) is in the request, or kept under the
  visitor's name; the bank itself is the same for all.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_hiermem.errors import HierMemError

from .answers import Answers
from .facts import Facts
from .folders import without_folders
from .line import FairLine
from .tickets import Ask, Began, End, Ticket

if TYPE_CHECKING:
    from mlx_hiermem.engine import MemoryLM, Response

T = TypeVar("T")

_GONE = "the model's thread has ended; start the demo again"


@dataclass(frozen=True, eq=False)
class _Group:
    """Requests that are answered together."""

    visitor: Hashable
    tickets: tuple[Ticket, ...]


class ModelThread:
    """Owns a model.

    Args:
        load: makes the model; called in the thread.
        private: folders that no visitor is to see.
    """

    def __init__(self, load: Callable[[], MemoryLM], private: Sequence[str] = ()) -> None:
        self._load = load
        self._private = private
        self._line: FairLine[_Group] = FairLine()
        self._current: _Group | None = None
        self._calls: deque[tuple[Callable[[MemoryLM], Any], Future[Any]]] = deque()
        self._change = threading.Condition()
        self._ended: str | None = None  # why no more requests are answered
        self._ready = threading.Event()
        self._facts: Facts | None = None
        self._failure: BaseException | None = None
        self._answers = Answers()
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

    def submit(self, ask: Ask, visitor: Hashable = None) -> Ticket:
        """Put a request in the line."""
        return self.submit_together([ask], visitor)[0]

    def submit_together(self, asks: Sequence[Ask], visitor: Hashable = None) -> tuple[Ticket, ...]:
        """Put requests in the line that are answered together, with one place in it.

        Args:
            visitor: whose turn they take, and whose conversation they belong to.
        """
        tickets = tuple(Ticket(ask) for ask in asks)
        with self._change:
            if self._ended is None:
                self._line.put(visitor, _Group(visitor, tickets))
                self._change.notify()
            else:
                for ticket in tickets:
                    ticket.put(End("error", self._ended))
        return tickets

    def ahead(self, ticket: Ticket) -> int:
        """How many groups are answered before this one; 0 when it is its turn or over."""
        with self._change:
            group = self._waiting(ticket)
            if group is None:
                return 0
            return (self._line.ahead(group) or 0) + (self._current is not None)

    def _waiting(self, ticket: Ticket) -> _Group | None:
        return next((group for group in self._line if ticket in group.tickets), None)

    def withdraw(self, ticket: Ticket) -> None:
        """End a request. Does not wait, and does nothing to one that has ended."""
        with self._change:
            group = self._waiting(ticket)
            if group is not None and not ticket.withdrawn.is_set():
                ticket.put(End("withdrawn"))
            ticket.withdrawn.set()
            if group is not None and all(one.withdrawn.is_set() for one in group.tickets):
                self._line.remove(group)

    def forget(self, visitor: Hashable) -> None:
        """A visitor has left: end what they have asked for, and drop their conversation."""
        with self._change:
            groups = [group for group in self._line if group.visitor == visitor]
            if self._current is not None and self._current.visitor == visitor:
                groups.append(self._current)
        for ticket in (ticket for group in groups for ticket in group.tickets):
            self.withdraw(ticket)
        self.end_conversation(visitor)

    def end_conversation(self, visitor: Hashable) -> Future[Any]:
        """The visitor's next turn begins a new conversation."""
        return self.call(lambda lm: self._answers.drop(visitor))

    def conversations(self) -> int:
        """How many visitors have a conversation."""
        return len(self._answers.conversations)

    def call(self, function: Callable[[MemoryLM], T]) -> Future[T]:
        """Have a short function called with the model, in its thread, between two tokens.

        Returns:
            Its result, which must hold no MLX array; or what it raised.
        """
        future: Future[T] = Future()
        with self._change:
            if self._ended is None:
                self._calls.append((function, future))
                self._change.notify()
            else:
                future.set_exception(RuntimeError(self._ended))
        return future

    def close(self, timeout: float = 10.0) -> None:
        """End all requests, then the thread; waits ``timeout`` seconds at most."""
        self._end("the model was closed")
        with self._change:
            if self._current is not None:
                for ticket in self._current.tickets:
                    ticket.withdrawn.set()
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
            while (group := self._next(lm)) is not None:
                self._answer(lm, group)
        finally:
            self._end(_GONE)
            self._answers.conversations.clear()
            lm.bank.close()

    def _next(self, lm: MemoryLM) -> _Group | None:
        while True:
            self._make_calls(lm)
            with self._change:
                self._current = None
                while not self._line and not self._calls and self._ended is None:
                    self._change.wait()
                if self._ended is not None:
                    return None
                if self._calls:
                    continue
                group = self._line.take()
                # Those withdrawn so far were told so; the others are told when they have ended.
                going = tuple(one for one in group.tickets if not one.withdrawn.is_set())
                self._current = _Group(group.visitor, going)
                return self._current

    def _make_calls(self, lm: MemoryLM) -> None:
        while True:
            with self._change:
                if not self._calls:
                    return
                function, future = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(lm))
                except Exception as error:
                    future.set_exception(error)

    def _answer(self, lm: MemoryLM, group: _Group) -> None:
        """A token of each request in turn, until all have ended."""
        going = list(group.tickets)
        # mlx-lm sets a limit while a generator is open, and puts back what it found. So they are
        # closed in the reverse order, by name: left to the garbage collector they could end
        # anywhere.
        try:
            with ExitStack() as stack:
                runs: deque[tuple[Ticket, Generator[Began | Response, None, None]]] = deque()
                for ticket in group.tickets:
                    responses = self._answers.stream(lm, ticket.ask, group.visitor)
                    runs.append((ticket, stack.enter_context(closing(responses))))
                while runs:
                    ticket, responses = runs.popleft()
                    self._make_calls(lm)
                    end = self._step(ticket, responses)
                    if end is None:
                        runs.append((ticket, responses))
                    else:
                        going.remove(ticket)
                        ticket.put(end)
        finally:
            for ticket in going:
                ticket.put(End("error", _GONE))

    def _step(self, ticket: Ticket, responses: Iterator[Began | Response]) -> End | None:
        """Bring one piece of an answer; how it ended, if it has."""
        if ticket.withdrawn.is_set():
            return End("withdrawn")
        try:
            for update in responses:
                if ticket.withdrawn.is_set():
                    return End("withdrawn")
                ticket.put(update)
                if isinstance(update, Began):
                    continue  # the piece that it announces is there
                return None if update.finish_reason is None else End(update.finish_reason)
            return End("length")
        except HierMemError as error:
            print(f"answer: {error}", file=sys.stderr, flush=True)
            return End("error", without_folders(str(error), self._private))
        except Exception as error:
            traceback.print_exc()
            return End("error", f"{type(error).__name__} (a fault of ours; see the server's log)")

    def _end(self, reason: str) -> None:
        with self._change:
            if self._ended is None:
                self._ended = reason
            for group in self._line:
                for ticket in group.tickets:
                    if not ticket.withdrawn.is_set():
                        ticket.put(End("error", self._ended))
            self._line.clear()
            while self._calls:
                self._calls.popleft()[1].set_exception(RuntimeError(self._ended))
            self._change.notify_all()
