"""Hands on: what a visitor has switched off or pinned, and what that does to the answer, as HTML.

Also the script that makes the picture's clusters heard.
"""

from __future__ import annotations

import re
from html import escape

from mlx_hiermem.bank.address import check_path
from mlx_hiermem.errors import PathError

from . import view
from .compare import marked
from .desk import Visitor
from .facts import Facts
from .view import Answer

#: For ``gr.HTML(js_on_load=...)``. Clusters are buttons, so Enter and Space click them too. The
#: picture is replaced with each update; the focus goes to the same cluster of the new one.
CLICKS = """
let focused = null;
element.addEventListener('click', event => {
  const node = event.target.closest('.hm-tree-node');
  if (!node) return;
  focused = node.id;
  trigger('click', {level: Number(node.dataset.level), cluster: Number(node.dataset.cluster)});
});
element.addEventListener('focusin', event => { focused = event.target.id || null; });
element.addEventListener('focusout', event => { if (event.relatedTarget) focused = null; });
new MutationObserver(() => {
  const node = focused && document.activeElement === document.body
    ? document.getElementById(focused) : null;
  if (node) node.focus({preventScroll: true});
}).observe(element, {childList: true, subtree: true});
"""


def parse_path(text: str | None, facts: Facts) -> tuple[int, ...]:
    """A path as a visitor writes it: ids with anything between them, or the leaf's alone.

    Raises:
        PathError: it is no path of the tree.
    """
    text = text or ""
    if not re.fullmatch(r"[0-9\s,;→>/()\[\]]{0,400}", text):
        raise PathError("this is no path; write numbers such as 3,50, or a leaf's alone")
    ids = [int(number) for number in re.findall(r"[0-9]+", text)]
    config = facts.config
    assert config is not None
    if len(ids) == 1:
        above = range(config.levels - 1, -1, -1)
        ids = [ids[0] // config.branching**up for up in above]
    if not ids:
        raise PathError("there is no path; ask something first, or write numbers such as 3,50")
    return tuple(check_path(config, ids))


def own(visitor: Visitor, facts: Facts, note: str = "") -> str:
    """What is off or pinned for this visitor, and what went wrong when they changed it."""
    lines = []
    if visitor.path is not None:
        ids = ",".join(map(str, visitor.path))
        lines.append(f"<li data-pinned='{ids}'>Pinned path: {ids.replace(',', ' → ')}</li>")
    for level, cluster in sorted(visitor.blocked):
        name = escape(facts.name(level, cluster))
        lines.append(
            f"<li data-off='{level},{cluster}'>Off: level {level}, cluster {cluster} {name}</li>"
        )
    body = f"<h2>Yours alone</h2><ul class='hm-notes'>{''.join(lines)}</ul>" if lines else ""
    alarm = f"<p class='hm-error' role='alert'>{escape(note)}</p>" if note else ""
    return f"<section class='hm-own' aria-label='Yours alone' role='status'>{body}{alarm}</section>"


def change(before: Answer | None, now: Answer | None) -> str:
    """The answer before a change and the one after it, what differs marked."""
    if now is None:
        return (
            "<section class='hm-card hm-answer' data-state='empty' aria-label='Answer'>"
            "<p class='hm-quiet'>Ask something, then click a cluster of the picture: its block is "
            "switched off for you alone, and the same prompt is answered again.</p></section>"
        )
    if before is None or now.failed:
        return view.answer(now)
    text = escape(now.text)
    if now.end is not None:
        text = marked(now.text, before.text)
    return (
        "<section class='hm-lanes' aria-label='Before and now'>"
        f"<p class='hm-prompt'>{escape(now.ask.prompt)}</p><div class='hm-grid'>"
        "<article class='hm-card hm-answer' data-when='before' data-state='done' "
        f"aria-label='Before'><h2>Before</h2>{view.written(before)}</article>"
        f"<article class='hm-card hm-answer' data-when='now' data-number='{now.number}' "
        f"{view.progress(now)} aria-label='Now'><h2>Now</h2>{view.written(now, text)}"
        f"{view.status(now)}</article></div></section>"
    )
