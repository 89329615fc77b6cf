"""Connections: uvicorn's, with a deadline for requests that do not come, and errors in JSON.

uvicorn ends a connection that stays idle after an answer. It waits without end for the first
request, for the rest of one that has begun, and for a body that nobody reads any more; so that a
client could hold as many connections as the system gives, and others would get none.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .objects import to_json

#: Seconds for the first line and the headers of a request.
HEADERS = 30.0


class Connection(H11Protocol):
    """uvicorn's protocol on h11; all arguments but one are its own.

    Args:
        headers_within: seconds for the head of a request, from the connection or, after an
            answer, from its first byte on.
    """

    def __init__(self, *arguments: Any, headers_within: float = HEADERS, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._headers_within = headers_within
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The deadline begins."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """The deadline ends with a request, and begins with what is not one yet."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The deadline ends."""
        self._forget()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP is told so as everything else is."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # an answer to what came before would be a second one
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = to_json(ApiError(400, "this is no valid request of HTTP/1.1").to_dict())
            headers = [
                ("content-type", "application/json"), ("content-length", str(len(body))),
                ("x-content-type-options", "nosniff"), ("connection", "close"),
            ]  # fmt: skip
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()  # a request is being answered, which has times of its own
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self._headers_within, self.transport.close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
