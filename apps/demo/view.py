"""An answer and its fetch report as HTML.

Notable: whatever a visitor or a model wrote goes through ``html.escape``; nothing else here comes
from outside. Numbers are shown to the byte, so that the page can be compared with ``--json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from .facts import Facts
from .tickets import Ask, Began, End

if TYPE_CHECKING:
    from mlx_hiermem.bank.report import BlockReport, FetchReport
    from mlx_hiermem.engine import Response

#: The choices of memory: the value for ``MemoryLM.stream``, the label, what it means.
MEMORIES = (
    ("fetched", "Fetched", "the blocks on the prompt’s own path through the cluster tree"),
    ("generic", "Generic", "one memory for every prompt, as large, without routing"),
    ("none", "Off", "the anchor answers alone"),
)

_ENDS = {"stop": "end of text", "length": "length limit reached", "withdrawn": "stopped"}


@dataclass
class Answer:
    """What the page knows of one request so far.

    Attributes:
        ask: the request.
        number: of the answer, so that one can be told from the one before.
        ahead: requests that are answered before it.
        text: the answer so far.
        last: the last response, with path, fetch report and speed; None before the first.
        end: how it ended; None while it goes on.
        began: what came before the first response.
        lit: levels of the path that are lit up; the page lights one at a time.
    """

    ask: Ask
    number: int = 0
    ahead: int = 0
    text: str = ""
    last: Response | None = None
    end: End | None = None
    began: Began | None = None
    lit: int = 0

    def update(self, update: Began | Response | End) -> None:
        if isinstance(update, End):
            self.end = update
        elif isinstance(update, Began):
            self.began = update
        else:
            self.text += update.text
            self.last = update

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self.end is not None and self.end.error is not None

    @property
    def blocks(self) -> list[BlockReport]:
        """The blocks of the levels that are lit up; none of an answer without a path."""
        if self.last is None or self.last.path is None or self.failed:
            return []
        return self.last.fetch.blocks[: self.lit]

    @property
    def is_shown(self) -> bool:
        """Whether it has ended and all its levels are lit up."""
        if self.end is None:
            return False
        if self.failed or self.last is None or self.last.path is None:
            return True
        return self.lit >= len(self.last.fetch.blocks)

    @property
    def status(self) -> str:
        """One or two words: what is going on."""
        if self.end is not None:
            return _ENDS.get(self.end.reason, self.end.reason)
        if self.last is not None:
            return "writing"
        return f"waiting, {self.ahead} ahead of you" if self.ahead else "fetching"


def head(name: str, facts: Facts) -> str:
    """The top of the page: what is loaded."""
    levels = " + ".join(f"{level.clusters:,}" for level in facts.levels)
    parts = [
        f"<b>{escape(name)}</b>",
        f"anchor of {count(facts.anchor_parameters)} parameters",
        f"bank of {_unbroken(facts.bank_bytes)} ({levels} blocks)",
        f"one answer fetches {_unbroken(facts.fetch_bytes)}",
    ]
    return (
        "<header class='hm-head'><h1>Memory, fetched live</h1>"
        f"<p>{' <span aria-hidden=true>·</span> '.join(parts)}</p></header>"
    )


def legend() -> str:
    """What the choices of memory mean."""
    parts = (f"<span><b>{label}</b>: {meaning}.</span>" for _, label, meaning in MEMORIES)
    return f"<p class='hm-legend'>{' '.join(parts)}</p>"


def answer(state: Answer | None) -> str:
    """The prompt and what the model wrote after it, or what went wrong."""
    if state is None:
        return (
            "<section class='hm-card hm-answer' data-state='empty' aria-label='Answer'>"
            "<p class='hm-quiet'>The answer appears here, and below it what was fetched "
            "for it.</p></section>"
        )
    if state.failed:
        return (
            f"<section class='hm-card hm-answer' data-state='error' data-number='{state.number}' "
            f"aria-label='Answer'>{error(state)}</section>"
        )
    return (
        f"<section class='hm-card hm-answer' data-number='{state.number}' {progress(state)} "
        "aria-label='Answer'>"
        # On lines of their own: whether a space belongs between them only the tokenizer knows.
        f"<p class='hm-prompt'>{escape(state.ask.prompt)}</p>{written(state)}{status(state)}"
        "</section>"
    )


def progress(state: Answer) -> str:
    """Attributes that say whether it goes on."""
    running = not state.is_shown
    name = "error" if state.failed else "running" if running else "done"
    return f"data-state='{name}' aria-busy='{str(running).lower()}'"


def written(state: Answer, html: str | None = None) -> str:
    """What the model wrote; as ``html``, where parts of it are marked."""
    caret = "<span class='hm-caret' aria-hidden='true'></span>" if state.end is None else ""
    text = escape(state.text) if html is None else html
    return f"<p class='hm-text'><span class='hm-written'>{text}</span>{caret}</p>"


def status(state: Answer) -> str:
    """What is going on, for screen readers too."""
    return f"<p class='hm-status' role='status'>{escape(state.status)}</p>"


def error(state: Answer) -> str:
    """What went wrong, in one line."""
    assert state.end is not None
    text = escape(" ".join((state.end.error or "").splitlines()))
    return f"<p class='hm-error' role='alert'>{text}</p>"


def report(state: Answer | None, facts: Facts) -> str:
    """Path and fetch report of an answer; nothing before the first token."""
    if state is None or state.last is None or state.failed:
        return ""
    last = state.last
    parts = [path(last, facts)]
    if last.fetch.blocks:
        parts.append(_table(last.fetch))
    return (
        f"<section class='hm-card hm-report' data-memory='{last.memory}' "
        f"aria-label='What was fetched'>{''.join(parts)}</section>"
    )


def path(last: Response, facts: Facts) -> str:
    """The cluster path with its names, or why there is none."""
    if last.path is not None:
        steps = "".join(
            f"<li><span class='hm-node'><span class='hm-level'>level {level}</span> "
            f"<span class='hm-cluster'>{cluster}</span>"
            f"<span class='hm-name'>{escape(facts.name(level, cluster))}</span></span></li>"
            for level, cluster in enumerate(last.path.ids, 1)
        )
        ids = ",".join(str(cluster) for cluster in last.path.ids)
        return (
            f"<h2>Cluster path</h2><ol class='hm-path' data-path='{ids}' "
            f"aria-label='Cluster path'>{steps}</ol>"
        )
    if last.memory == "generic":
        text = "The generic memory: nothing is routed, every prompt gets this one."
    else:
        text = "Memory off: nothing is routed and nothing is fetched."
    return f"<h2>No cluster path</h2><p class='hm-quiet'>{text}</p>"


def _table(fetch: FetchReport) -> str:
    rows = "".join(
        f"<tr data-level='{block.level}'><th scope='row'>{block.level}</th>"
        f"<td>{'generic' if block.cluster is None else block.cluster}</td>"
        f"<td data-bytes='{block.bytes}'>{block.bytes:,}</td><td>{block.ms:.3f}</td>"
        f"<td><span class='hm-source' data-source='{block.source}'>{block.source}</span></td>"
        f"<td>{'yes' if block.blocked else 'no'}</td></tr>"
        for block in fetch.blocks
    )
    ms = "<abbr title='milliseconds'>ms</abbr>"
    columns = ("Level", "Cluster", "Bytes", ms, "Source", "Blocked")
    return (
        "<div class='hm-scroll'><table class='hm-table'><caption>Fetched blocks</caption>"
        "<thead><tr>"
        + "".join(f"<th scope='col'>{column}</th>" for column in columns)
        + f"</tr></thead><tbody>{rows}</tbody>"
        f"<tfoot><tr><th scope='row' colspan='2'>Total</th>"
        f"<td data-bytes='{fetch.bytes}'>{fetch.bytes:,}</td><td>{fetch.ms:.3f}</td>"
        "<td></td><td></td></tr></tfoot></table></div>"
    )


def size(number: int) -> str:
    """Bytes for people, in powers of 1000: ``73.7 kB``."""
    value, unit = float(number), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):  # noqa: B007
        if value < 999.95 or unit == "TB":
            break
        value /= 1000
    return f"{number} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def _unbroken(number: int) -> str:
    """As :func:`size`, its unit never on a line of its own."""
    return size(number).replace(" ", "&nbsp;")


def count(number: int) -> str:
    """A number for people: ``2.4M``."""
    for power, letter in ((9, "B"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.1f}{letter}"
    return str(number)
