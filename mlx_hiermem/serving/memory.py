"""MemoryChoice: which memory a request is answered with."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError

KINDS = ("fetched", "generic", "none", "path")


@dataclass(frozen=True)
class MemoryChoice:
    """The memory of one request; nothing in it holds for any other request.

    Attributes:
        kind: "fetched" (the blocks on the path of a text), "generic", "none", or "path".
        path: for "path", the cluster of each level, level 1 first.
        route_on: for "fetched", the text that is routed in place of the prompt's.
        blocked: blocks (level, cluster) that read as zeros.

    Raises:
        InputError: the attributes contradict each other. Whether path and blocks exist is found out
            by who has the bank.
    """

    kind: str = "fetched"
    path: tuple[int, ...] | None = None
    route_on: str | None = None
    blocked: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"memory is {self.kind!r:.40}; expected {', '.join(KINDS)}")
        if (self.kind == "path") != (self.path is not None):
            raise InputError(
                f"memory is {self.kind!r} {'without' if self.path is None else 'with'} a path; "
                "a path belongs to kind 'path', and it needs one"
            )
        if self.route_on is not None and self.kind != "fetched":
            raise InputError(
                f"memory is {self.kind!r} with a text to route; only 'fetched' routes a text"
            )
