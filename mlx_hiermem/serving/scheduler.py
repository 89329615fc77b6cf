"""Scheduler: the one thread that owns the model, and the line of requests before it.

Notable:
- MLX arrays belong to the thread that makes them: the model is loaded, used and closed in this
  thread alone, and nothing that leaves it holds an MLX array.
- All requests are answered at once, as far as there is room in the batch; the others wait in line,
  and hold nothing meanwhile but their tokens.
- An error ends its own request. If the thread itself ends, every request is told so: nobody waits
  for an answer that cannot come.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import HierMemError, InputError
from .counts import Counts
from .facts import Facts, Words
from .job import Dead, Failed, Finished, Full, Handle, Job

if TYPE_CHECKING:
    from ..engine import MemoryLM
    from .batch import Batch

__all__ = ["Dead", "Facts", "Full", "Scheduler"]

_LOG = logging.getLogger(__name__)

PROMPT_CACHE_BYTES = 1 << 30
_CLOSING = "the server is closing; ask again later"


class Scheduler:
    """Answers requests with one model.

    Args:
        load: makes the model; called in the thread.
        max_batch: requests that are answered at once.
        max_waiting: requests that may wait for one of those places.
        prompt_cache_bytes: of keys and values kept of texts that have ended; 0 keeps none.
        time_limit: seconds that a request may take, waiting included; None is no limit.
    """

    def __init__(
        self,
        load: Callable[[], MemoryLM],
        *,
        max_batch: int = 32,
        max_waiting: int = 64,
        prompt_cache_bytes: int = PROMPT_CACHE_BYTES,
        time_limit: float | None = None,
    ) -> None:
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("max_waiting", max_waiting, 1),
            ("prompt_cache_bytes", prompt_cache_bytes, 0),
        ):
            if value < least:
                raise InputError(f"{name} is {value}; expected at least {least}")
        self._load = load
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._prompt_cache_bytes = prompt_cache_bytes
        self._time_limit = time_limit
        self._line: deque[Handle] = deque()
        self._change = threading.Condition()
        self._ended: str | None = None  # why no more requests are taken
        self._drop = False  # whether those that were taken are ended too
        self._counts = Counts()
        self._facts: Facts | None = None
        self._words: Words | None = None
        self._failure: BaseException | None = None
        self._ready = threading.Event()
        # A daemon: an interpreter that has to go does not wait for an answer to be written.
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    # ---- for any thread ----------------------------------------------------------------

    def start(self) -> Facts:
        """Start the thread, if nobody has, and wait until the model is loaded.

        Raises:
            whatever ``load`` raised.
        """
        with self._change:
            if self._thread.ident is None:
                self._thread.start()
        self._ready.wait()
        if self._facts is None:
            assert self._failure is not None
            raise self._failure
        return self._facts

    @property
    def alive(self) -> bool:
        """Whether the thread lives; it may be closing."""
        return self._failure is None and self._thread.is_alive()

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread, if it was not :meth:`close`."""
        return self._failure

    def submit(self, job: Job) -> Handle:
        """Put a request in the line.

        Raises:
            InputError: it cannot be answered by any model of this size: no token, or more than the
                context holds; a token that does not exist; nothing to route.
            Full: too many wait already.
            Dead: the thread has ended, or is closing.
        """
        if self._facts is None:
            raise Dead(self._ended or "the model is not loaded; call start first")
        self._facts.check(job)
        limits = [limit for limit in (job.time_limit, self._time_limit) if limit is not None]
        handle = Handle(job, min(limits, default=None), self._withdraw)
        with self._change:
            if self._ended is not None:
                raise Dead(self._ended)
            if len(self._line) >= self._max_waiting:
                self._counts.add(refused_full=1)
                raise Full(
                    f"{len(self._line)} requests wait already, which is the most; ask again later"
                )
            self._counts.add(submitted=1)
            self._line.append(handle)
            self._change.notify_all()
        return handle

    def stats(self) -> dict[str, int]:
        """Numbers for ``/metrics``.

        Counters: submitted, refused_full, finished_stop, finished_length, finished_cancelled,
        failed_client, failed_server, failed_timeout, prompt_tokens, cached_tokens,
        completion_tokens, steps, fetched_bytes, fetched_bytes_read. Gauges: waiting, running,
        prompt_cache_bytes, prompt_cache_entries, bank_bytes_held, slots_made.
        """
        return {**self._counts.read(), "waiting": len(self._line)}

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text as a prompt; see ``Words``."""
        return self._tokenizer().tokenize(text)

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation under the chat template; see ``Words``."""
        return self._tokenizer().tokenize_chat(messages)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self._tokenizer().decode(tokens)

    def _tokenizer(self) -> Words:
        if self._words is None:
            raise Dead("the model is not loaded; call start first")
        return self._words

    def close(self, drain: bool = True, timeout: float = 30.0) -> None:
        """Take no more requests, and end the thread.

        Args:
            drain: answer those that were taken first; otherwise they fail within a token.
            timeout: seconds to wait for that. What is not answered by then fails.
        """
        self._end(_CLOSING)
        if not drain:
            self._hurry()
        if self._thread.is_alive():
            self._thread.join(timeout)
            if self._thread.is_alive():
                self._hurry()
                self._thread.join(1.0)

    def _hurry(self) -> None:
        with self._change:
            self._drop = True
            self._change.notify_all()

    def _end(self, reason: str) -> None:
        with self._change:
            self._ended = self._ended or reason
            self._change.notify_all()

    def _withdraw(self, handle: Handle) -> None:
        """A request was cancelled: one that waits ends here, one in the batch at the next token."""
        with self._change:
            if handle in self._line:
                self._line.remove(handle)
                self._counts.add(finished_cancelled=1)
                handle.put(Finished("cancelled", len(handle.job.tokens)))

    # ---- in the thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._own()
        except BaseException as error:
            if self._facts is None and not isinstance(error, HierMemError):
                _LOG.critical("the model could not be loaded", exc_info=error)
            # Its frames hold the model, which has to go in this thread.
            self._failure = error.with_traceback(None)
        finally:
            self._end("the model's thread has ended; start the server again")
            self._ready.set()
            self._fail_all([])
            import mlx.core as mx

            # What is left of the model and its caches goes now, in the thread that made it. MLX
            # wants its streams cleared in every thread that used them.
            gc.collect()
            mx.clear_streams()

    def _own(self) -> None:
        """Load the model, answer until the end, close it."""
        from .batch import Batch

        lm = self._load()
        try:
            facts = Facts.of(lm)
            batch = Batch(
                lm, facts.vocabulary, self._max_batch, self._prompt_cache_bytes, self._counts
            )
            self._words = Words(lm.tokenizer)
            self._facts = facts
            self._ready.set()
            try:
                self._serve(batch)
            except BaseException as error:
                _LOG.critical("the model's thread has ended", exc_info=error)
                # Before anybody is told: who asks then is told the same.
                self._failure = error.with_traceback(None)
                self._end("the model's thread has ended; start the server again")
                raise
            finally:
                self._fail_all(batch.handles)
                batch.close()
        finally:
            lm.bank.close()

    def _serve(self, batch: Batch) -> None:
        while self._wait(batch):
            self._sweep(batch)
            for handle in self._next(batch.room):
                batch.admit(handle)
            if len(batch):
                batch.step()

    def _wait(self, batch: Batch) -> bool:
        """Wait for something to do; False when that is nothing any more."""
        with self._change:
            while not self._line and not len(batch) and self._ended is None:
                self._change.wait()
            return not self._drop and (bool(self._line) or len(batch) > 0)

    def _next(self, count: int) -> list[Handle]:
        """The first in line that still want an answer; those whose time is over are told so."""
        with self._change:
            late = [handle for handle in self._line if _late(handle)]
            for handle in late:
                self._line.remove(handle)
                self._counts.add(failed_timeout=1)
                handle.put(_TOO_LATE)
            return [self._line.popleft() for _ in range(min(count, len(self._line)))]

    def _sweep(self, batch: Batch) -> None:
        """End those in the batch that were cancelled, or whose time is over."""
        handles = batch.handles
        batch.drop([handle for handle in handles if handle.cancelled])
        batch.drop([handle for handle in batch.handles if _late(handle)], _TOO_LATE)

    def _fail_all(self, running: Sequence[Handle]) -> None:
        """Tell everybody who still waits for something that it will not come."""
        message = _CLOSING if self._failure is None else "the model's thread has ended"
        with self._change:
            handles = [*running, *self._line]
            self._line.clear()
        self._counts.add(failed_server=len(handles))
        self._counts.set(running=0)
        for handle in handles:
            handle.put(Failed(message))


_TOO_LATE = Failed("the request took longer than it may; ask for less, or later", timed_out=True)


def _late(handle: Handle) -> bool:
    return handle.deadline is not None and time.monotonic() > handle.deadline
