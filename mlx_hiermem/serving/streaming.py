"""The bridge between the scheduler's thread and the event loop, and server-sent events.

A handle's events are read by a thread of its own, which only waits, and come to the loop through
one queue per request. A client that goes away, a deadline, or the end of the server cancels the
handles, and that is all: their last events come the same way.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from .errors import ApiError, public, stopped, timed_out
from .job import Event, Failed, Finished, Told
from .objects import Writer, to_json

_LOG = logging.getLogger(__name__)

_STILL_THERE = 0.5  # seconds after which it is asked whether the generation thread still lives


class Following:
    """The events of one request's handles, in the event loop.

    Args:
        handles: one per choice.
        seconds: until the deadline, from now on.
        allowed: seconds that the server allows, for the message.
        alive: whether the generation thread lives.
        roots: folders that no message may name.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        seconds: float,
        allowed: float,
        alive: Callable[[], bool],
        roots: Sequence[str] = (),
    ) -> None:
        self._handles = handles
        self._alive = alive
        self._roots = roots
        self._allowed = allowed
        self._deadline = time.monotonic() + seconds
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._watcher: asyncio.Task[None] | None = None
        #: Whether the client has gone away.
        self.vanished = False
        for index, handle in enumerate(handles):
            threading.Thread(
                target=self._read, args=(index, handle), name="answer", daemon=True
            ).start()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def watch(self, receive: Receive) -> None:
        """Cancel when the client goes away. The body has to be read before."""
        self._watcher = asyncio.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.vanished = True
        self.cancel()

    def cancel(self) -> None:
        """End all choices, within a token."""
        for handle in self._handles:
            handle.cancel()

    def close(self) -> None:
        """Nobody wants the rest; may be called again."""
        if self._watcher is not None:
            self._watcher.cancel()
        self.cancel()

    def _read(self, index: int, handle: Any) -> None:
        """Hand a handle's events to the loop; runs in a thread."""
        ended = False
        try:
            for event in handle.events():
                ended = isinstance(event, (Finished, Failed))
                self._put(index, event)
        except Exception as error:  # whatever it is, the request has to end
            _LOG.exception("the events of an answer broke off")
            if not ended:
                self._put(index, Failed(str(error)))
            return
        if not ended:
            self._put(index, Failed("the answer broke off"))

    def _put(self, index: int, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))
        except RuntimeError:  # the loop is closed: the server has ended
            self.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Told]]:
        """The choice's number and the event, for each event of each choice. Who breaks off, or
        meets an error, calls :meth:`close`.

        Raises:
            ApiError: a choice has failed, the deadline has passed, or the thread has ended.
        """
        going = len(self._handles)
        while going:
            index, event = await self._next()
            if isinstance(event, Failed):
                raise self._failure(event)
            going -= isinstance(event, Finished)
            yield index, event

    async def _next(self) -> tuple[int, Event]:
        silent = False
        while True:
            if not self._queue.empty():
                return self._queue.get_nowait()
            left = self.left()
            if left <= 0:
                raise timed_out(self._allowed)
            try:
                wait = max(min(left, _STILL_THERE), 0.001)
                return await asyncio.wait_for(self._queue.get(), wait)
            except asyncio.TimeoutError:
                # A thread that has ended may have left its last words, so it is asked twice.
                if silent and not self._alive():
                    raise stopped() from None
                silent = not self._alive()

    def _failure(self, failed: Failed) -> ApiError:
        message = public(failed.message, self._roots)
        if failed.client_error:
            return ApiError(400, message, "memory")  # all else was checked before
        if failed.timed_out:
            return timed_out(self._allowed)
        if not self._alive():
            return stopped()
        return ApiError(500, message, code="generation_failed")


class EventStream:
    """A response of server-sent events: the chunks of an answer, then ``[DONE]``.

    Args:
        first: an event that came before, so that what fails at once has a status of its own.
        events: the others.
        writer: which writes the chunks.
        following: where the events come from.
        seen: is told each event, for the metrics.
    """

    def __init__(
        self,
        first: tuple[int, Told],
        events: AsyncIterator[tuple[int, Told]],
        writer: Writer,
        following: Following,
        seen: Callable[[int, Event], None],
    ) -> None:
        self._first, self._events, self._writer = first, events, writer
        self._following, self._seen = following, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as ASGI has it."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for data in self._datas():
                # A client that does not read blocks the sending: until the deadline, no longer.
                body = {"type": "http.response.body", "body": data, "more_body": True}
                await asyncio.wait_for(send(body), max(self._following.left(), 1.0))
            if self._following.vanished:
                raise ClientDisconnect()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.TimeoutError:
            _LOG.warning("a client did not read its answer until the deadline")
        finally:
            self._following.close()

    async def _datas(self) -> AsyncIterator[bytes]:
        writer = self._writer
        try:
            for chunk in self._told(*self._first):
                yield chunk
            async for index, event in self._events:
                for chunk in self._told(index, event):
                    yield chunk
        except ApiError as error:
            yield _data(to_json(error.to_dict()))
            return
        if self._following.vanished:
            return
        if writer.include_usage:
            yield _data(to_json(writer.last_chunk()))
        yield _data(b"[DONE]")

    def _told(self, index: int, event: Told) -> list[bytes]:
        self._seen(index, event)
        self._writer.take(index, event)
        chunk = self._writer.chunk(index, event)
        return [] if chunk is None else [_data(to_json(chunk))]


def _data(text: bytes) -> bytes:
    return b"data: " + text + b"\n\n"
