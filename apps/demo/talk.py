"""A conversation as HTML: for each turn, which levels were read again and which stayed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from . import view
from .facts import Facts
from .view import Answer

#: Turns that are shown; the model knows of all that fit in its context.
SHOWN = 40


def conversation(turns: Sequence[Answer], facts: Facts) -> str:
    """The newest turns, the newest last."""
    if not turns:
        more = (
            ""
            if facts.chat
            else " This model has no chat template, so it does not see the turns before; what "
            "stays is the memory."
        )
        return (
            "<section class='hm-card hm-answer' data-state='empty' aria-label='Conversation'>"
            "<p class='hm-quiet'>Say something, then change the topic: each turn shows which "
            f"levels were read again and which stayed.{more}</p></section>"
        )
    first = max(0, len(turns) - SHOWN)
    pairs = list(zip([None, *turns[:-1]], turns, strict=True))[first:]
    rows = "".join(_turn(turn, before, facts) for before, turn in pairs)
    return f"<section class='hm-talk' aria-label='Conversation'><ol>{rows}</ol></section>"


def _turn(turn: Answer, before: Answer | None, facts: Facts) -> str:
    body = view.error(turn) if turn.failed else view.written(turn) + view.status(turn)
    return (
        f"<li class='hm-card hm-answer' data-number='{turn.number}' {view.progress(turn)}>"
        f"<p class='hm-prompt'>{escape(turn.ask.prompt)}</p>{body}{_levels(turn, before, facts)}"
        "</li>"
    )


def _levels(turn: Answer, before: Answer | None, facts: Facts) -> str:
    """For each level, whether its block is that of the turn before."""
    if turn.last is None or turn.failed:
        return ""
    earlier = {}
    if before is not None and before.last is not None:
        earlier = {
            block.level: (block.cluster, block.blocked) for block in before.last.fetch.blocks
        }
    items = []
    for block in turn.last.fetch.blocks:
        same = earlier.get(block.level) == (block.cluster, block.blocked)
        word = "first"
        if same:  # somebody else may have used the buffer in between
            word = "read again" if block.source == "disk" else "stayed"
        elif earlier:
            word = "changed"
        name = "" if block.cluster is None else facts.name(block.level, block.cluster)
        items.append(
            f"<li data-level='{block.level}' data-change='{word}' data-source='{block.source}'>"
            f"level {block.level}: <b>{block.cluster}</b> {escape(name)} "
            f"<span class='hm-change'>{word}</span>, {view.size(block.bytes)}, "
            f"{block.ms:.3f} ms, {block.source}</li>"
        )
    return f"<ul class='hm-notes' aria-label='Levels of this turn'>{''.join(items)}</ul>"
