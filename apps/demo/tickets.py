"""What goes to the model's thread and what comes back: requests, and tickets to read answers from.

Nothing here holds an MLX array.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .facts import Held

if TYPE_CHECKING:
    from mlx_hiermem.engine import Response


@dataclass(frozen=True)
class Ask:
    """One request: the arguments of ``MemoryLM.stream``.

    Attributes:
        prompt: a text; for a model with a chat template, the visitor's message.
        memory: "fetched", "generic", "none", or the ids of a path.
        max_tokens: the longest answer.
        blocked: pairs (level, cluster) that are zeros for this request alone.
        turn: whether it is a turn of the visitor's conversation.
    """

    prompt: str
    memory: str | tuple[int, ...] = "fetched"
    max_tokens: int = 64
    blocked: frozenset[tuple[int, int]] = frozenset()
    turn: bool = False


@dataclass(frozen=True)
class Began:
    """Comes right before the first piece of an answer.

    Attributes:
        seconds: from when the model turned to it to its first token: routing, fetching, prefill.
        held: what is in memory now.
    """

    seconds: float
    held: Held


@dataclass(frozen=True)
class End:
    """The last thing a ticket brings.

    Attributes:
        reason: "stop" (end of text), "length", "withdrawn" or "error".
        error: one line, for "error".
    """

    reason: str
    error: str | None = None


class Ticket:
    """A visitor's end of one request. Made by :meth:`ModelThread.submit`."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.withdrawn = threading.Event()
        self._updates: queue.SimpleQueue[Began | Response | End] = queue.SimpleQueue()

    def take(self, timeout: float) -> list[Began | Response | End]:
        """All that has come since the last call, in order; waits for the first.

        Args:
            timeout: seconds to wait; nothing within it gives an empty list. After an
                :class:`End`, which is always last, nothing comes any more.
        """
        updates: list[Began | Response | End] = []
        try:
            updates.append(self._updates.get(timeout=timeout) if timeout else self._now())
            while True:
                updates.append(self._now())
        except queue.Empty:
            return updates

    def _now(self) -> Began | Response | End:
        return self._updates.get_nowait()

    def put(self, update: Began | Response | End) -> None:
        """For the model's thread."""
        self._updates.put(update)
