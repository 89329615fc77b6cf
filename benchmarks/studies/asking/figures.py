"""Figures of the studies: panels of lines with their spread, or of bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .table import Mean


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title, xlabel, ylabel: what is written at it.
        series: name -> a mean for each place.
        places: where the means stand: numbers, joined by lines, or names.
        bars: bars in place of lines and points; places are names then.
        scale: what values are multiplied by; 100 for shares.
        log: whether the places are on a logarithmic axis.
    """

    title: str
    xlabel: str
    ylabel: str
    series: Mapping[str, Sequence[Mean]]
    places: Sequence[float] | Sequence[str]
    bars: bool = False
    scale: float = 100.0
    log: bool = False


def _parts(panel: Panel) -> int:
    """How much room each place takes: bars stand side by side."""
    return len(panel.series) if panel.bars else int(isinstance(panel.places[0], str))


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw the panels side by side."""
    from matplotlib.figure import Figure  # no window, no global state

    widths = [max(1.0, 0.06 * len(panel.places) * _parts(panel)) for panel in panels]
    figure = Figure(figsize=(5.5 * sum(widths), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axis, panel in zip(axes, panels, strict=True):
        named = isinstance(panel.places[0], str)
        places = np.arange(len(panel.places)) if named else np.asarray(panel.places, float)
        width = 0.8 / len(panel.series)
        for number, (name, means) in enumerate(panel.series.items()):
            value, low, high = (
                panel.scale * np.array([getattr(one, key) for one in means])
                for key in ("value", "low", "high")
            )
            error = np.maximum([value - low, high - value], 0)
            if panel.bars:
                shift = (number - (len(panel.series) - 1) / 2) * width
                axis.bar(places + shift, value, width, yerr=error, capsize=2, label=name)
            else:
                line = "" if named else "-"  # between names there is nothing
                axis.errorbar(places, value, error, fmt=f"o{line}", capsize=2, label=name)
        if named:
            turn = 30 if sum(map(len, map(str, panel.places))) > 40 else 0
            axis.set_xticks(places, panel.places, rotation=turn, ha="right" if turn else "center")
        if panel.log:
            axis.set_xscale("log")
        axis.set_title(panel.title)
        axis.set_xlabel(panel.xlabel)
        axis.set_ylabel(panel.ylabel)
        axis.grid(alpha=0.3)
        if len(panel.series) > 1:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
