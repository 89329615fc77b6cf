"""Many requests to a server, some of which vanish, and what became of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .serve_clients import Question, Server, Told


@dataclass
class Soak:
    """What became of many requests.

    Attributes:
        answered, vanished: requests by how they ended.
        lost: that had no end, or an error.
        mixed_up: whose answer was another than alone.
        resident: of the server, in bytes, after each tenth.
        reasons: of some that were lost.
    """

    answered: int = 0
    vanished: int = 0
    lost: int = 0
    mixed_up: int = 0
    resident: tuple[int, ...] = ()
    reasons: tuple[str, ...] = ()


def soak(
    server: Server,
    expected: Sequence[tuple[Question, str]],
    count: int,
    clients: int = 16,
    vanish: int = 100,
) -> Soak:
    """Many requests by some clients, one after another each.

    Args:
        expected: questions, which are asked in turns, and the answers to them.
        count: requests.
        clients: that ask at once.
        vanish: one in so many goes away in mid-stream.
    """
    numbers = iter(range(count))
    lock = threading.Lock()
    found = Soak()

    def client() -> None:
        nonlocal found
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            question, answer = expected[number % len(expected)]
            # After one or more pieces, never after the last.
            leaves = 1 + number // vanish % 3 if number % vanish == vanish // 2 else None
            try:
                told, reason = server.ask(question, leaves), ""
            except Exception as error:
                told, reason = None, f"{type(error).__name__}: {error}"
            with lock:
                found = _tally(found, told, answer, reason)
                done = found.answered + found.vanished + found.lost
                if done % max(1, count // 10) == 0:
                    found = replace(found, resident=(*found.resident, server.resident()))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _tally(found: Soak, told: Told | None, answer: str, reason: str) -> Soak:
    if told is None or not told.tokens:
        return replace(found, lost=found.lost + 1, reasons=(*found.reasons, reason)[:3])
    right = told.text == answer if told.ended else answer.startswith(told.text)
    found = replace(found, mixed_up=found.mixed_up + (not right))
    if told.ended:
        return replace(found, answered=found.answered + 1)
    return replace(found, vanished=found.vanished + 1)
