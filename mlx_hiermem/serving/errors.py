"""Errors of the HTTP server, shaped as OpenAI's: one line each, and nothing of the machine.

``ApiError`` is what a handler raises; ``public`` makes any message fit for a stranger.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

#: Longest message of an answer, in characters.
LONGEST = 300

# Two names or more with slashes between, from the root or the home on; not what this server names.
_FILE = re.compile(r"(?<![\w.:/])(?!/v1/models(?![\w/]))~?(?:/[^\s/:;,'\"()]+){2,}/?")


class ApiError(Exception):
    """A request that is not answered as it was meant.

    Args:
        status: HTTP status; from 500 on it is the server's doing.
        message: what is wrong, and what was expected.
        param: the field that it is about.
        code: a word for programs, such as "context_length_exceeded".
        headers: for the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = public(message)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's mapping: message, type, param, code under the key ``error``."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        found = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": found}


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field; its name comes first in the message."""
    return ApiError(400, message if param is None else f"{param}: {message}", param, code)


def busy(message: str, retry_after: int, code: str) -> ApiError:
    """A 503 that says when to come again, in seconds."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after)})


def stopped() -> ApiError:
    """A 503: the generation thread has ended, or the server is told to."""
    return busy("the server is about to end; ask again later", 10, "server_stopped")


def timed_out(seconds: float) -> ApiError:
    """A 504: the answer took longer than the server allows. Clients are told not to try again."""
    return ApiError(
        504,
        f"the answer was not ready within {seconds:g} seconds; ask for fewer tokens, or later",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def public(message: str, roots: Iterable[str] = ()) -> str:
    """A message on one line, of at most ``LONGEST`` characters, without any file of the machine.

    Args:
        message: any text.
        roots: folders that it may name, which may have spaces in them.
    """
    for root in sorted(roots, key=len, reverse=True):
        message = message.replace(root, "the model's files")
    line = " ".join(_FILE.sub("a file", message).split())
    line = line.encode("utf-8", "replace").decode("utf-8")
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def shown(value: Any, longest: int = 40) -> str:
    """A value of a client's JSON in a message: short, on one line, of printable characters."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        text = ascii(value[: longest + 1]).removeprefix("'").removesuffix("'")
        return f"'{text[:longest]}{'...' if len(text) > longest else ''}'"
    text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
