"""Two runs of the benchmarks side by side."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_hiermem.commands.tables import table
from mlx_hiermem.files import AtomicFile

from .run import read_results


@dataclass(frozen=True)
class Change:
    """A row of two runs.

    Attributes:
        id: of the row.
        before, after: its values; None where a run does not have it.
        goal: of the later run.
    """

    id: str
    before: float | None
    after: float | None
    goal: str

    @property
    def ratio(self) -> float | None:
        """After ÷ before."""
        return self.after / self.before if self.before and self.after is not None else None


def changes(before: Path, after: Path) -> list[Change]:
    """All rows of both runs, in the order of the later one.

    Raises:
        InputError, FormatError: as ``read_results``.
    """
    runs = []
    for folder in (before, after):
        rows = [row for one in read_results(folder).values() for row in one["rows"]]
        runs.append({row["id"]: row for row in rows})
    old, new = runs
    ids = [*new, *(id for id in old if id not in new)]
    return [
        Change(
            id,
            old[id]["value"] if id in old else None,
            new[id]["value"] if id in new else None,
            (new.get(id) or old[id]).get("goal", ""),
        )
        for id in ids
    ]


def compare(before: Path, after: Path, file: Path | None) -> None:
    """Print the rows of two runs, and write them."""
    found = changes(before, after)

    def show(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    cells = [
        [one.id, show(one.before), show(one.after), show(one.ratio), one.goal] for one in found
    ]
    print(table(["id", "before", "after", "after ÷ before", "goal"], cells))
    if file is not None:
        rows = [{**asdict(one), "ratio": one.ratio} for one in found]
        with AtomicFile(file.parent, file.name) as out:
            out.write((json.dumps({"rows": rows}, indent=2) + "\n").encode())
