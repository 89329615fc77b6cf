"""What all tabs that ask the model have: fields, buttons, and how a running answer updates them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

# Gradio reads both on import or launch. The second would offer to keep prompts on the Hub.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr  # noqa: E402

from . import tree_view  # noqa: E402
from .desk import LONGEST_PROMPT, Desk, Visitor  # noqa: E402
from .view import Answer  # noqa: E402

if TYPE_CHECKING:
    from mlx_hiermem.bank.report import BlockReport

__all__ = [
    "LONGEST_ANSWER",
    "VISITORS",
    "Fields",
    "buttons",
    "gr",  # for all who need it, after what is set above
    "picture",
    "prompt_box",
    "tokens_slider",
    "updates",
    "wire",
]

#: Visitors who are answered or see their place in the line. As many more wait for a place in it;
#: the next are told that the queue is full.
VISITORS = 16

#: Tokens that one visitor may ask for, so that the line moves.
LONGEST_ANSWER = 4096


@dataclass(frozen=True)
class Fields:
    """The prompt, the length, and the two buttons of a tab."""

    prompt: gr.Textbox
    tokens: gr.Slider
    send: gr.Button
    stop: gr.Button


def prompt_box(label: str, desk: Desk, ident: str, focus: bool = False) -> gr.Textbox:
    """Where a visitor writes; Enter sends."""
    hint = "Ask a question" if desk.facts.chat else "Begin a sentence; the model goes on"
    # One more than is taken, so that it is told. Without it, a paste of megabytes keeps the
    # visitor's browser busy for a minute.
    return gr.Textbox(
        label=label, placeholder=hint, lines=1, max_lines=8, autofocus=focus, elem_id=ident,
        max_length=LONGEST_PROMPT + 1,
    )  # fmt: skip


def tokens_slider(desk: Desk, ident: str) -> gr.Slider:
    """How long the answer may become."""
    longest = min(desk.facts.context_length or LONGEST_ANSWER, LONGEST_ANSWER)
    return gr.Slider(
        1, longest, value=min(48, longest), step=1, label="Max tokens", min_width=280, elem_id=ident
    )


def buttons(ident: str, send: str = "Send") -> tuple[gr.Button, gr.Button]:
    """Send and Stop, in a row."""
    with gr.Row():
        return (
            gr.Button(send, variant="primary", elem_id=f"{ident}send", scale=3, min_width=100),
            gr.Button(
                "Stop", interactive=False, elem_id=f"{ident}stop", elem_classes="hm-stop", scale=1,
                min_width=80,
            ),
        )  # fmt: skip


def wire(
    desk: Desk,
    place: str,
    fields: Fields,
    handler: Callable[..., Iterator[tuple[Any, ...]]],
    inputs: Sequence[gr.Component],
    outputs: Sequence[gr.Component],
) -> None:
    """Enter and Send start ``handler``; Stop ends it within one token.

    Args:
        handler: takes the inputs and the ``gr.Request``; yields values for ``outputs`` and, last,
            whether it goes on.
    """
    # The line of visitors is the model thread's own, which shows each their place; Gradio only has
    # to let all of them in. "once": Enter during an answer does not start another.
    gr.on(
        [fields.send.click, fields.prompt.submit], handler, list(inputs),
        [*outputs, fields.send, fields.stop], show_progress="hidden", trigger_mode="once",
        concurrency_id="model", concurrency_limit=VISITORS, api_visibility="private",
    )  # fmt: skip

    def stop(request: gr.Request) -> None:
        desk.stop(request.session_hash, place)

    # Past the queue, so that it is heard while the answer runs.
    fields.stop.click(stop, queue=False, show_progress="hidden", api_visibility="private")


def updates(values: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Values for a page, the last of each tuple being whether it goes on.

    What has not changed is not sent again, and stays as it is: the focus in it, too.
    """
    before: tuple[Any, ...] | None = None
    for *parts, running in values:
        now = (*parts, running)
        if now == before:
            continue
        same = [False] * len(now) if before is None else [a == b for a, b in zip(now, before)]  # noqa: B905
        before = now
        shown = [gr.skip() if old else part for part, old in zip(parts, same)]  # noqa: B905
        if same[-1]:
            yield (*shown, gr.skip(), gr.skip())
        else:
            yield (*shown, gr.Button(interactive=not running), gr.Button(interactive=running))


def picture(desk: Desk, own: Visitor, state: Answer | None, ident: str) -> str:
    """The tree with the path of an answer as far as it is lit up, and what is off for a visitor."""
    facts = desk.facts
    assert facts.config is not None
    path = own.path
    blocks: Sequence[BlockReport] = ()
    if state is not None and state.last is not None and not state.failed:
        path = None if state.last.path is None else state.last.path.ids
        blocks = state.blocks
    return tree_view.picture(
        path, blocks, branching=facts.config.branching, levels=facts.config.levels,
        names=facts.names, blocked=own.blocked | facts.blocked,
        memory_levels=facts.config.memory_levels, roots=facts.config.roots, ident=ident,
    )  # fmt: skip
