"""The body of a request, read with a limit of bytes and of time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.requests import Request

from .errors import ApiError


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The whole body of a request of JSON.

    Args:
        request: whose body nobody has read.
        limit: the most bytes.
        seconds: the client has for sending it.

    Raises:
        ApiError: 415 it is no JSON by its headers, 413 too large, 408 too slow.
        ClientDisconnect: the client has gone away.
    """
    _check_type(request)
    try:
        return await asyncio.wait_for(_read(request, limit), seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            408,
            f"the body did not come within {seconds:g} seconds",
            headers={"Connection": "close"},
        ) from None


def _check_type(request: Request) -> None:
    kind, *parameters = request.headers.get("content-type", "").lower().split(";")
    charset = [one.strip() for one in parameters if one.strip().startswith("charset=")]
    if kind.strip() != "application/json" or any(
        one.removeprefix("charset=").strip('"') not in ("utf-8", "utf8") for one in charset
    ):
        raise ApiError(415, "the Content-Type has to be application/json, in UTF-8")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "no Content-Encoding is understood; send the body as it is")


async def _read(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:18]) > limit:
        # Who has asked first sends nothing, and may take the refusal for the end of the request.
        asked = request.headers.get("expect", "").lower() == "100-continue"
        raise _too_large(limit, {"Connection": "close"} if asked else {})
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limit: int, headers: Mapping[str, str] | None = None) -> ApiError:
    # The connection stays: a client that is cut off while it sends would see no answer. What still
    # comes is thrown away, for as long as ``connections.HEADERS``.
    return ApiError(413, f"the body is too large; at most {limit} bytes are read", headers=headers)
