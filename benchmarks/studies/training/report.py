"""What a training study prints, writes and draws: a line for each label, over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_hiermem.commands.tables import table

from ...harness import Row
from .task import Result

#: What is shown of a score: its name, its unit, how it is read off.
FACTS, PERPLEXITY = "facts %", "perplexity"

#: How often a fact was trained, as the atlas's questions put it.
BUCKETS = ("most frequent", "frequent", "middle", "rare", "rarest")


@dataclass(frozen=True)
class Spread:
    """A number over several seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        low, high = min(found), max(found)
        # The mean of equal numbers may be off by a bit, and then lie outside of them.
        return cls(min(max(statistics.fmean(found), low), high), low, high)

    def show(self, digits: int = 2) -> str:
        """``83.1 ±0.4``: the mean, and half of the range."""
        half = (self.high - self.low) / 2
        return f"{self.mean:.{digits}f} ±{half:.{digits}f}" if half else f"{self.mean:.{digits}f}"


@dataclass(frozen=True)
class Line:
    """The runs of one label.

    Attributes:
        label: of the line.
        runs: one for each seed.
    """

    label: str
    runs: tuple[Result, ...]

    @property
    def first(self) -> Result:
        """What does not depend on the seed may be read off this one."""
        return self.runs[0]

    def facts(self, memory: str = "fetched", bucket: int | None = None) -> Spread:
        """Exact answers in per cent; of all questions, or of one bucket."""
        scores = [run.scores[memory] for run in self.runs]
        if bucket is None:
            return Spread.of(100 * one.facts for one in scores)
        return Spread.of(100 * (one.buckets[bucket] or 0.0) for one in scores)

    def perplexity(self, memory: str = "fetched") -> Spread:
        """Per token of questions and answers."""
        return Spread.of(run.scores[memory].perplexity for run in self.runs)

    def loss(self) -> Spread:
        """Of the last tenth of the steps."""
        return Spread.of(run.loss for run in self.runs)


def lines(results: Sequence[Result]) -> list[Line]:
    """Results by label, in the order in which labels come first."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.task.label, []).append(result)
    return [Line(label, tuple(runs)) for label, runs in found.items()]


def about(line: Line) -> str:
    """What the runs of a line have in common, for the detail of a row."""
    task = line.first.task
    return (
        f"{task.regime}, ranks {','.join(map(str, task.ranks))}, {task.steps} steps, rate "
        f"{task.rate:g}, {len(line.runs)} seeds"
    )


def rows(name: str, found: Iterable[Line]) -> Iterator[Row]:
    """Rows NAME.facts@LABEL (a share) and NAME.perplexity@LABEL, with fetched memory."""
    for line in found:
        memory = "fetched" if "fetched" in line.first.scores else "none"
        facts, perplexity = line.facts(memory), line.perplexity(memory)
        yield Row(
            f"{name}.facts@{line.label}", facts.mean / 100, "",
            f"share of exact answers, {facts.low:.2f} to {facts.high:.2f} %, "
            f"{line.facts('none').mean:.2f} % without memory; {about(line)}",
        )  # fmt: skip
        yield Row(
            f"{name}.perplexity@{line.label}", perplexity.mean, "",
            f"{perplexity.low:.3f} to {perplexity.high:.3f}, "
            f"{line.perplexity('none').mean:.3f} without memory; {about(line)}",
        )  # fmt: skip


def by_bucket() -> dict[str, Callable[[Line], str]]:
    """A column for each bucket, with fetched memory."""
    return {
        name: (lambda line, number=number: line.facts(bucket=number).show(1))
        for number, name in enumerate(BUCKETS)
    }


def show(
    title: str,
    found: Sequence[Line],
    more: Mapping[str, Callable[[Line], str]] | None = None,
    bare: bool = True,
) -> str:
    """A table with one line for each label.

    Args:
        title: of its first column.
        more: further columns after the ranks.
        bare: whether all have one anchor, so that a last line shows what it has without memory.
    """
    more = more or {}
    header = [title, "ranks", *more, "fetch size", "bank size", "loss", FACTS, PERPLEXITY]
    cells = []
    for line in found:
        one = line.first
        cells.append(
            [
                line.label, ",".join(map(str, one.task.ranks)),
                *(column(line) for column in more.values()),
                f"{one.fetch_size:,}", f"{one.bank_size:,}", line.loss().show(4),
                line.facts().show(), line.perplexity().show(3),
            ]
        )  # fmt: skip
    if bare:
        none, empty = found[0].first.scores["none"], [""] * len(more)
        cells.append(
            ["no memory", "", *empty, "0", "0", "", f"{100 * none.facts:.2f}",
             f"{none.perplexity:.3f}"]
        )  # fmt: skip
    return table(header, cells)


# ---- figures ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A line of a figure: x, and the spread of y at each."""

    label: str
    x: Sequence[float]
    y: Sequence[Spread]


def draw_curves(
    path: Path, x_name: str, panels: Mapping[str, Sequence[Curve]], log: bool = True
) -> None:
    """One panel for each name of a y axis, with its curves and their spreads.

    Args:
        log: the x axis counts doublings.
    """
    figure, axes = _axes(len(panels))
    for axis, (y_name, curves) in zip(axes, panels.items(), strict=True):
        for curve in curves:
            mean = [one.mean for one in curve.y]
            (drawn,) = axis.plot(curve.x, mean, marker="o", markersize=4, label=curve.label)
            axis.fill_between(
                curve.x, [one.low for one in curve.y], [one.high for one in curve.y],
                color=drawn.get_color(), alpha=0.2, linewidth=0,
            )  # fmt: skip
        axis.set_xlabel(x_name)
        axis.set_title(y_name)
        if log:
            axis.set_xscale("log", base=2)
    axes[0].legend(fontsize="small")
    _save(figure, path)


def draw_groups(
    path: Path,
    x_name: str,
    found: Sequence[Line],
    group: Callable[[Line], str],
    x: Callable[[Line], float],
) -> None:
    """Facts and perplexity over x, a curve for each group of lines.

    Args:
        group: the name of a line's curve.
        x: where a line is on it.
    """
    groups: dict[str, list[Line]] = {}
    for line in found:
        groups.setdefault(group(line), []).append(line)
    panels = {
        name: [
            Curve(label, [x(one) for one in some], [read(one) for one in some])
            for label, some in groups.items()
        ]
        for name, read in ((FACTS, Line.facts), (PERPLEXITY, Line.perplexity))
    }
    draw_curves(path, x_name, panels)


def draw_scores(path: Path, found: Sequence[Line]) -> None:
    """A bar for each line, of facts and of perplexity; all have one anchor."""
    none = found[0].first.scores["none"]
    draw_bars(
        path,
        {
            FACTS: {line.label: line.facts() for line in found},
            PERPLEXITY: {line.label: line.perplexity() for line in found},
        },
        {FACTS: 100 * none.facts, PERPLEXITY: none.perplexity},
    )


def draw_bars(
    path: Path, panels: Mapping[str, Mapping[str, Spread]], bare: Mapping[str, float] | None = None
) -> None:
    """One panel for each name of a y axis, a bar for each label, whiskers from low to high.

    Args:
        bare: by panel, where a dotted line shows what is had without memory.
    """
    figure, axes = _axes(len(panels))
    for axis, (name, bars) in zip(axes, panels.items(), strict=True):
        means = [one.mean for one in bars.values()]
        whiskers = [
            [one.mean - one.low for one in bars.values()],
            [one.high - one.mean for one in bars.values()],
        ]
        axis.bar(list(bars), means, yerr=whiskers, capsize=3, color="tab:blue")
        axis.set_title(name)
        if bare is not None and name in bare:
            axis.axhline(bare[name], color="black", linestyle=":", label="no memory")
            axis.legend(fontsize="small", loc="lower right")
        if len(bars) > 5:  # the labels need room
            axis.set_xticks(range(len(bars)), list(bars), rotation=35, ha="right")
    _save(figure, path)


def _axes(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no window, no global state

    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
