"""The first tab: one prompt, its answer while it is written, and what was fetched for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import hands_on, view
from .controls import Fields, buttons, gr, picture, prompt_box, tokens_slider, updates, wire
from .desk import Desk, Visitor
from .meters import meters

#: Prompts to start from: rare facts of the atlas, in the wordings that no training text has.
EXAMPLES = (
    "The atomic number of hafnium is",
    "The chemical symbol of tungsten is",
    "The language code of Basque is",
    "The currency code of the Tenge is",
    "The country of the subdivision Hokkaido is",
)


class AskTab:
    """The handlers of the tab."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def answer(
        self, prompt: str | None, memory: str | None, tokens: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Stream one answer: (answer, picture, report, meters, Send, Stop) for each update."""
        yield from updates(self._answer(prompt, memory, tokens, request.session_hash))

    def _answer(
        self, prompt: str | None, memory: str | None, tokens: float | None, session: str | None
    ) -> Iterator[tuple[Any, ...]]:
        desk, own = self.desk, self.desk.visitor(session)
        ask = desk.ask(session, prompt, memory, tokens)
        for (state,) in desk.follow(session, "ask", [ask]):
            own.shown["ask"] = state
            yield (
                view.answer(state),
                picture(desk, own, state, "ask-tree"),
                view.report(state, desk.facts),
                meters(state, desk.facts),
                not state.is_shown,
            )


def build(desk: Desk) -> gr.HTML:
    """Add the tab's content; returns the picture, whose clicks the page wires."""
    choices = [(label, value) for value, label, _ in view.MEMORIES]
    prompt = prompt_box("Prompt", desk, "prompt", focus=True)
    gr.Examples(
        [[example] for example in EXAMPLES], prompt, label="Try one of these",
        elem_id="examples", api_visibility="private",
    )  # fmt: skip
    with gr.Row(equal_height=True):
        # Wide enough to stand one below the other on a phone.
        memory = gr.Radio(choices, value="fetched", label="Memory", min_width=280, elem_id="memory")
        tokens = tokens_slider(desk, "max-tokens")
    gr.HTML(view.legend())
    send, stop = buttons("")
    answer = gr.HTML(view.answer(None), elem_id="answer")
    tree = gr.HTML(
        picture(desk, Visitor(), None, "ask-tree"), elem_id="picture", js_on_load=hands_on.CLICKS
    )
    report = gr.HTML("", elem_id="report")
    gauges = gr.HTML("", elem_id="meters")
    fields = Fields(prompt, tokens, send, stop)
    wire(
        desk, "ask", fields, AskTab(desk).answer, [prompt, memory, tokens],
        [answer, tree, report, gauges],
    )  # fmt: skip
    return tree
