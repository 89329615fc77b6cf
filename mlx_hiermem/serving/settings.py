"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What the server allows.

    Attributes:
        model: the name that the model is served under.
        max_tokens: the most tokens of an answer.
        max_body: the most bytes of a request's body.
        max_open: the most requests at once, whatever they wait for.
        timeout: seconds from a request to the end of its answer.
        api_key: is asked for if it is there; ``/health`` alone is open.
        allow_origins: web pages that may ask from a browser; "*" is all.
        roots: folders that no answer may name.
    """

    model: str
    max_tokens: int = 2048
    max_body: int = 4 * 2**20
    max_open: int = 256
    timeout: float = 600.0
    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
