"""Connections that hold a place and ask for nothing are ended; those that are answered are not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from mlx_hiermem.serving.connections import HEADERS, Connection
from tests.serving.processes import LONG

WITHIN = 0.05  # seconds that the tests give a request
HELLO = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers once the body is there, or at once to a GET."""
    body = b"none"
    if scope["method"] == "POST":
        body = (await receive())["body"]
        while len(body) < 2:
            body += (await receive())["body"]
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def connected(within: float = WITHIN) -> AsyncIterator[Streams]:
    """A connection to a server that never ends one for being idle between two requests."""
    config = uvicorn.Config(echo, ws="none", lifespan="off", log_config=None)
    config.timeout_keep_alive = LONG
    loop, faults = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda loop, context: faults.append(context))
    make = partial(Connection, config, ServerState(), {}, headers_within=within)
    server = await loop.create_server(make, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    try:
        yield reader, writer
    finally:
        writer.close()
        server.close()
    assert not faults


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test in an event loop; what hangs fails."""
    asyncio.run(asyncio.wait_for(test(), LONG))


async def answer(reader: asyncio.StreamReader) -> bytes:
    """The body of one answer, of status 200."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return await reader.readexactly(int(length))


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"GET /hea", b"GET / HTTP/1.1\r\nhost: x\r\n",  # no request at all
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET / HT",  # no second one
        # A body that nobody reads any more.
        b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 999\r\n\r\nx",
    ],
)  # fmt: skip
@pytest.mark.parametrize("drips", [False, True])
def test_requests_that_never_come_are_not_waited_for(sent, drips):
    async def test() -> None:
        async with connected() as (reader, writer):
            first, _, rest = sent.partition(b"\r\n\r\n")
            writer.write(sent[: len(first) + 4])
            if len(sent) > len(first):
                await answer(reader)
                writer.write(rest)

            async def drip() -> None:
                while sent and drips:
                    writer.write(b"x")
                    await asyncio.sleep(WITHIN / 5)

            dripping = asyncio.create_task(drip())
            try:
                assert await reader.read() == b""
            except ConnectionResetError:
                assert drips  # the last drip came too late
            dripping.cancel()

    run(test)


def test_what_is_asked_and_answered_is_not_cut():
    async def test() -> None:
        async with connected() as (reader, writer):
            for _ in range(2):
                writer.write(HELLO)
                await asyncio.sleep(4 * WITHIN)  # a slow body
                writer.write(b"hi")
                assert await answer(reader) == b"hi"
                await asyncio.sleep(4 * WITHIN)  # idle, for which uvicorn has a time

    run(test)


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"]
)
def test_what_is_no_http_is_told_so_in_json(sent):
    async def test() -> None:
        async with connected(HEADERS) as (reader, writer):
            writer.write(sent)
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ") and b"connection: close" in head.lower()
            assert b"content-type: application/json" in head.lower()
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}

    run(test)


def test_a_body_that_nobody_reads_may_come_to_its_end():
    """A connection that is cut while a client sends would take the answer with it."""

    async def test() -> None:
        async with connected(HEADERS) as (reader, writer):
            for _ in range(2):
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n")
                assert await answer(reader) == b"none"
                writer.write(b"x" * 3_000_000)
                await writer.drain()

    run(test)


def test_nonsense_for_a_body_is_answered_once(caplog):
    """The application has begun by then, and must not answer as well."""

    async def test() -> None:
        async with connected(HEADERS) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n")
            answers = await reader.read()
            assert answers.startswith(b"HTTP/1.1 400 ") and answers.count(b"HTTP/1.1 ") == 1

    run(test)
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


def test_nonsense_after_the_answer_ends_the_connection():
    async def test() -> None:
        async with connected(HEADERS) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            assert await answer(reader) == b"none"
            writer.write(b"ZZ\r\n")
            assert await reader.read() == b""

    run(test)
