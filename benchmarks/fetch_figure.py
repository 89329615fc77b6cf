"""The paper's figure 5, measured: a hierarchical bank against a flat one, medium by medium.

Both fetch as many bytes. The flat bank lies on the slow medium as a whole; of the hierarchical one
level 1 is in memory, level 2 on the faster medium and level 3 on the slow one, as the paper
proposes. A topic that changes at the deepest level makes the flat bank read all, the other one
block.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.commands.tables import table
from mlx_hiermem.errors import InputError

from . import fetch_bank
from .fetch_media import Medium, ThrottledReader, Turn
from .harness import Row, Times, interleave, ratio, show_seconds

TASKS = ("flat", "hierarchical", "flat, topic", "hierarchical, topic", "read")


@dataclass(frozen=True)
class Placement:
    """Where the levels of the two banks lie: ``shallow`` for level 2, ``deep`` for the deepest
    level and the flat bank; None is this machine's own disk, or its memory if ``warm``."""

    name: str
    shallow: Medium | None = None
    deep: Medium | None = None
    warm: bool = False


def rows(
    memory: Path, flat: Path, media: Sequence[Medium], rounds: int, png: Path | None
) -> Iterator[Row]:
    """The two rows that have goals, from the slowest medium, and one pair for each other
    placement."""
    ordered = sorted(media, key=lambda medium: -(medium.speed or 0))
    placements = [Placement("memory", warm=True), Placement("disk")]
    placements += [Placement(_name(medium), medium, medium) for medium in ordered]
    if len(ordered) > 1:
        fast, slow = ordered[0], ordered[-1]
        placements.append(Placement(f"{_name(fast)} and {_name(slow)}", fast, slow))
    measured = {place: compare(memory, flat, place, rounds) for place in placements}
    with MemoryBank.open(flat, tiers="disk") as bank:
        print(_table(measured, bank.config.block_bytes(1)), end="\n\n")
    if png is not None:
        draw(measured, png)
    for number, (place, times) in enumerate(reversed(measured.items())):
        goals = (">= 5", ">= 4") if number == 0 else ("", "")
        suffix = "" if number == 0 else f"@{place.name.split(' ')[0]}"
        where = f"the rest on: {place.name}"
        about = f"level 1 in memory, {where}"
        yield ratio(
            f"fetch.flat_vs_hierarchical{suffix}", times, "flat", "hierarchical", goals[0], about
        )
        yield ratio(
            f"fetch.topic_flat_vs_hierarchical{suffix}", times, "flat, topic",
            "hierarchical, topic", goals[1], f"the deepest level changes; {about}",
        )  # fmt: skip


def compare(memory: Path, flat: Path, place: Placement, rounds: int) -> dict[str, Times]:
    """Times of the tasks on one placement."""
    turns: dict[Medium | None, Turn] = {
        medium: Turn(medium.speed) for medium in (place.shallow, place.deep) if medium is not None
    }
    deep, shallow = turns.get(place.deep), turns.get(place.shallow)
    reader = ThrottledReader(memory)
    config = reader.config
    levels = config.memory_levels
    reader.throttle({level: shallow for level in levels[1:-1]} | {levels[-1]: deep})
    flat_reader = ThrottledReader(flat)
    flat_reader.throttle({1: deep})
    by_hand = {level: "resident" if level == levels[0] else "disk" for level in levels}
    cold = place.deep is None and not place.warm
    total = config.block_bytes(levels[0]) * config.clusters(levels[0])
    with (
        MemoryBank.of(reader, memory_budget=total, tiers=by_hand) as bank,
        MemoryBank.of(flat_reader, tiers="disk") as other,
    ):
        run = _Run(bank, other, reader, flat_reader, cold)
        tasks = {
            "flat": run.flat,
            "hierarchical": run.hierarchical,
            "flat, topic": run.flat,
            "hierarchical, topic": run.topic,
            "read": lambda: run.read(deep),
        }
        return interleave(tasks, rounds, warmup=1, before=run.prepare)


class _Run:
    """What is fetched next, by both banks; cold, where the medium is this machine's disk."""

    def __init__(
        self,
        bank: MemoryBank,
        flat: MemoryBank,
        reader: ThrottledReader,
        flat_reader: ThrottledReader,
        cold: bool,
    ) -> None:
        self._bank, self._flat, self._cold = bank, flat, cold
        self._reader, self._flat_reader = reader, flat_reader
        config = bank.config
        self._rng = random.Random(0)
        # A throttled medium is only as fast as it says if what it reads is in the page cache, so
        # it has few paths; what is read cold is never read twice.
        leaves = config.clusters(config.levels)
        self._leaves = self._rng.sample(range(leaves), leaves if cold else min(12, leaves))
        self._blocks = flat.config.clusters(1) if cold else min(12, flat.config.clusters(1))
        self._deepest = config.memory_levels[-1]
        self._path = fetch_bank.path_to(config, 0)
        self._block = self._next = 0
        self._warm = False
        self._buffer = memoryview(bytearray(2 * config.fetch_size()))

    def prepare(self) -> None:
        """Drop everything from the page cache, if this is about the disk; else bring it there."""
        if not self._cold and not self._warm:
            self._warm = True
            for leaf in self._leaves:
                for cluster in self._siblings(fetch_bank.path_to(self._bank.config, leaf)):
                    self._reader.stored(self._deepest, cluster)
                for level in self._bank.config.memory_levels[1:-1]:
                    path = fetch_bank.path_to(self._bank.config, leaf)
                    self._reader.stored(level, path[level - 1])
            for block in range(self._blocks):
                self._flat_reader.stored(1, block)
        if self._cold and hasattr(os, "posix_fadvise"):
            for reader in (self._reader, self._flat_reader):
                for fd in reader.descriptors:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def flat(self) -> None:
        """Another topic in the flat bank: all of its one block."""
        self._block = (self._block + 1) % self._blocks
        self._flat.fetch((self._block,)).release()

    def hierarchical(self) -> None:
        """A path of which no block is that of the path before."""
        path = self._path
        while path[0] == self._path[0]:
            leaf = self._leaves[self._next % len(self._leaves)]
            self._next += 1
            path = fetch_bank.path_to(self._bank.config, leaf)
        self._path = path
        self._bank.fetch(path).release()

    def topic(self) -> None:
        """A sibling at the deepest level that has memory."""
        config = self._bank.config
        siblings = self._siblings(self._path)
        sibling = siblings[(siblings.index(self._path[self._deepest - 1]) + 1) % len(siblings)]
        below = config.branching ** (config.levels - self._deepest)
        self._path = fetch_bank.path_to(config, sibling * below)
        self._bank.fetch(self._path).release()

    def _siblings(self, path: Sequence[int]) -> range:
        """The clusters at the deepest level with memory under the same parent as the path's."""
        k = self._bank.config.branching
        first = path[self._deepest - 1] // k * k
        return range(first, first + k)

    def read(self, turn: Turn | None) -> None:
        """The medium's own speed: the bytes of one fetch, in one read of the flat bank's file."""
        self._block = (self._block + 1) % self._blocks
        self._flat_reader.read_rest(1, self._block, [self._buffer], 0)


def _name(medium: Medium) -> str:
    return f"{medium.name} ({(medium.speed or 0) / 1e9:g} GB/s)"


def _table(measured: dict[Placement, dict[str, Times]], size: int) -> str:
    header = ["placement", "flat", "hierarchical", "ratio"]
    header += ["topic: flat", "hierarchical", "ratio", "one read", "GB/s"]
    cells = []
    for place, times in measured.items():
        flat, tiers, flat_topic, topic, read = (times[name].median for name in TASKS)
        cells.append(
            [place.name, *map(show_seconds, (flat, tiers)), f"{flat / tiers:.1f}",
             *map(show_seconds, (flat_topic, topic)), f"{flat_topic / topic:.1f}",
             show_seconds(read), f"{size / read / 1e9:.2f}"]
        )  # fmt: skip
    return table(header, cells)


def draw(measured: dict[Placement, dict[str, Times]], path: Path) -> None:
    """The figure as a PNG: bars in milliseconds, one group for each placement.

    Raises:
        InputError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    shown = {
        "flat": ("#c1692a", "flat bank"),
        "hierarchical": ("#2b6ca3", "hierarchical, new path"),
        "hierarchical, topic": ("#7fb2d9", "hierarchical, deepest level changes"),
        "read": ("#9a9a9a", "one read of as many bytes"),
    }
    for offset, (name, (colour, label)) in enumerate(shown.items()):
        values = [1e3 * times[name].median for times in measured.values()]
        places = [number + 0.2 * (offset - 1.5) for number in range(len(measured))]
        bars = axes.bar(places, values, 0.18, label=label, color=colour)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=8, padding=2)
    names = [place.name.replace(" (", "\n(").replace(" and ", "\nand ") for place in measured]
    axes.set_xticks(range(len(measured)), names, fontsize=9)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds of a fetch (log scale)")
    axes.set_title("Fetching a memory: flat bank and hierarchical tiers")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    axes.margins(y=0.2)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"--png {path}: cannot be written ({error})") from None
    finally:
        pyplot.close(figure)
