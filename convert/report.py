"""What a conversion will do: the whole mapping, what is missing or left over, sizes and time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_hiermem.commands.tables import table
from mlx_hiermem.config import MemoryConfig

from .bank.description import Entry
from .fold import fold

#: Names of one kind that are listed one by one; further ones are counted.
MOST_NAMES = 12


@dataclass(frozen=True)
class Line:
    """Tensors that go to one kind of place.

    Attributes:
        source: their names, folded (``fold``).
        target: where they go, in words or names.
        tensors: how many.
        shape, dtype: of each.
        bytes: of all.
    """

    source: str
    target: str
    tensors: int
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass
class Report:
    """A plan for people and machines.

    Attributes:
        model, bank, tree: what is converted (paths), None where there is none.
        out: the folder to be written.
        anchor: what the anchor is, in words of its ``config.json``.
        config: of the bank.
        layouts: of the bank's keys.
        lines: the mapping.
        ignored: names that are left out on purpose.
        missing: names that are asked for and not there.
        left_over: names that nothing is known of.
        notices: what was assumed.
        problem: why it cannot be converted; None: it can.
        bytes_read, bytes_written, disk_free: sizes.
        seconds: about how long it will take, after a trial with a part of the bank.
    """

    model: str
    bank: str | None
    tree: str | None
    out: str
    anchor: dict[str, Any] = field(default_factory=dict)
    config: MemoryConfig | None = None
    layouts: Sequence[str] = ()
    lines: list[Line] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    problem: str | None = None
    bytes_read: int = 0
    bytes_written: int = 0
    disk_free: int = 0
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON."""
        found = {key: value for key, value in vars(self).items() if key not in ("config", "lines")}
        config = self.config
        sizes = {} if config is None else {
            "fetch_size": config.fetch_size(), "bank_size": config.bank_size(),
        }  # fmt: skip
        return {
            **found,
            "layouts": list(self.layouts),
            "memory": None if config is None else {**config.to_dict(), **sizes},
            "lines": [asdict(line) for line in self.lines],
        }


def memory_lines(entries: Iterable[Entry]) -> list[Line]:
    """The mapping of a memory's tensors, grouped by level, matrix and shape."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        place, tensor = entry.place, entry.tensor
        key = (place.generic, place.level, place.matrix, place.layout, tensor.shape, tensor.dtype)
        groups.setdefault(key, []).append(entry)
    lines = []
    for (generic, level, matrix, _, shape, dtype), found in groups.items():
        layers = sorted({one.place.layer for one in found if one.place.layer is not None})
        where = "all layers with memory" if not layers else f"layer {_span(layers)}"
        clusters = sorted({one.place.cluster for one in found if one.place.cluster is not None})
        subtrees = sorted({one.subtree for one in found if one.subtree is not None})
        what = "generic memory" if generic else f"level {level}"
        if generic and level:
            what += f", block of level {level}"
        target = f"{what}: {matrix} of {where}"
        target += f", cluster {_span(clusters)}" if clusters else ""
        target += f", of subtree {_span(subtrees)}" if subtrees and not generic else ""
        for pattern, names in fold(dict.fromkeys(one.tensor.name for one in found)).items():
            chosen = set(names)
            mine = [one for one in found if one.tensor.name in chosen]
            nbytes = sum(one.tensor.nbytes for one in mine)
            lines.append(Line(pattern, target, len(mine), shape, dtype, nbytes))
    return sorted(lines, key=lambda line: line.target)


def _span(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    whole = numbers[-1] - numbers[0] + 1 == len(numbers)
    return f"{numbers[0]} to {numbers[-1]}" + ("" if whole else f" ({len(numbers)} of them)")


def to_text(report: Report, mapping: bool = True) -> str:
    """The report for people; with all of the mapping, or without."""
    lines = [f"{report.model} -> {report.out}"]
    if report.anchor:
        about = ", ".join(f"{key} {value}" for key, value in report.anchor.items())
        lines.append(f"anchor: {about}")
    config = report.config
    if config is not None:
        lines.append(
            f"memory: kind {config.kind}, ranks {','.join(map(str, config.ranks))}, branching "
            f"{config.branching}, {config.dtype}"
            + ("" if config.quantization is None else f" quantised ({config.packing})")
            + f"; {config.fetch_size():,} numbers in a fetched memory, {config.bank_size():,} in "
            f"the bank; layout {', '.join(report.layouts)}"
        )
    elif report.problem is None:
        lines.append("memory: none; give --bank, or make an empty one with `mlx_hiermem init`")
    lines += [f"tree: {report.tree}"] if report.tree else []
    rows = [
        (line.source, line.target, f"{line.tensors:,}", "x".join(map(str, line.shape)) or "1",
         line.dtype, f"{line.bytes:,}")
        for line in report.lines
    ]  # fmt: skip
    if rows and mapping:
        lines += ["", table(("from", "to", "tensors", "shape", "dtype", "bytes"), rows), ""]
    for name, found in (
        ("missing", report.missing),
        ("left over", report.left_over),
        ("left out", report.ignored),
    ):
        lines += _listed(name, found)
    lines += [f"note: {notice}" for notice in report.notices]
    lines.append(
        f"reads {report.bytes_read:,} bytes, writes {report.bytes_written:,}; "
        f"{report.disk_free:,} are free on the disk"
        + ("" if report.seconds is None else f"; takes about {_seconds(report.seconds)}")
    )
    return "\n".join(lines)


def _listed(name: str, found: Sequence[str]) -> list[str]:
    folded = list(fold(found))
    lines = [f"{name}: {one}" for one in folded[:MOST_NAMES]]
    if len(folded) > MOST_NAMES:
        lines.append(f"{name}: {len(folded) - MOST_NAMES} more")
    return lines


def _seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
