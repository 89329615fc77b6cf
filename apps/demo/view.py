"""An answer and its fetch report as HTML.

Notable: whatever a visitor or a model wrote goes through ``html.escape``; nothing else here comes
from outside. Numbers are shown to the byte, so that the page can be compared with ``--json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from .worker import Ask, End, Facts

if TYPE_CHECKING:
    from mlx_hiermem.bank.report import FetchReport
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
    """

    ask: Ask
    number: int = 0
    ahead: int = 0
    text: str = ""
    last: Response | None = None
    end: End | None = None

    def update(self, update: Response | End) -> None:
        if isinstance(update, End):
            self.end = update
        else:
            self.text += update.text
            self.last = update

    @property
    def status(self) -> str:
        """One or two words: what is going on."""
        if self.end is not None:
            return _ENDS.get(self.end.reason, self.end.reason)
        if self.last is not None:
            return "writing"
        return f"waiting, {self.ahead} ahead" if self.ahead else "fetching"


def head(name: str, facts: Facts) -> str:
    """The top of the page: what is loaded."""
    levels = " + ".join(f"{level.clusters:,}" for level in facts.levels)
    parts = [
        f"<b>{escape(name)}</b>",
        f"anchor of {count(facts.anchor_parameters)} parameters",
        f"bank of {size(facts.bank_bytes)} ({levels} blocks)",
        f"one answer fetches {size(facts.fetch_bytes)}",
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
    if state.end is not None and state.end.error is not None:
        text = escape(" ".join(state.end.error.splitlines()))
        return (
            f"<section class='hm-card hm-answer' data-state='error' data-number='{state.number}' "
            f"aria-label='Answer'><p class='hm-error' role='alert'>{text}</p></section>"
        )
    running = state.end is None
    caret = "<span class='hm-caret' aria-hidden='true'></span>" if running else ""
    return (
        f"<section class='hm-card hm-answer' data-state='{'running' if running else 'done'}' "
        f"data-number='{state.number}' aria-label='Answer' aria-busy='{str(running).lower()}'>"
        # On lines of their own: whether a space belongs between them only the tokenizer knows.
        f"<p class='hm-prompt'>{escape(state.ask.prompt)}</p>"
        f"<p class='hm-text'><span class='hm-written'>{escape(state.text)}</span>{caret}</p>"
        f"<p class='hm-status' role='status'>{escape(state.status)}</p></section>"
    )


def report(state: Answer | None, facts: Facts) -> str:
    """Path, fetch report and speed of an answer; nothing before the first token."""
    if state is None or state.last is None or (state.end is not None and state.end.error):
        return ""
    last = state.last
    parts = [_path(last)]
    if last.fetch.blocks:
        parts.append(_table(last.fetch))
    parts.append(_meters(last, facts))
    return (
        f"<section class='hm-card hm-report' data-memory='{last.memory}' "
        f"aria-label='What was fetched'>{''.join(parts)}</section>"
    )


def _path(last: Response) -> str:
    if last.path is not None:
        steps = "".join(
            f"<li><span class='hm-node'><span class='hm-level'>level {level}</span> "
            f"<span class='hm-cluster'>{cluster}</span></span></li>"
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


def _meters(last: Response, facts: Facts) -> str:
    share = last.fetch.bytes / facts.bank_bytes
    bar = f"<span style='width:{share:.4%}'></span>" if share else ""
    total = size(facts.bank_bytes)
    return (
        "<dl class='hm-meters'><div><dt>Speed</dt>"
        f"<dd data-meter='speed'>{last.tokens_per_second:,.0f} tokens/s</dd></div>"
        f"<div><dt>Tokens</dt><dd>{last.prompt_tokens} read, {last.generation_tokens} written</dd>"
        "</div><div class='hm-wide'><dt>Fetched, of the whole bank</dt>"
        f"<dd data-meter='share' data-bytes='{last.fetch.bytes}' data-bank='{facts.bank_bytes}'>"
        f"{size(last.fetch.bytes)} of {total} ({share:.2%})"
        f"<span class='hm-bar' aria-hidden='true'>{bar}</span>"
        "</dd></div></dl>"
    )


def size(number: int) -> str:
    """Bytes for people, in powers of 1000: ``73.7 kB``."""
    value, unit = float(number), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):  # noqa: B007
        if value < 999.95 or unit == "TB":
            break
        value /= 1000
    return f"{number} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def count(number: int) -> str:
    """A number for people: ``2.4M``."""
    for power, letter in ((9, "B"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.1f}{letter}"
    return str(number)
