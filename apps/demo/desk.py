"""Desk: what the page's handlers share: the model's thread, and what each visitor has.

A visitor is a browser tab, told apart by Gradio's session. What one has blocked, pinned or said is
kept under their session alone, goes into their own requests, and is dropped when they leave.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .facts import Facts
from .tickets import Ask, End, Ticket
from .view import Answer
from .worker import ModelThread

if TYPE_CHECKING:
    from .bank_tab import UseCounter

#: Characters of a prompt; far above any context, far below what would keep the tokenizer busy.
LONGEST_PROMPT = 100_000

#: Seconds between two updates of a page, so that drawing does not eat the speed it shows.
PACE = 0.05


@dataclass
class Visitor:
    """What one visitor has.

    Attributes:
        blocked: pairs (level, cluster) that are off for them.
        path: the path they have pinned.
        running: what they wait for, by the part of the page that it belongs to.
        shown: by part of the page, the answer that is shown there.
        before: what "Hands on" showed before that.
        turns: of their conversation.
    """

    blocked: frozenset[tuple[int, int]] = frozenset()
    path: tuple[int, ...] | None = None
    running: dict[str, tuple[Ticket, ...]] = field(default_factory=dict)
    shown: dict[str, Answer] = field(default_factory=dict)
    before: Answer | None = None
    turns: list[Answer] = field(default_factory=list)


class Desk:
    """Where handlers ask.

    Args:
        thread: a started :class:`ModelThread`.
        facts: what its ``start`` returned.
        name: of the model, for the page.
        uses: told of every path that was fetched.
    """

    def __init__(
        self, thread: ModelThread, facts: Facts, name: str, uses: UseCounter | None = None
    ) -> None:
        self.thread = thread
        self.facts = facts
        self.name = name
        self.visitors: dict[str | None, Visitor] = {}  # by session
        self._uses = uses
        self._numbers = itertools.count(1)
        self._change = threading.Lock()

    def visitor(self, session: str | None) -> Visitor:
        """What a visitor has; a new one has nothing."""
        with self._change:
            return self.visitors.setdefault(session, Visitor())

    def leave(self, session: str | None) -> None:
        """A visitor has left: end what they wait for, and forget them."""
        with self._change:
            self.visitors.pop(session, None)
        self.thread.forget(session)

    def ask(
        self, session: str | None, prompt: str | None, memory: str | None, tokens: float | None
    ) -> Ask:
        """A request as a visitor means it: with their blocks and pinned path."""
        memory, own = memory or "fetched", self.visitor(session)
        if memory != "fetched":
            return Ask(prompt or "", memory, int(tokens or 0))
        return Ask(prompt or "", own.path or "fetched", int(tokens or 0), own.blocked)

    def follow(
        self, session: str | None, place: str, asks: Sequence[Ask]
    ) -> Iterator[list[Answer]]:
        """Have requests answered together; yields what there is of them, again and again.

        Ends when all are answered and shown. A generator that is closed withdraws them.

        Args:
            place: part of the page. What still runs there is withdrawn.
        """
        states = [Answer(ask, next(self._numbers)) for ask in asks]
        if len(asks[0].prompt) > LONGEST_PROMPT:
            end = End(
                "error",
                f"the prompt has {len(asks[0].prompt):,} characters; this page takes "
                f"{LONGEST_PROMPT:,}; shorten it",
            )
            yield [Answer(Ask(""), state.number, end=end) for state in states]
            return
        self.stop(session, place)
        own = self.visitor(session)
        tickets = own.running[place] = self.thread.submit_together(asks, session)
        pace = threading.Event()
        try:
            for state, ticket in zip(states, tickets, strict=True):
                state.ahead = self.thread.ahead(ticket)
            yield states
            while not all(state.is_shown for state in states):
                # All are answered in turn, so that waiting for one is enough.
                first = next((i for i, state in enumerate(states) if state.end is None), None)
                for i, (state, ticket) in enumerate(zip(states, tickets, strict=True)):
                    state.ahead = self.thread.ahead(ticket)
                    for update in ticket.take(timeout=0.5 if i == first else 0):
                        state.update(update)
                    self._light(state)
                if own.running.get(place) is not tickets:
                    return  # something newer is shown there
                yield states
                pace.wait(PACE)
        finally:
            for ticket in tickets:
                self.thread.withdraw(ticket)
            if own.running.get(place) is tickets:
                del own.running[place]

    def _light(self, state: Answer) -> None:
        """Light up one more level; the first time, count what was fetched."""
        if state.last is None or state.lit >= max(1, len(state.last.fetch.blocks)):
            return
        state.lit += 1
        if state.lit == 1 and self._uses is not None and state.last.path is not None:
            self._uses.add(state.last.path.ids)

    def stop(self, session: str | None, place: str) -> None:
        """End what a visitor has running in one part of the page."""
        own = self.visitors.get(session)
        for ticket in own.running.get(place, ()) if own is not None else ():
            self.thread.withdraw(ticket)

    def toggle(self, session: str | None, level: object, cluster: object) -> bool:
        """Switch a block off, or on again, for one visitor; whether there is such a block.

        What whoever started the server has blocked stays so.
        """
        if not isinstance(level, int) or not isinstance(cluster, int):
            return False  # whatever a browser has sent
        if not self.facts.has(level, cluster) or (level, cluster) in self.facts.blocked:
            return False
        own = self.visitor(session)
        own.blocked = own.blocked ^ {(level, cluster)}
        return True

    def end_conversation(self, session: str | None) -> None:
        """A visitor's next turn begins a new conversation."""
        self.stop(session, "talk")
        self.visitor(session).turns = []
        with suppress(RuntimeError):  # the thread has ended, and with it the conversation
            self.thread.end_conversation(session).result()
