"""Figures of facts and perplexity: lines over the fetch size, or a bar for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atlas_runs import Result

_NAMES = ("facts answered exactly, %", "perplexity per token")


def draw_lines(lines: Mapping[str, Sequence[Result]], path: Path) -> None:
    """One line for each kind, over the fetch size."""
    figure, axes = _axes()
    for axis, what in zip(axes, (_facts, _perplexity), strict=True):
        for name, results in lines.items():
            sizes = [one.fetch_size for one in results]
            axis.plot(sizes, [what(one, True) for one in results], marker="o", label=name)
        bare = next(iter(lines.values()))[0]
        axis.axhline(what(bare, False), color="grey", linestyle=":", label="no memory")
        axis.set_xlabel("fetch size (numbers)")
        axis.set_xscale("log", base=2)
    axes[0].legend()
    _save(figure, path)


def draw_bars(results: Mapping[str, Result], path: Path) -> None:
    """One bar for each run."""
    figure, axes = _axes()
    for axis, what in zip(axes, (_facts, _perplexity), strict=True):
        values = [what(one, True) for one in results.values()]
        axis.bar(list(results), values, color="tab:blue")
        bare = what(next(iter(results.values())), False)
        axis.axhline(bare, color="grey", linestyle=":", label="no memory")
        low, high = min([*values, bare]), max([*values, bare])
        axis.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axes[0].legend()
    _save(figure, path)


def _facts(one: Result, memory: bool) -> float:
    return 100 * (one.facts if memory else one.bare_facts)


def _perplexity(one: Result, memory: bool) -> float:
    return one.perplexity if memory else one.bare_perplexity


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no window, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, _NAMES, strict=True):
        axis.set_title(name)
        axis.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
