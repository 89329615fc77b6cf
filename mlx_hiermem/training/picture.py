"""The picture of a run's log: training loss, learning rate, validation per kind of memory.

Notable: made with matplotlib's ``Figure`` alone, no global state of pyplot; curves of any length
are thinned to what can be told apart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Most points of a line; more cannot be told apart.
_POINTS = 1000
# Colours of Okabe and Ito, told apart with any colour vision; markers and dashes say it again.
_VALIDATION = {
    "none": ("#000000", "s", ":"),
    "generic": ("#D55E00", "D", "--"),
    "fetched": ("#0072B2", "o", "-"),
}
_OTHER = ("#CC79A7", "v", "-.")
_RAW, _SMOOTH, _INK = "#B8C4CC", "#56707F", "#333333"


def figure(steps: list[dict[str, Any]], validations: list[dict[str, Any]]) -> Figure:
    """The picture of a run.

    Args:
        steps, validations: the entries of a log, in its order; see ``curves.py``.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    fig = Figure(figsize=(8, 5.4), layout="constrained")
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    numbers = _column(steps, "step")
    drawn = _draw_training(top, numbers, _column(steps, "loss"))
    drawn += _draw_validations(top, validations)
    _scale(top, drawn)
    top.set_ylabel("loss (nats per token)")
    if drawn:
        # Above the picture, where no curve is, column after column.
        fig.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=_INK)
    else:
        top.text(0.5, 0.5, "no steps yet", transform=top.transAxes, ha="center", color=_INK)

    x, y = _buckets(numbers, _column(steps, "learning_rate"))[:2]
    bottom.plot(x, y, color=_SMOOTH, linewidth=1.5, marker="o" if len(x) == 1 else None)
    peak = float(np.nanmax(y, initial=0))
    bottom.set_ylim(0, 1.15 * peak if peak > 0 else 1)
    bottom.set_yticks([0, peak] if peak > 0 else [0])
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    bottom.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    everywhere = np.concatenate([numbers, _column(validations, "step")])
    first, last = (everywhere.min(), everywhere.max()) if everywhere.size else (0, 0)
    margin = max(0.02 * (last - first), 0.5)
    bottom.set_xlim(first - margin, last + margin)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK)
    fig.align_ylabels()
    return fig


def _draw_training(axes: Axes, steps: np.ndarray, losses: np.ndarray) -> list[np.ndarray]:
    """The loss of each step and its smoothed line; returns what has to fit into the axis."""
    if not np.isfinite(losses).any():
        return []
    x, mean, low, high = _buckets(steps, losses)
    if len(x) < len(steps):
        axes.fill_between(x, low, high, color=_RAW, alpha=0.6, linewidth=0, label="training, range")
    else:
        marker = "o" if len(x) < 30 else None
        axes.plot(x, mean, color=_RAW, linewidth=1, marker=marker, markersize=4, label="training")
    if len(losses) >= 30:
        x, smooth = _buckets(steps, _smooth(losses, max(10.0, len(losses) / 50)))[:2]
        label = f"training, smoothed: {smooth[np.isfinite(smooth)][-1]:.3f}"
        axes.plot(x, smooth, color=_SMOOTH, linewidth=1.8, label=label)
        # A few steps far away from all others do not decide about the axis.
        return [smooth, np.nanpercentile(losses, [1, 99])]
    return [losses]


def _draw_validations(axes: Axes, validations: list[dict[str, Any]]) -> list[np.ndarray]:
    drawn = []
    found = {name for entry in validations for name in entry["validation"]}
    for name in (*_VALIDATION, *sorted(found - set(_VALIDATION))):
        points = [
            (entry["step"], entry["validation"][name])
            for entry in validations
            if entry["validation"].get(name) is not None
        ]
        if not points:
            continue
        color, marker, dashes = _VALIDATION.get(name, _OTHER)
        x, y = np.array(points, np.float64).T
        last = y[-1]
        if len(x) > _POINTS:
            x, y = _buckets(x, y)[:2]
        axes.plot(
            x, y, color=color, linestyle=dashes, linewidth=1.8, marker=marker, markersize=5,
            markevery=max(1, len(x) // 25), label=f"validation, {name}: {last:.3f}", zorder=3,
        )  # fmt: skip
        drawn.append(y)
    return drawn


def _scale(axes: Axes, drawn: list[np.ndarray]) -> None:
    """A logarithmic axis where the loss falls to less than a third; room for what was drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = np.concatenate(drawn) if drawn else np.empty(0)
    values = values[np.isfinite(values)]
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > 3:
        axes.set_yscale("log")
        subs = (1,) if high / low > 1000 else (1, 1.5, 2, 3, 4, 5, 7)
        axes.yaxis.set_major_locator(LogLocator(10, subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
    else:
        margin = max(0.06 * (high - low), 1e-3 * abs(high), 1e-6)
        axes.set_ylim(low - margin, high + margin)


def _buckets(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Thin a curve to at most ``_POINTS``: middle of x; mean, least and greatest of y, in each."""
    if len(x) <= _POINTS:
        return x, y, y, y
    starts = np.linspace(0, len(x), _POINTS, endpoint=False).astype(np.int64)
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(finite, y, 0.0), starts)
    empty = counts == 0
    mean = np.where(empty, np.nan, sums / np.maximum(counts, 1))
    low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    low[empty] = high[empty] = np.nan
    middle = np.add.reduceat(x, starts) / np.diff(np.append(starts, len(x)))
    return middle, mean, low, high


def _smooth(values: np.ndarray, span: float) -> np.ndarray:
    """Exponential mean over about ``span`` values, with its bias at the start corrected."""
    keep = 1 - 1 / span
    total = weight = 0.0
    out = np.full(len(values), np.nan)
    for position, value in enumerate(values.tolist()):
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        if weight:
            out[position] = total / weight
    return out


def _column(entries: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array(
        [math.nan if entry.get(name) is None else entry[name] for entry in entries], np.float64
    )
