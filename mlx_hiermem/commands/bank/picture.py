"""The cluster tree with its use counts, as text and as a PNG.

Notable: only clusters that are used or blocked are looked at, and both pictures have as many
columns as can be told apart, so that a tree of any size is drawn at once.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...files import AtomicFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .uses import Uses

Blocked = Iterable[tuple[int, int]]

# ---- text ------------------------------------------------------------------------------

#: Columns of the text, most columns of its strips, its most lines, and the width of its bars.
_WIDTH, _STRIP, _LINES, _BAR = 100, 64, 64, (5, 20)
#: Heights 1 to 8, the full bar, its eighths from 1 to 7, and what is blocked.
_UNICODE = ("▁▂▃▄▅▆▇█", "█", "▏▎▍▌▋▊▉", "×")
_ASCII = (".:-=+*#@", "#", "", "x")


def draw_text(uses: Uses, blocked: Blocked, encoding: str | None = "utf-8") -> list[str]:
    """The tree as lines of text: one for each cluster of level 1, with a strip of what is below it.

    Args:
        blocked: pairs (level, cluster).
        encoding: of where it will be shown; plain ASCII is used where it has no blocks.

    Returns:
        Lines of at most 100 characters (more only for clusters of eight digits and more). Of a tree
        with more than 64 clusters at level 1 the busiest 64.
    """
    signs = _UNICODE if _can_show(encoding) else _ASCII
    k, below = uses.roots, uses.branching ** (uses.levels - 1)  # leaves below each line
    clusters, counts = (array.tolist() for array in uses.at(1))
    per_cluster = dict(zip(clusters, counts, strict=True))
    shown = _busiest(per_cluster, k)
    most = max(counts, default=0)

    number_width = max(len("level 1"), len(str(k - 1)))
    uses_width = max(len("uses"), len(f"{most:,}"))
    fixed = 1 + number_width + 2 + uses_width + 2 + len("100.0%") + 2 + 2
    columns, group = _columns(below, min(_STRIP, max(16, _WIDTH - fixed - _BAR[0])))
    bar_width = min(_BAR[1], max(_BAR[0], _WIDTH - fixed - columns))
    strips = _strips(uses, below, group)
    tallest = max(strips.values(), default=0)
    lines_marked, columns_marked = _marks(uses, blocked, below, group)

    def line(mark: str, *cells: str) -> str:
        widths = (f">{number_width}", f">{uses_width}", ">6", f"<{bar_width}", "")
        texts = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
        return f"{mark}{'  '.join(texts)}".rstrip()

    head = _below(below, group, columns, _WIDTH - fixed - bar_width)
    lines = [line(" ", "level 1", "uses", "share", "", head)]
    for cluster in shown:
        count = per_cluster.get(cluster, 0)
        strip = "".join(
            signs[3]
            if (cluster, column) in columns_marked
            else _height(strips.get((cluster, column), 0), tallest, signs[0])
            for column in range(columns if below > 1 else 0)
        )
        mark = signs[3] if cluster in lines_marked else " "
        bar = _bar(count, most, bar_width, signs)
        lines.append(line(mark, str(cluster), f"{count:,}", _share(count, uses.total), bar, strip))
    if hidden := k - len(shown):
        rest = uses.total - sum(per_cluster.get(cluster, 0) for cluster in shown)
        lines.append(f"and {hidden:,} more clusters of level 1: {rest:,} uses in all")
    if below > 1:
        lines.append(_legend(tallest, signs[0]))
    if lines_marked or columns_marked:
        text = f"{signs[3]} before a line: its block of level 1 is blocked"
        lines.append(f"{text}; in a strip: a block there is" if below > 1 else text)
    return lines


def _strips(uses: Uses, below: int, group: int) -> dict[tuple[int, int], int]:
    """Uses in each column, (cluster of level 1, column), that has some."""
    strips: dict[tuple[int, int], int] = {}
    for leaf, count in zip(uses.leaves.tolist(), uses.counts.tolist(), strict=True):
        place = (leaf // below, leaf % below // group)
        strips[place] = strips.get(place, 0) + count
    return strips


def _marks(
    uses: Uses, blocked: Blocked, below: int, group: int
) -> tuple[set[int], set[tuple[int, int]]]:
    """Clusters of level 1 that are blocked, and columns in which a deeper block is."""
    lines: set[int] = set()
    columns: set[tuple[int, int]] = set()
    for level, cluster in blocked:
        leaves = uses.branching ** (uses.levels - level)  # below the blocked cluster
        top, first = divmod(cluster * leaves, below)
        if level == 1:
            lines.add(top)
        else:
            last = (first + leaves - 1) // group
            columns.update((top, column) for column in range(first // group, last + 1))
    return lines, columns


def _can_show(encoding: str | None) -> bool:
    try:
        "".join(_UNICODE).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _busiest(counts: dict[int, int], clusters: int) -> list[int]:
    """The clusters that get a line, ascending."""
    if clusters <= _LINES:
        return list(range(clusters))
    return sorted(sorted(counts, key=lambda cluster: (-counts[cluster], cluster))[:_LINES])


def _columns(leaves: int, limit: int) -> tuple[int, int]:
    """Columns of a strip and leaves in each: equal columns if that does not waste the width."""
    equal = next(columns for columns in range(min(limit, leaves), 0, -1) if leaves % columns == 0)
    if equal == leaves or equal >= limit // 2:
        return equal, leaves // equal
    group = -(-leaves // limit)
    return -(-leaves // group), group


def _below(leaves: int, group: int, columns: int, width: int) -> str:
    """Head of the strips, in ``width`` characters."""
    if leaves == 1:
        return ""
    if group == 1:
        return f"its {leaves:,} leaves"
    last = "" if columns * group == leaves else ", the last of fewer"
    text = f"its {leaves:,} leaves, {group:,} a column{last}"
    return text if len(text) <= width else f"{group:,} leaves a column"


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}%" if total else "-"


def _bar(count: int, most: int, width: int, signs: Sequence[str]) -> str:
    """A linear bar; whatever is used has at least its shortest piece."""
    if not count:
        return ""
    full, eighths = signs[1], signs[2]
    if not eighths:
        return full * max(1, round(width * count / most))
    pieces = max(1, round(8 * width * count / most))
    return full * (pieces // 8) + (eighths[pieces % 8 - 1] if pieces % 8 else "")


def _height(count: int, tallest: int, heights: str) -> str:
    """A sign for a count, on the scale of its cube root; whatever is used has one."""
    # In integers, so that the legend says exactly what is drawn.
    steps = len(heights)
    found = (step for step in range(1, steps + 1) if count * steps**3 <= step**3 * tallest)
    return heights[next(found) - 1] if count else " "


def _legend(tallest: int, heights: str) -> str:
    """The most uses of each height that occurs."""
    steps = len(heights)
    most = [step**3 * tallest // steps**3 for step in range(steps + 1)]
    shown = [step for step in range(1, steps + 1) if most[step] > most[step - 1]]
    if tallest >= 100_000:  # wide numbers: not all of them
        shown = shown[1::2]
    pairs = (f"{heights[step - 1]} {most[step]:,}" for step in shown)
    return f"uses of a column, at most:  {'   '.join(pairs)}"


# ---- PNG -------------------------------------------------------------------------------

#: Most cells in a row of the PNG: fewer than it has pixels there, so that each is seen.
_CELLS = 1100
#: Most clusters that get borders, and that get their number of uses written on them.
_BORDERS, _WRITTEN = 300, 16
_INK, _LINE, _BLOCKED = "#333333", "#9AA5AB", "#D00000"
#: Least width of what is blocked, as a share of the row, so that it can be seen.
_LEAST = 0.004


def draw(path: Path, uses: Uses, report: dict[str, Any]) -> None:
    """Write the PNG, whole or not at all.

    Args:
        report: what ``MemoryBank.inspect`` says of the bank.

    Raises:
        FormatError: the file cannot be written; what was there before is still there.
    """
    data = io.BytesIO()
    figure(uses, report).savefig(data, format="png", dpi=150)
    with AtomicFile(path.parent, path.name) as file:
        file.write(data.getvalue())


def figure(uses: Uses, report: dict[str, Any]) -> Figure:
    """The picture: a row for each level, the children of a cluster below it, colour for uses."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    height = max(0.3, min(0.9, 9 / uses.levels))
    fig = Figure(figsize=(11, 1.9 + height * uses.levels), layout="constrained")
    axes = fig.subplots()
    most = int(max(uses.at(1)[1], default=1))
    colours = ScalarMappable(LogNorm(1, max(2, most)), "viridis_r")
    blocked: dict[int, list[int]] = {}
    for level, cluster in report["blocked"]:
        blocked.setdefault(level, []).append(cluster)
    labels = []
    for row in report["levels"]:
        level = row["level"]
        _draw_level(axes, uses, level, colours)
        _draw_blocked(axes, level, blocked.get(level, []), uses.clusters(level))
        state = {"none": ", no memory", "absent": ", absent"}.get(row["tier"], "")
        labels.append(f"level {level}{state}\n{row['clusters']:,} clusters")
    _frame(axes, uses, labels, small=height < 0.45)
    bar = fig.colorbar(colours, ax=axes, pad=0.01, aspect=12 * height * uses.levels / 2)
    bar.set_label("uses of a cluster\n(log scale; white: none)", color=_INK)
    # The powers of ten, and the most, unless that is too near to the last of them.
    ticks = [10**power for power in range(len(str(most))) if 10**power * 1.7 < most or not power]
    ticks += [most] * (most > 1)
    bar.set_ticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    bar.ax.yaxis.set_minor_formatter("")
    bar.outline.set_edgecolor(_LINE)
    bar.ax.tick_params(colors=_INK)
    fig.suptitle(_title(uses, report), color=_INK, fontsize=11, ha="left", x=0.01)
    return fig


def _title(uses: Uses, report: dict[str, Any]) -> str:
    leaves = uses.clusters(uses.levels)
    title = (
        f"Use of the memory bank by {uses.total:,} {uses.what}\n"
        f"{len(uses.leaves):,} of {leaves:,} leaves used, the busiest by "
        f"{int(max(uses.counts, default=0)):,}"
    )
    count = len(report["blocked"])
    if count:
        title += f"; {count:,} block{'s' * (count > 1)} blocked (red, hatched)"
    return title


def _cells(uses: Uses, level: int) -> np.ndarray:
    """(n,) float64 uses at a level, NaN where none: of each cluster, or, where they are more than
    can be told apart, the most in each run of neighbours."""
    clusters, counts = uses.at(level)
    total = uses.clusters(level)
    cells = np.zeros(min(total, _CELLS))
    np.maximum.at(cells, _place(clusters, total), counts)
    cells[cells == 0] = np.nan
    return cells


def _place(clusters: np.ndarray, total: int) -> np.ndarray:
    """The cell of each cluster, when ``total`` of them share at most ``_CELLS`` cells."""
    if total <= _CELLS:
        return clusters
    # In float64, since ids go up to 2^62.
    return np.minimum((clusters / total * _CELLS).astype(np.int64), _CELLS - 1)


def _draw_level(axes: Axes, uses: Uses, level: int, colours: Any) -> None:
    top, bottom = level - 0.96, level - 0.04
    cells = _cells(uses, level)
    axes.imshow(
        np.ma.masked_invalid(cells)[None], extent=(0, 1, bottom, top), aspect="auto",
        interpolation="nearest", norm=colours.norm, cmap=colours.cmap,
    )  # fmt: skip
    # Borders of the clusters, or of those above them that are not too many; those of level 1 stand
    # out, so that one sees what is below what.
    for one in range(level, 0, -1):
        count = uses.clusters(one)
        if count <= _BORDERS:
            edges = np.arange(1, count) / count
            axes.vlines(edges, top, bottom, color=_LINE, linewidth=0.7 if count <= 32 else 0.25)
            break
    if 1 < level and uses.roots <= 32:
        edges = np.arange(1, uses.roots) / uses.roots
        axes.vlines(edges, top, bottom, color=_INK, linewidth=0.9)
    axes.broken_barh(
        [(0, 1)],
        (top, bottom - top),
        facecolor="none",
        edgecolor=_LINE,
        linewidth=0.7,
        clip_on=False,
    )
    if uses.clusters(level) > _WRITTEN:
        return
    for place, value in enumerate(cells):
        if np.isfinite(value):
            red, green, blue, _ = colour = colours.to_rgba(value)
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            axes.text(
                (place + 0.5) / len(cells), (top + bottom) / 2, f"{value:,.0f}", ha="center",
                va="center", fontsize=8, color="white" if dark else _INK, zorder=4,
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip


def _draw_blocked(axes: Axes, level: int, clusters: Sequence[int], total: int) -> None:
    """Hatch what is blocked; neighbours are one piece."""
    if not clusters:
        return
    cells = min(total, _CELLS)
    places = np.unique(_place(np.asarray(clusters, np.int64), total))
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    pieces = []
    for run in runs:
        start, width = run[0] / cells, len(run) / cells
        wide = max(width, _LEAST)
        pieces.append((min(max(0, start - (wide - width) / 2), 1 - wide), wide))
    axes.broken_barh(
        pieces, (level - 0.96, 0.92), facecolor="none", edgecolor=_BLOCKED, hatch="////",
        linewidth=1, zorder=3,
    )  # fmt: skip


def _frame(axes: Axes, uses: Uses, labels: Sequence[str], small: bool) -> None:
    """Limits, ticks and labels; level 1 is on top."""
    k = uses.roots
    axes.set_xlim(0, 1)
    axes.set_ylim(uses.levels, 0)
    axes.spines[:].set_visible(False)
    step = -(-k // 32)
    numbers = range(0, k, step)
    axes.set_xticks([(number + 0.5) / k for number in numbers], [f"{n}" for n in numbers])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("cluster of level 1; below it its children, in their order", color=_INK)
    texts = [label.replace("\n", ": ") for label in labels] if small else labels
    size = "small" if small else None
    axes.set_yticks([level - 0.5 for level in range(1, uses.levels + 1)], texts, fontsize=size)
    axes.tick_params(length=0, colors=_INK)
    if uses.clusters(uses.levels) > _CELLS:
        axes.text(
            0, -0.03, "Where clusters are too narrow to see, the colour is that of the busiest of "
            "the neighbours that share a place.", transform=axes.transAxes, va="top", color=_INK,
            fontsize="small",
        )  # fmt: skip
