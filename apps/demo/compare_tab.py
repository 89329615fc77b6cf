"""The second tab: one prompt with memory off, generic and fetched, written at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .compare import LANES, side_by_side
from .controls import Fields, buttons, gr, picture, prompt_box, tokens_slider, updates, wire
from .desk import Desk, Visitor
from .hands_on import CLICKS


class CompareTab:
    """The handlers of the tab."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def answer(
        self, prompt: str | None, tokens: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Stream the answers: (answers, picture, Send, Stop) for each update of the page."""
        yield from updates(self._answer(prompt, tokens, request.session_hash))

    def _answer(
        self, prompt: str | None, tokens: float | None, session: str | None
    ) -> Iterator[tuple[Any, ...]]:
        desk, own = self.desk, self.desk.visitor(session)
        asks = [desk.ask(session, prompt, memory, tokens) for memory in LANES]
        for states in desk.follow(session, "compare", asks):
            own.shown["compare"] = states[-1]
            yield (
                side_by_side(states, desk.facts),
                picture(desk, own, states[-1], "compare-tree"),
                not all(state.is_shown for state in states),
            )


def build(desk: Desk) -> gr.HTML:
    """Add the tab's content; returns the picture, whose clicks the page wires."""
    prompt = prompt_box("Prompt for all three", desk, "compare-prompt")
    tokens = tokens_slider(desk, "compare-tokens")
    send, stop = buttons("compare-", "Compare")
    lanes = gr.HTML(side_by_side(None, desk.facts), elem_id="lanes")
    tree = gr.HTML(
        picture(desk, Visitor(), None, "compare-tree"), elem_id="compare-picture",
        js_on_load=CLICKS,
    )  # fmt: skip
    fields = Fields(prompt, tokens, send, stop)
    wire(desk, "compare", fields, CompareTab(desk).answer, [prompt, tokens], [lanes, tree])
    return tree
