"""docs/results.md: every study beside what the paper says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mlx_hiermem.commands.tables import table
from mlx_hiermem.errors import InputError
from mlx_hiermem.files import AtomicFile

from .catalogue import ALL, STUDIES, Entry
from .claims import verdicts
from .harness import Row
from .run import machine_line, printed, read_results

_HEAD = """# Results

Every figure and table of the paper has its counterpart here, on the atlas: the model that ships,
and runs that train memories on its corpus (8,710 facts, asked in a wording that no training text
has). It is three orders of magnitude smaller than the paper's models, so what can agree is which
way things go, not by how much. Runs that train have three seeds; ± is half of the range over them.
"Agrees" is said of the means: where the ranges of two lines overlap, their order may be chance.

Made by `python -m benchmarks run --studies --out DIR` and `python -m benchmarks results DIR`, on
"""

_SIGNS = {True: "agrees", False: "does not agree", None: "not measured"}


def write_results(folder: Path, docs: Path) -> None:
    """Renew docs/results.md, and the figures in docs/images/results, by what a run holds.

    Sections of studies that the run does not hold stay as they are.

    Args:
        folder: of a run.
        docs: the folder of the docs.

    Raises:
        InputError: the folder holds no results of studies, or those of a smoke run.
    """
    found = read_results(folder)
    shown = {one.short: one for one in ALL if one.paper or one in STUDIES}
    found = {name: one for name, one in found.items() if name in shown}
    if not found:
        raise InputError(f"{folder}: holds no results of studies; run `python -m benchmarks run`")
    if smoke := [name for name in found if found[name]["smoke"]]:
        raise InputError(f"{folder}: {smoke[0]} is of a smoke run, whose values say nothing")
    before = _Page.read(docs / "results.md")
    commits = before.commits
    for one in found.values():
        commits.setdefault(machine_line(one["machine"]), set()).add(one["commit"])
    images = docs / "images" / "results"
    images.mkdir(parents=True, exist_ok=True)
    claims, sections = [], []
    for entry in shown.values():
        if entry.short in found:
            one = found[entry.short]
            claims += summary(entry, one)
            # Times are those of one machine: of what is measured as a ratio, only ratios are shown.
            text = printed(folder, entry) if entry in STUDIES else ratios(one)
            picture = folder / f"{entry.short}.png"
            drawn = entry in STUDIES and picture.exists()
            if drawn:
                shutil.copyfile(picture, images / picture.name)
            sections.append(section(entry, one, text, drawn))
        elif entry.title in before.sections:
            claims += before.claims(entry.title)
            sections.append(before.sections[entry.title])
    measured = [f"- {one}; commit {', '.join(sorted(commits[one]))}." for one in commits]
    claims = ["| paper | claim | here |", "|---|---|---|", *claims]
    with AtomicFile(docs, "results.md") as file:
        file.write("\n".join([_HEAD, *measured, "", *claims, "", *sections]).encode())


class _Page:
    """docs/results.md as it was written last.

    Attributes:
        commits: those that were measured, by machine.
        sections: the text of each study, from its heading on, by title.
    """

    def __init__(self, text: str) -> None:
        head, *parts = text.split("\n## ")
        self._lines = head.splitlines()
        self.sections = {part.split("\n", 1)[0]: f"## {part}" for part in parts}
        self.commits: dict[str, set[str]] = {}
        for line in self._lines:
            machine, found, commits = line.strip("-. ").partition("; commit ")
            if found:
                self.commits[machine] = set(commits.split(", "))

    @classmethod
    def read(cls, path: Path) -> _Page:
        return cls(path.read_text().rstrip("\n") + "\n" if path.exists() else "")

    def claims(self, title: str) -> list[str]:
        """The rows of the table of all claims that are about a study."""
        return [line for line in self._lines if f"](#{_anchor(title)}) |" in line]


def summary(entry: Entry, one: dict[str, Any]) -> list[str]:
    """Rows of the table of all claims."""
    where = f"[{entry.paper or entry.title}](#{_anchor(entry.title)})"
    found = verdicts(entry.short, _values(one))
    return [f"| {where} | {text} | {_SIGNS[holds]} |" for text, holds in found]


def section(entry: Entry, one: dict[str, Any], text: str, drawn: bool) -> str:
    """One study, with its figure if there is one."""
    lines = [f"## {entry.title}", ""]
    if entry.paper:
        lines += [f"The paper's {entry.paper}. {entry.says}".rstrip(), ""]
    for claim, holds in verdicts(entry.short, _values(one)):
        lines.append(f"- {claim}: **{_SIGNS[holds]}**")
    if lines[-1]:
        lines.append("")
    if entry.remark:
        lines += [entry.remark, ""]
    lines += [f"`python -m benchmarks.{entry.name}`", "", "```", text, "```", ""]
    if drawn:
        lines += [f"![{entry.title}](images/results/{entry.short}.png)", ""]
    return "\n".join(lines)


def ratios(one: dict[str, Any]) -> str:
    """The rows of a benchmark with their goals, without the times that they come from."""
    met = {True: "yes", False: "no", None: ""}
    rows = [Row(**row) for row in one["rows"] if not row["id"].endswith("_per_second")]
    cells = [(row.id, f"{row.value:.3f}", row.goal, met[row.met]) for row in rows]
    return table(("id", "value", "goal", "met"), cells)


def _values(one: dict[str, Any]) -> dict[str, float]:
    return {row["id"]: row["value"] for row in one["rows"]}


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")
