"""Responses of JSON, and what any exception becomes as one."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from .errors import ApiError
from .objects import to_json


class JSONResponse(Response):
    """A response of JSON in ASCII."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)


def _response(error: ApiError) -> Response:
    return JSONResponse(error.to_dict(), error.status, error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: "there is no such address; docs/serve.md lists those that there are",
        405: f"{request.method[:16]} is not understood here",
    }.get(error.status_code, error.detail)
    return _response(ApiError(error.status_code, message, headers=error.headers))


async def _fault(request: Request, error: Exception) -> Response:
    return _response(ApiError(500, "a fault of the server; its log says more", code="fault"))


#: Starlette's handlers, by exception.
HANDLERS: Any = {ApiError: _api_error, HTTPException: _http_error, Exception: _fault}
