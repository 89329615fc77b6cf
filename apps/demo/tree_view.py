"""The tree and the path of an answer through it, as HTML with lines in SVG.

For who wires it into the page:

    picture(path, blocks, branching=16, levels=4, names=names, blocked=frozenset(), ident="tree")

- ``path``: (i1, ..., ip) or None (nothing routed: only level 1 is drawn, unlit).
- ``blocks``: the ``BlockReport`` of the levels that have arrived; a level lights up when its own is
  there, so give ``blocks[:1]``, ``blocks[:2]``, ... to light the path up level by level.
- ``names``: ``mlx_hiermem.routing.names.ClusterNames`` or None.
- ``blocked``: pairs (level, cluster) that this visitor has blocked.
- ``ident``: start of the ids, for more than one picture on a page.

Every cluster is ``<button type="button" class="hm-tree-node" id="tree-2-50" data-level="2"
data-cluster="50" aria-pressed="true|false" aria-label="...">``; pressed means blocked. Listen for
clicks on ``.hm-tree-node`` by delegation: the HTML is replaced with each update, ids stay. The
styles are in ``tree.css``, to be named in ``css_paths`` behind ``style.css``.

Notable: a column per level holds only the siblings of the cluster on the path, so that a tree of
any size takes at most p * k nodes; the HTML is well-formed XML; what comes from outside is text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from typing import TYPE_CHECKING

from mlx_hiermem.routing.names import unnamed

from .view import size

if TYPE_CHECKING:
    from mlx_hiermem.bank.report import BlockReport
    from mlx_hiermem.routing.names import ClusterNames

#: Most clusters of a column; those next to the path where there are more.
SHOWN = 32

#: What the sources of a block mean.
SOURCES = {
    "resident": "its level is held in memory",
    "cached": "fetched before",
    "disk": "read from its file",
    "kept": "in place since the fetch before",
    "prefetched": "read ahead",
    "batch": "read once for several answers",
    "blocked": "switched off, reads as zeros",
    "removed": "deleted from the bank, reads as zeros",
    "absent": "not in the part that is open, reads as zeros",
}


def picture(
    path: Sequence[int] | None,
    blocks: Sequence[BlockReport] = (),
    *,
    branching: int,
    levels: int,
    names: ClusterNames | None = None,
    blocked: Collection[tuple[int, int]] = frozenset(),
    memory_levels: Collection[int] | None = None,
    roots: int | None = None,
    ident: str = "tree",
) -> str:
    """The tree around a path, as the HTML of one section.

    Args:
        path: the cluster of each level, each a child of the one before; None: none.
        blocks: what has been fetched so far, by level.
        branching, levels: k and p of the tree.
        names: of the clusters.
        blocked: pairs (level, cluster) that are crossed out, beside those that ``blocks`` tells.
        memory_levels: levels that have memory (default: all); the others light up with those
            around them.
        roots: clusters of level 1, where memories were added behind the k of the tree.
        ident: start of every id.
    """
    found = {block.level: block for block in blocks}
    off = set(blocked)
    off |= {(b.level, b.cluster) for b in found.values() if b.blocked and b.cluster is not None}
    with_memory = set(range(1, levels + 1) if memory_levels is None else memory_levels)
    lit = 0 if path is None else _lit(found, with_memory, levels)
    columns, above = [], None
    for level in range(1, (levels if path is not None else 1) + 1):
        mine = None if path is None else path[level - 1]
        siblings = (roots or branching) if level == 1 else branching
        shown = _shown(mine, siblings)
        column = _Column(level, mine if level <= lit else None, shown, found.get(level), ident)
        count = (roots or branching) * branching ** (level - 1)
        columns.append(column.html(count, names, off, level in with_memory, above))
        above = None if mine is None else mine - shown.start
    ids = "" if path is None else ",".join(map(str, path[:lit]))
    return (
        f'<section class="hm-tree" id="{_text(ident)}" data-path="{ids}" data-lit="{lit}" '
        f'aria-label="Cluster tree">{listing(path, blocks, names, lit=lit)}'
        f'<div class="hm-tree-levels">{"".join(columns)}</div></section>'
    )


def listing(
    path: Sequence[int] | None,
    blocks: Sequence[BlockReport] = (),
    names: ClusterNames | None = None,
    *,
    lit: int | None = None,
) -> str:
    """The path in words, a list item per level; seen by screen readers alone (``hm-tree-words``).

    Args:
        lit: how many levels to tell (default: all).
    """
    if path is None:
        return '<p class="hm-tree-words">No path: nothing is routed.</p>'
    found = {block.level: block for block in blocks}
    items = "".join(
        f"<li>{_text(_words(level, cluster, _name(names, level, cluster), found.get(level)))}</li>"
        for level, cluster in enumerate(path[: len(path) if lit is None else lit], 1)
    )
    # A list without items is none, for screen readers.
    items = items or "<li>No block has arrived yet.</li>"
    return f'<ol class="hm-tree-words" aria-label="Path through the tree">{items}</ol>'


def _lit(found: Collection[int], with_memory: set[int], levels: int) -> int:
    """How many levels, from the first on, are lit."""
    lit = 0
    while lit < levels and (lit + 1 in found or lit + 1 not in with_memory):
        lit += 1
    # What has no memory waits for the first block.
    return lit if found else 0


def _shown(mine: int | None, siblings: int) -> range:
    """The clusters of a column."""
    first = 0 if mine is None else mine - mine % siblings
    count = min(siblings, SHOWN)
    start = 0 if mine is None else min(max(0, mine - first - count // 2), siblings - count)
    return range(first + start, first + start + count)


class _Column:
    """A level: its head, the lines that lead to it, its clusters.

    Args:
        lit: the cluster on the path, once it is lit.
        shown: the clusters to draw.
        block: of the cluster on the path.
    """

    def __init__(
        self, level: int, lit: int | None, shown: range, block: BlockReport | None, ident: str
    ) -> None:
        self.level = level
        self.lit = lit
        self.shown = shown
        self.block = block if lit is not None else None
        self.ident = ident

    def html(
        self,
        clusters: int,
        names: ClusterNames | None,
        off: Collection[tuple[int, int]],
        memory: bool,
        above: int | None,
    ) -> str:
        """``clusters``: of the whole level. ``above``: where in the column before, counted from 0,
        the lines start; None: no lines."""
        nodes = "".join(
            self._node(cluster, _name(names, self.level, cluster), (self.level, cluster) in off)
            for cluster in self.shown
        )
        rest = clusters - len(self.shown)
        more = f'<p class="hm-tree-more">of {clusters:,}</p>' if rest else ""
        return (
            f'<div class="hm-tree-level" role="group" aria-label="Level {self.level}" '
            f'data-level="{self.level}" data-lit="{str(self.lit is not None).lower()}">'
            f'<div class="hm-tree-head"><p class="hm-tree-title">Level {self.level}</p>{more}'
            f"{self._fetch(memory)}</div>{self._lines(above)}"
            f'<div class="hm-tree-nodes">{nodes}</div></div>'
        )

    def _fetch(self, memory: bool) -> str:
        if not memory:
            return '<p class="hm-tree-fetch">no memory</p>'
        if self.block is None:
            return '<p class="hm-tree-fetch" aria-hidden="true">–</p>'
        block, source = self.block, _text(self.block.source)
        meaning = _text(SOURCES.get(block.source, block.source))
        return (
            f'<p class="hm-tree-fetch"><span data-bytes="{block.bytes}">{size(block.bytes)}</span> '
            f"<span>{block.ms:.3f} ms</span> "
            f'<span class="hm-source" data-source="{source}" title="{meaning}">{source}</span></p>'
        )

    def _lines(self, above: int | None) -> str:
        """Curves from the cluster above to each of its children."""
        if above is None:
            return ""
        rows = max(len(self.shown), above + 1)
        curves = "".join(
            f'<path class="{"hm-tree-lit" if cluster == self.lit else "hm-tree-dark"}" '
            f'd="M0 {above + 0.5}C5 {above + 0.5} 5 {row + 0.5} 10 {row + 0.5}"/>'
            # The lit one last, on top of the others.
            for row, cluster in sorted(enumerate(self.shown), key=lambda one: one[1] == self.lit)
        )
        return (
            f'<svg class="hm-tree-lines" viewBox="0 0 10 {rows}" preserveAspectRatio="none" '
            f'style="height:calc({rows} * var(--hm-tree-row))" aria-hidden="true" '
            f'focusable="false">{curves}</svg>'
        )

    def _node(self, cluster: int, name: str, off: bool) -> str:
        lit = cluster == self.lit
        block = self.block if lit else None
        label = _words(self.level, cluster, name, block, on_path=lit, off=off)
        source = "" if block is None else f' data-source="{_text(block.source)}"'
        text = _text(name or unnamed(cluster))
        # Who has no name is called by the number.
        named = name not in ("", unnamed(cluster))
        number = f'<span class="hm-tree-number">{cluster}</span>' if named else ""
        return (
            f'<button type="button" class="hm-tree-node" '
            f'id="{_text(self.ident)}-{self.level}-{cluster}" '
            f'data-level="{self.level}" data-cluster="{cluster}" data-path="{str(lit).lower()}" '
            f'data-blocked="{str(off).lower()}"{source} aria-pressed="{str(off).lower()}" '
            f'title="{text}" aria-label="{_text(label)}">'
            f'{number}<span class="hm-tree-name">{f"<s>{text}</s>" if off else text}</span>'
            "</button>"
        )


def _words(
    level: int,
    cluster: int,
    name: str,
    block: BlockReport | None,
    on_path: bool = False,
    off: bool = False,
) -> str:
    """A cluster and its block in words."""
    parts = [f"Level {level}, cluster {cluster}" + (f": {name}" if name else "")]
    if on_path:
        parts.append("on the path")
    if block is not None:
        parts.append(f"{size(block.bytes)} in {block.ms:.3f} ms, {block.source}")
    if off or (block is not None and block.blocked and block.source != "blocked"):
        parts.append("blocked")
    return "; ".join(parts)


def _name(names: ClusterNames | None, level: int, cluster: int) -> str:
    return "" if names is None else names.of(level, cluster)


def _text(text: str) -> str:
    """Text for anywhere in the HTML; what cannot be printed becomes a space."""
    return escape("".join(one if one.isprintable() else " " for one in text), quote=True)
