"""The fourth tab: a conversation whose memory follows the topic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .controls import Fields, buttons, gr, picture, prompt_box, tokens_slider, updates, wire
from .desk import Desk, Visitor
from .hands_on import CLICKS
from .talk import SHOWN, conversation


class TalkTab:
    """The handlers of the tab."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def answer(
        self, text: str | None, tokens: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Stream a turn: (message, conversation, picture, Send, Stop) for each update."""
        yield from updates(self._answer(text, tokens, request.session_hash))

    def _answer(
        self, text: str | None, tokens: float | None, session: str | None
    ) -> Iterator[tuple[Any, ...]]:
        desk, own = self.desk, self.desk.visitor(session)
        ask = replace(desk.ask(session, text, None, tokens), turn=True)
        turns = own.turns
        for (state,) in desk.follow(session, "talk", [ask]):
            if not turns or turns[-1] is not state:
                turns.append(state)
                del turns[: -SHOWN - 1]
            own.shown["talk"] = state
            yield (
                "",
                conversation(turns, desk.facts),
                picture(desk, own, state, "talk-tree"),
                not state.is_shown,
            )

    def new(self, request: gr.Request) -> tuple[str, str]:
        """Forget the conversation: (conversation, picture)."""
        desk, own = self.desk, self.desk.visitor(request.session_hash)
        desk.end_conversation(request.session_hash)
        own.shown.pop("talk", None)
        return conversation([], desk.facts), picture(desk, own, None, "talk-tree")


def build(desk: Desk) -> gr.HTML:
    """Add the tab's content; returns the picture, whose clicks the page wires."""
    tab = TalkTab(desk)
    log = gr.HTML(conversation([], desk.facts), elem_id="talk")
    message = prompt_box("Message", desk, "message")
    tokens = tokens_slider(desk, "talk-tokens")
    send, stop = buttons("talk-")
    new = gr.Button("New conversation", elem_id="talk-new", size="sm")
    tree = gr.HTML(
        picture(desk, Visitor(), None, "talk-tree"), elem_id="talk-picture", js_on_load=CLICKS
    )
    fields = Fields(message, tokens, send, stop)
    wire(desk, "talk", fields, tab.answer, [message, tokens], [message, log, tree])
    new.click(tab.new, None, [log, tree], show_progress="hidden", api_visibility="private")
    return tree
