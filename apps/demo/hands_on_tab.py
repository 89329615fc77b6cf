"""The third tab: switch blocks off or pin a path, for this visitor alone, and see the change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlx_hiermem.errors import PathError

from . import hands_on, view
from .controls import (
    VISITORS,
    Fields,
    buttons,
    gr,
    picture,
    prompt_box,
    tokens_slider,
    updates,
    wire,
)  # fmt: skip
from .desk import Desk, Visitor

#: The parts of the page that have a picture, in the order of their tabs.
PLACES = ("ask", "compare", "hands", "talk")


class HandsOnTab:
    """The handlers of the tab."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def answer(
        self, prompt: str | None, tokens: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Stream an answer: (before and now, picture, report, Send, Stop) for each update."""
        yield from updates(self._answer(prompt, tokens, request.session_hash))

    def again(self, tokens: float | None, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """As :meth:`answer`: the last prompt once more, if what is off or pinned has changed."""
        shown = self.desk.visitor(request.session_hash).shown.get("hands")
        if shown is not None and shown.ask.prompt:
            ask = self.desk.ask(request.session_hash, shown.ask.prompt, None, tokens)
            if (ask.memory, ask.blocked) != (shown.ask.memory, shown.ask.blocked):
                yield from self.answer(shown.ask.prompt, tokens, request)
                return
        yield (gr.skip(),) * 5  # of nothing at all, Gradio makes five times None

    def _answer(
        self, prompt: str | None, tokens: float | None, session: str | None
    ) -> Iterator[tuple[Any, ...]]:
        desk, own = self.desk, self.desk.visitor(session)
        last = own.shown.get("hands")
        if last is None or last.ask.prompt != prompt:
            own.before = None
        elif last.end is not None and last.end.reason in ("stop", "length"):
            own.before = last
        for (state,) in desk.follow(session, "hands", [desk.ask(session, prompt, None, tokens)]):
            own.shown["hands"] = state
            yield (
                hands_on.change(own.before, state),
                picture(desk, own, state, "hands-tree"),
                view.report(state, desk.facts),
                not state.is_shown,
            )

    # ---- what is the visitor's own; each returns it and the pictures of all tabs ----------

    def click(self, event: gr.EventData, request: gr.Request) -> tuple[str, ...]:
        """A cluster of a picture was clicked: switch it off, or on again."""
        level, cluster = getattr(event, "level", None), getattr(event, "cluster", None)
        known = self.desk.toggle(request.session_hash, level, cluster)
        return self._changed(request, "" if known else "this block cannot be switched by you")

    def pin(self, text: str | None, request: gr.Request) -> tuple[str, ...]:
        """Fetch this path from now on; with no text, the path of the last answer."""
        own = self.desk.visitor(request.session_hash)
        # While the same prompt is answered again, the newest answer may have no path yet.
        answers = (own.shown.get("hands"), own.before)
        paths = [one.last.path for one in answers if one and one.last and one.last.path]
        try:
            if (text or "").strip() or not paths:
                own.path = hands_on.parse_path(text, self.desk.facts)
            else:
                own.path = paths[0].ids
        except PathError as error:
            return self._changed(request, str(error))
        return self._changed(request)

    def reset(self, request: gr.Request) -> tuple[str, ...]:
        """All blocks on, no path pinned."""
        own = self.desk.visitor(request.session_hash)
        own.blocked, own.path = frozenset(), None
        return self._changed(request)

    def _changed(self, request: gr.Request, note: str = "") -> tuple[str, ...]:
        desk, own = self.desk, self.desk.visitor(request.session_hash)
        pictures = (picture(desk, own, own.shown.get(one), f"{one}-tree") for one in PLACES)
        return hands_on.own(own, desk.facts, note), *pictures


class Wires:
    """What the page needs to wire the pictures of all tabs.

    Attributes:
        tree: the picture of this tab.
        connect: takes the visitor's own part of the page and the pictures, in the order of
            ``PLACES``; to be called when all are there.
    """

    def __init__(self, tree: gr.HTML, connect: Callable[[gr.HTML, Sequence[gr.HTML]], None]):
        self.tree = tree
        self.connect = connect


def build(desk: Desk) -> Wires:
    """Add the tab's content."""
    tab = HandsOnTab(desk)
    gr.HTML(
        "<p class='hm-legend'>Click a cluster to switch its block off or on, for you alone; your "
        "last prompt is then answered again. A pinned path is fetched whatever the prompt.</p>"
    )
    prompt = prompt_box("Prompt to try", desk, "hands-prompt")
    tokens = tokens_slider(desk, "hands-tokens")
    send, stop = buttons("hands-")
    with gr.Row():
        path = gr.Textbox(
            label="Path to pin", placeholder="empty: that of the last answer", elem_id="pin-path",
            max_lines=1, min_width=280, scale=2,
        )  # fmt: skip
        pin = gr.Button("Pin this path", elem_id="pin", min_width=130, scale=1)
        reset = gr.Button("All on, unpin", elem_id="reset", min_width=130, scale=1)
    answer = gr.HTML(hands_on.change(None, None), elem_id="hands-answer")
    tree = gr.HTML(
        picture(desk, Visitor(), None, "hands-tree"), elem_id="hands-picture",
        js_on_load=hands_on.CLICKS,
    )  # fmt: skip
    report = gr.HTML("", elem_id="hands-report")
    outputs = [answer, tree, report]
    wire(desk, "hands", Fields(prompt, tokens, send, stop), tab.answer, [prompt, tokens], outputs)

    def connect(own: gr.HTML, trees: Sequence[gr.HTML]) -> None:
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        changed = [own, *trees]
        steps = [
            tree.click(tab.click, None, changed, **quick),
            pin.click(tab.pin, path, changed, **quick),
            path.submit(tab.pin, path, changed, **quick),
            reset.click(tab.reset, None, changed, **quick),
        ]
        for step in steps:
            step.then(
                tab.again, tokens, [*outputs, send, stop], show_progress="hidden",
                concurrency_id="model", concurrency_limit=VISITORS, api_visibility="private",
            )  # fmt: skip
        for other in trees:
            if other is not tree:
                other.click(tab.click, None, changed, **quick)

    return Wires(tree, connect)
