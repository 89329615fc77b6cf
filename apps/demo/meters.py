"""Meters: how fast an answer came, what was fetched for it, and how little is in memory, as HTML.

The bar is to scale: its whole length is the anchor, one fetched memory and all blocks of the bank.
So what is in memory looks as small as it is; the figures below it are exact.
"""

from __future__ import annotations

from .facts import Facts, found
from .view import Answer, size

#: Parts of the bar: name, label, what it is. All but the last are in memory.
PARTS = (
    ("anchor", "Anchor", "always in memory"),
    ("fetched", "Fetched", "what this answer computes with"),
    ("cached", "Cached", "blocks of the bank held in memory"),
    ("disk", "On disk only", "the rest of the bank"),
)


def meters(state: Answer | None, facts: Facts) -> str:
    """The meters of an answer; nothing before the first token."""
    if state is None or state.last is None or state.began is None or state.failed:
        return ""
    last, held = state.last, state.began.held
    hits, blocks = found(last.fetch)
    here = f"{hits} of {blocks} blocks" if blocks else "no blocks"
    ever = f"; since the start {held.hits / held.blocks:.0%}" if held.blocks else ""
    share = last.fetch.bytes / facts.bank_bytes
    figures = (
        ("speed", "Speed", f"{last.tokens_per_second:,.0f} tokens/s", ""),
        ("first", "First token", f"{state.began.seconds * 1e3:,.1f} ms", ""),
        ("tokens", "Tokens", f"{last.prompt_tokens} read, {last.generation_tokens} written", ""),
        (
            "share",
            "Fetched, of the whole bank",
            f"{size(last.fetch.bytes)} of {size(facts.bank_bytes)} ({share:.2%})",
            f" data-bytes='{last.fetch.bytes}' data-bank='{facts.bank_bytes}'",
        ),
        ("hits", "Found in memory", f"{here}{ever}", f" data-hits='{hits}' data-of='{blocks}'"),
    )
    rows = "".join(
        f"<div><dt>{label}</dt><dd data-meter='{name}'{data}>{text}</dd></div>"
        for name, label, text, data in figures
    )
    return (
        "<section class='hm-card hm-report' aria-label='Meters'><h2>Meters</h2>"
        f"<dl class='hm-meters'>{rows}</dl>{bar(state, facts)}</section>"
    )


def bar(state: Answer, facts: Facts) -> str:
    """Anchor, fetched, cached and the whole bank as one bar, to scale."""
    assert state.last is not None and state.began is not None
    held = state.began.held.resident + state.began.held.cached
    sizes = {
        "anchor": facts.anchor_bytes,
        "fetched": state.last.fetch.bytes,
        "cached": held,
        "disk": max(0, facts.bank_bytes - held),
    }
    total = sum(sizes.values()) or 1
    pieces = "".join(
        f"<span class='hm-part' data-part='{name}' style='flex-grow:{sizes[name] / total:.6f}'>"
        "</span>"
        for name, *_ in PARTS
        if sizes[name]
    )
    legend = "".join(
        f"<li><span class='hm-swatch hm-part' data-part='{name}' aria-hidden='true'></span>"
        f"<b>{label}</b> <span data-size='{name}' data-bytes='{sizes[name]}'>{size(sizes[name])}"
        f"</span> <span class='hm-quiet'>{meaning}</span></li>"
        for name, label, meaning in PARTS
    )
    memory = total - sizes["disk"]
    words = (
        f"In memory {size(memory)}; the whole bank has {size(facts.bank_bytes)}, "
        f"of which {held / facts.bank_bytes:.1%} is in memory"
    )
    return (
        f"<figure class='hm-held'><div class='hm-parts' role='img' aria-label='{words}'>{pieces}"
        f"</div><figcaption>{words}.</figcaption><ul class='hm-key'>{legend}</ul></figure>"
    )
