"""What every request passes first: the API key, the web page it comes from, and the counting."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, busy, stopped
from .metrics import Metrics
from .objects import to_json
from .settings import Settings

_VANISHED = "499"  # the status that proxies note for clients that went away


class Gate:
    """Middleware that lets a request in, or answers it, and counts it either way.

    A browser that carries a request from a web page names that page. Those that nobody has allowed
    are refused, so that no page on the internet can use a server on this machine.

    Args:
        app: what is behind it.
        settings: key, origins and the most requests at once.
        metrics: where it counts.
        paths: the endpoints that it counts by name; all others are one.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, paths: Sequence[str]
    ) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())
        self._origins = settings.allow_origins
        self._max_open = settings.max_open
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = "500", False

        async def told(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                begun = True
                status = str(message["status"])
                # What is in it is data, whatever it looks like.
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        self._open += 1
        self._metrics.open.set(self._open)
        try:
            error = self._refusal(scope)
            if error is None:
                await self._app(scope, receive, told)
            else:
                await _send(error, told)
        except ClientDisconnect:
            status = _VANISHED  # nobody is there to answer
        except asyncio.CancelledError:
            # The server ends, and does not wait any longer. Half a stream just breaks off.
            if not begun:
                await _send(stopped(), told)
        finally:
            self._open -= 1
            self._metrics.open.set(self._open)
            self._metrics.requests.add(1, self._endpoint(scope["path"]), status)

    def _endpoint(self, path: str) -> str:
        if path.startswith("/v1/models/"):
            return "/v1/models"
        return path if path in self._paths else "other"

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and not {"*", origin} & set(self._origins):
            return ApiError(
                403, "web pages of this origin may not ask; --allow-origin lets them",
                code="origin_not_allowed",
            )  # fmt: skip
        if scope["path"] == "/health":
            return None
        if self._key is not None and not self._fits(headers.get("authorization", "")):
            return ApiError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        if scope["method"] == "POST" and self._open > self._max_open:
            return busy("too many requests are open; come again later", 2, "server_busy")
        return None

    def _fits(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        # Of equal length whatever was sent, and compared in constant time.
        given = _digest(key.strip().encode("latin-1"))
        return hmac.compare_digest(given, self._key or b"") and scheme.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _send(error: ApiError, send: Send) -> None:
    body: Any = to_json(error.to_dict())
    # Not the end of the connection: its body may still come, and an answer before would be lost.
    headers = {
        "content-type": "application/json", "content-length": str(len(body)), **error.headers,
    }  # fmt: skip
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
