"""Side by side: one prompt with each memory, and where the answers differ, as HTML.

A difference is underlined, bold and on another ground, and inside a ``mark`` element, which screen
readers announce; so it is seen in dark and light, and without colour.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape

from . import view
from .facts import Facts
from .view import Answer

#: The lanes: off first, because the others are compared with it.
LANES = ("none", "generic", "fetched")

_LABELS = {value: label for value, label, _ in view.MEMORIES}


def differences(text: str, other: str) -> list[tuple[str, bool]]:
    """``text`` cut into pieces: (piece, whether it differs from ``other``), word by word.

    The pieces put together are the text. Spaces between two words that differ differ with them.
    """
    mine, theirs = _words(text), _words(other)
    match = SequenceMatcher(None, [word.strip() for word in theirs],
                            [word.strip() for word in mine], autojunk=False)  # fmt: skip
    pieces = []
    for kind, _, _, start, end in match.get_opcodes():
        if start < end:
            pieces.append(("".join(mine[start:end]), kind != "equal"))
    return pieces


def _words(text: str) -> list[str]:
    """Words with the space before them."""
    return re.findall(r"\s*\S+|\s+$", text)


def marked(text: str, other: str) -> str:
    """``text`` as HTML, what differs from ``other`` marked."""
    html = []
    for piece, differs in differences(text, other):
        word = piece.lstrip()
        space = piece[: len(piece) - len(word)]
        html.append(
            f"{escape(space)}<mark class='hm-differs'>{escape(word)}</mark>"
            if differs and word
            else escape(piece)
        )
    return "".join(html)


def side_by_side(states: Sequence[Answer] | None, facts: Facts) -> str:
    """The answers of the lanes, in their order; None: before the first prompt."""
    if states is None:
        return (
            "<section class='hm-card hm-answer' data-state='empty' aria-label='Side by side'>"
            "<p class='hm-quiet'>The same prompt with each memory; words that differ from those "
            "without memory are <mark class='hm-differs'>marked</mark>.</p></section>"
        )
    off = states[0]
    cards = "".join(_card(state, off, facts) for state in states)
    prompt = escape(off.ask.prompt)
    running = any(not state.is_shown for state in states)
    return (
        f"<section class='hm-lanes' aria-label='Side by side' data-number='{off.number}' "
        f"data-state='{'running' if running else 'done'}'>"
        f"<p class='hm-prompt'>{prompt}</p><div class='hm-grid'>{cards}</div></section>"
    )


def _card(state: Answer, off: Answer, facts: Facts) -> str:
    memory = state.ask.memory if isinstance(state.ask.memory, str) else "path"
    label = _LABELS.get(memory, "Pinned path")
    if state.failed:
        body = view.error(state)
    else:
        html = None
        # While one of them is written, the end of the other has nothing to be compared with.
        if state is not off:
            limit = len(state.text) if off.end and state.end else len(off.text)
            html = marked(state.text[:limit], off.text) + escape(state.text[limit:])
        body = view.written(state, html) + view.status(state) + _facts(state, off, facts)
    return (
        f"<article class='hm-card hm-answer' data-lane='{memory}' {view.progress(state)} "
        f"aria-label='Memory: {label}'><h2>{label}</h2>{body}</article>"
    )


def _facts(state: Answer, off: Answer, facts: Facts) -> str:
    if state.last is None or state.began is None:
        return ""
    lines = [
        # No tokens/s: the three are written in turn, so that each one's says little.
        f"first token after {state.began.seconds * 1e3:,.1f} ms",
        f"{view.size(state.last.fetch.bytes)} fetched",
    ]
    if state is not off:
        pieces = differences(state.text, off.text)
        count = sum(len(piece.split()) for piece, differs in pieces if differs)
        lines.append(f"{count} of {len(state.text.split())} words differ")
    if state.last.path is not None:
        path = " → ".join(
            f"{cluster} {facts.name(level, cluster)}".strip()
            for level, cluster in enumerate(state.last.path.ids, 1)
        )
        lines.append(f"path {path}")
    return f"<ul class='hm-notes'>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
