"""docs/results.md: every study beside what the paper says, from one run of them all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mlx_hiermem.errors import InputError
from mlx_hiermem.files import AtomicFile

from .catalogue import ALL, STUDIES, Entry
from .claims import verdicts
from .run import about, printed, read_results

_HEAD = """# Results

Every figure and table of the paper has its counterpart here, on the atlas: the model that ships,
and runs that train memories on its corpus (8,710 facts, asked in a wording that no training text
has). It is three orders of magnitude smaller than the paper's models, so what can agree is which
way things go, not by how much. Runs that train have three seeds; ± is half of the range over them.
"Agrees" is said of the means: where the ranges of two lines overlap, their order may be chance.

Made by `python -m benchmarks run --studies --out DIR` and `python -m benchmarks results DIR`.
"""

_SIGNS = {True: "agrees", False: "does not agree", None: "not measured"}


def write_results(folder: Path, docs: Path) -> None:
    """Write docs/results.md, and the figures into docs/images/results.

    Args:
        folder: of a run.
        docs: the folder of the docs.

    Raises:
        InputError: the folder holds no results of studies, or those of a smoke run.
    """
    found = read_results(folder)
    entries = [entry for entry in ALL if entry.short in found and (entry.paper or entry in STUDIES)]
    if not any(entry in STUDIES for entry in entries):
        raise InputError(f"{folder}: holds no results of studies; run `python -m benchmarks run`")
    if smoke := [entry.short for entry in entries if found[entry.short]["smoke"]]:
        raise InputError(f"{folder}: {smoke[0]} is of a smoke run, whose values say nothing")
    parts = [_HEAD, about(found), "", summary(entries, found), ""]
    images = docs / "images" / "results"
    images.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        parts += [section(entry, found[entry.short], printed(folder, entry))]
        picture = folder / f"{entry.short}.png"
        if picture.exists():
            shutil.copyfile(picture, images / picture.name)
            parts += [f"![{entry.title}](images/results/{picture.name})", ""]
    with AtomicFile(docs, "results.md") as file:
        file.write("\n".join(parts).encode())


def summary(entries: list[Entry], found: dict[str, Any]) -> str:
    """A table of all claims."""
    lines = ["| paper | claim | here |", "|---|---|---|"]
    for entry in entries:
        for text, holds in verdicts(entry.short, _values(found[entry.short])):
            where = f"[{entry.paper or entry.title}](#{_anchor(entry.title)})"
            lines.append(f"| {where} | {text} | {_SIGNS[holds]} |")
    return "\n".join(lines)


def section(entry: Entry, one: dict[str, Any], text: str) -> str:
    """One study."""
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
    return "\n".join(lines)


def _values(one: dict[str, Any]) -> dict[str, float]:
    return {row["id"]: row["value"] for row in one["rows"]}


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")
