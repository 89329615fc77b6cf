"""Requests that are not what they should be: an answer, or an error shaped as OpenAI's.

``Bodies`` asks the application with a real, tiny model behind it; ``Connections`` writes bytes to a
socket. What is logged as a fault of the server is one.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import uvicorn
from uvicorn.server import ServerState

import mlx_hiermem
from mlx_hiermem.serving.app import make_app
from mlx_hiermem.serving.connections import Connection
from mlx_hiermem.serving.scheduler import Scheduler
from mlx_hiermem.serving.settings import Settings
from tests.bank.mutations import mutated_json
from tests.reliability.fuzz_mutations import WORDS, anywhere
from tests.reliability.fuzz_process import Target
from tests.serving.fakes import Facts, FakeScheduler
from tests.tiny import make_tiny_model

#: Seconds after which an answer hangs, and those after which nothing more is sent.
_LONG, _PATIENCE = 60.0, 0.1
_PATHS = ["/v1/completions"] * 4 + ["/v1/chat/completions"] * 4
_OTHER_PATHS = [
    "/v1/models", "/v1/models/tiny", "/v1/models/" + "x" * 5000, "/v1/models/%00", "//", "/v1",
    "/v1/models/../..", "/health", "/metrics", "/", "", "/v1/completions/", "/v1/\ud800", "/v1/é",
    "/%ff%fe", "/v1/models/%2e%2e/%2e%2e", "/health?x=" + "y" * 9000, "*", "http://x/health",
]  # fmt: skip
_METHODS = [
    "GET",
    "POST",
    "PUT",
    "DELETE",
    "HEAD",
    "OPTIONS",
    "PATCH",
    "TRACE",
    "CONNECT",
    "X" * 99,
]
_BODIES: list[dict[str, Any]] = [
    {
        "prompt": "gold is", "model": "tiny", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9,
        "top_k": 5, "min_p": 0.01, "seed": 3, "stop": ["a", "\n"], "frequency_penalty": 0.5,
        "presence_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"65": -100, "70": 5.5},
        "logprobs": 2, "stream": True, "stream_options": {"include_usage": True}, "n": 1,
        "memory": {"route_on": "silver", "blocked": [[1, 0], [2, 3]]}, "user": "x",
    },
    {
        "messages": [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "gold"}], "name": "x"},
        ],
        "max_completion_tokens": 2, "temperature": 0, "logprobs": True, "top_logprobs": 3,
        "response_format": {"type": "text"}, "tools": [], "memory": {"path": [1, 3]},
    },
    {"prompt": ["gold", "silver"], "max_tokens": 1, "memory": "generic"},
    {"prompt": [1, 2, 3], "max_tokens": 1, "memory": "none", "temperature": 2, "top_p": 0.5},
]  # fmt: skip
#: Values that fields are given; among them those at the ends of what is allowed.
_VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, 1e-300, 1e300, -0.0, 2**31, 2**63, 2**64 - 1, 10**30, "",
    "x", "\ud800", "\0", "x" * 100_000, "9" * 5000, [], [[]], [0], [256], [257], [2**40],
    ["x"] * 20, [[1, 0]], [[1, 2**40]], [[9, 9]], {}, {"path": [0, 0]}, {"path": [2, 8]},
    {"path": [0, 8]},
    {"65": 101}, {"300": 1}, {"-1": 0}, {"role": "user"}, 1e-5, 100, -100, 1.0000001, "fetched",
]  # fmt: skip
_HEADERS: list[list[tuple[bytes, bytes]]] = [
    [(b"content-type", b"text/plain")], [(b"content-type", b"application/json; charset=latin-1")],
    [(b"content-type", b"application/json;charset=utf-8")], [], [(b"content-encoding", b"gzip")],
    [(b"content-type", b"application/json"), (b"content-length", b"99999999999999999999")],
    [(b"content-type", b"application/json"), (b"content-length", b"-5")],
    [(b"content-type", b"\xff\xfe")], [(b"origin", b"http://evil.example")],
    [(b"authorization", b"Bearer \xff")], [(b"content-type", b"x" * 70_000)],
    [(b"content-type", b"application/json"), (b"expect", b"100-continue")],
]  # fmt: skip
_JSON = [(b"content-type", b"application/json")]


class _Logged(logging.Handler):
    """Keeps what is logged as a fault of the server."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.found.append(self.format(record))

    def check(self) -> None:
        """Nothing was logged since."""
        found, self.found[:] = list(self.found), []
        assert not found, f"the server logged a fault: {found[0][-1500:]}"


def _check_error(status: int, body: bytes) -> None:
    assert 400 <= status < 500, f"status {status}: {body[:300]!r}"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert error["type"] == "invalid_request_error"
    message = error["message"]
    assert message.strip() and message.isprintable() and len(message) <= 300, repr(message)


class Bodies(Target):
    """The application over a tiny model."""

    def __init__(self, folder: Path, canary: Path) -> None:
        super().__init__(folder, canary)
        make_tiny_model(folder)
        self._logged = _Logged()
        self._scheduler = Scheduler(lambda: mlx_hiermem.load(folder), max_batch=4)
        facts = self._scheduler.start()
        settings = Settings("tiny", max_tokens=3, max_body=300_000, timeout=_LONG)
        self._app = make_app(self._scheduler, facts, settings)
        self._loop = asyncio.new_event_loop()
        for body in _BODIES[2:]:
            self._request = ("POST", "/v1/completions", _JSON, [json.dumps(body).encode()])
            assert self.look(Random(0)), "the honest request is refused"

    def change(self, random: Random) -> str:
        """Make up a request."""
        method, path, headers = "POST", random.choice(_PATHS), _JSON
        kind = random.choice(["field"] * 5 + ["json"] * 4 + ["bytes", "headers", "path"])
        honest = random.choice(_BODIES)
        if random.random() < 0.8:
            path = "/v1/chat/completions" if "messages" in honest else "/v1/completions"
        body = json.dumps(honest).encode()
        if kind == "field":
            body = _other_fields(random, honest)
        elif kind == "json":
            text = mutated_json(random, json.dumps(random.choice(_BODIES)))
            body = text.encode("utf-8", "surrogatepass")
        elif kind == "bytes":
            body = anywhere(random, body)
        elif kind == "headers":
            headers = random.choice(_HEADERS)
        else:
            method, path = random.choice(_METHODS), random.choice(_OTHER_PATHS)
        cuts = sorted(random.randrange(len(body) + 1) for _ in range(random.choice([0, 0, 3])))
        chunks = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
        self._request = method, path, headers, chunks
        return f"{method} {path[:99]} {headers} {body[:300]!r}"

    def look(self, random: Random) -> bool:
        """Ask, and look at the answer."""
        status, body = self._loop.run_until_complete(asyncio.wait_for(self._ask(), _LONG))
        self._logged.check()
        assert self._scheduler.alive, "the model's thread has ended"
        if status < 400:
            assert status == 200 and (body or self._request[0] == "HEAD"), status
            return True
        if body or self._request[0] != "HEAD":
            _check_error(status, body)
        return False

    def restore(self) -> None:
        """There is nothing to restore."""

    async def _ask(self) -> tuple[int, bytes]:
        method, path, headers, chunks = self._request
        plain, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": plain, "raw_path": plain.encode("utf-8", "replace"),
            "query_string": query.encode(), "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        left, status, found = list(chunks), 0, []

        async def receive() -> dict[str, Any]:
            if left:
                chunk = left.pop(0)
                return {"type": "http.request", "body": chunk, "more_body": bool(left)}
            await asyncio.Event().wait()  # the client stays
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                found.append(message.get("body", b""))

        app: Callable[..., Awaitable[None]] = self._app
        await app(scope, receive, send)
        return status, b"".join(found)


def _other_fields(random: Random, body: dict[str, Any]) -> bytes:
    """A body with one or two fields of other values."""
    body = dict(body)
    for _ in range(random.randint(1, 2)):
        key = random.choice([*body, "stream", "max_tokens", "memory", random.choice(WORDS)])
        inner = body.get(key)
        if isinstance(inner, dict) and random.random() < 0.5:
            body[key] = {**inner, random.choice([*inner, "x"]): random.choice(_VALUES)}
        else:
            body[key] = random.choice(_VALUES)
    return json.dumps(body).encode("utf-8", "surrogatepass")


# ---- bytes -----------------------------------------------------------------------------

_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
_BODY = b'{"prompt": "gold is", "max_tokens": 2}'
_REQUESTS = [
    _HEAD + b"Content-Length: %d\r\n\r\n" % len(_BODY) + _BODY,
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + _BODY[:5] + b"\r\n%x\r\n" % len(_BODY[5:])
    + _BODY[5:] + b"\r\n0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models HTTP/1.0\r\n\r\n",
    _HEAD + b"Content-Length: 40\r\nExpect: 100-continue\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n" * 3,
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 99,
]  # fmt: skip
_LINES = [
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"X: " + b"y" * 70_000, b"X" * 999,
    b"Transfer-Encoding: chunked, chunked", b"Host: a\r\nHost: b", b" folded", b":", b"\0: \0",
    b"X: \xff", b"Content-Length : 5", b"Connection: close", b"Expect: 100-continue", b"X:\tx\x0b",
    b"\r\n".join(b"X-%d: y" % i for i in range(300)),
]  # fmt: skip


class Connections(Target):
    """A server of the application, with a scheduler that answers from a script."""

    def __init__(self, folder: Path, canary: Path) -> None:
        super().__init__(folder, canary)
        self._logged = _Logged()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(
            lambda loop, context: self._logged.found.append(str(context))
        )
        app = make_app(FakeScheduler(), Facts(), Settings("tiny", max_body=100_000, timeout=_LONG))
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
        config.timeout_keep_alive = 0.01  # type: ignore[assignment]
        make = partial(Connection, config, ServerState(), {}, headers_within=0.01)
        server = self._loop.run_until_complete(self._loop.create_server(make, "127.0.0.1", 0))
        self._address = server.sockets[0].getsockname()[:2]
        self._sent = _REQUESTS[0]
        assert self.look(Random(0)), "the honest request is refused"

    def change(self, random: Random) -> str:
        """Make up what is sent."""
        sent = random.choice(_REQUESTS)
        kind = random.choice(["bytes", "bytes", "line", "line", "join", "cut"])
        if kind == "bytes":
            sent = anywhere(random, sent)
        elif kind == "line":
            head, blank, rest = sent.partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            lines.insert(random.randint(1, len(lines)), random.choice(_LINES))
            sent = b"\r\n".join(lines) + blank + rest
        elif kind == "join":
            sent = sent + anywhere(random, random.choice(_REQUESTS))
        else:
            sent = sent[: random.randrange(len(sent))]
        self._sent = sent
        return f"{sent[:300]!r}"

    def look(self, random: Random) -> bool:
        """Send it, and look at the answers until the connection ends."""
        data = self._loop.run_until_complete(asyncio.wait_for(self._ask(random), _LONG))
        self._logged.check()
        accepted = False
        while data:
            head, _, data = data.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 ") and b"HEAD" in self._sent:
                break  # an answer without the body that it announces
            assert head.startswith(b"HTTP/1.1 "), head[:200]
            status, body, data = _body(head, data)
            if status >= 400:
                _check_error(status, body)
            accepted = accepted or status == 200
        return accepted

    def restore(self) -> None:
        """There is nothing to restore."""

    async def _ask(self, random: Random) -> bytes:
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            size = max(1, len(self._sent) // random.choice([1, 1, 3]))
            for start in range(0, len(self._sent), size):
                writer.write(self._sent[start : start + size])
                await writer.drain()
                await asyncio.sleep(0)
            reading = asyncio.create_task(reader.read())
            if not (await asyncio.wait([reading], timeout=_PATIENCE))[0]:
                writer.write_eof()  # it waits for more
            return await reading
        except (ConnectionResetError, BrokenPipeError):
            return b""
        finally:
            writer.close()


def _body(head: bytes, data: bytes) -> tuple[int, bytes, bytes]:
    """The status of an answer, its body, and what comes behind it."""
    status = int(head[9:12])
    lines = dict(line.lower().partition(b": ")[::2] for line in head.split(b"\r\n")[1:])
    if status == 100:
        return status, b"", data
    if b"content-length" in lines:
        size = int(lines[b"content-length"])
        return status, data[:size], data[size:]
    return status, data, b""  # in chunks, or up to the end
