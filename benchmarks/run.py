"""Run many scripts, each in a process of its own, and report what came out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.files import AtomicFile

from .catalogue import ALL, SPEED, STUDIES, Entry, find
from .harness import commit, machine

#: Where training studies keep what they share, within the folder of a run.
WORK = "work"
REPORT = "report.md"


def wanted(names: Sequence[str], speed: bool, studies: bool) -> tuple[Entry, ...]:
    """The entries that a call names; all of them if it names none.

    Raises:
        InputError: there is no such script.
    """
    if unknown := [name for name in names if find(name) is None]:
        raise InputError(
            f"{unknown[0]}: no such benchmark; expected one of "
            f"{', '.join(one.short for one in ALL)}"
        )
    if names:
        return tuple(entry for name in names if (entry := find(name)) is not None)
    if speed == studies:
        return ALL
    return SPEED if speed else STUDIES


def run(entries: Sequence[Entry], out: Path, smoke: bool) -> int:
    """Run scripts whose results are not in ``out`` yet.

    For each NAME it leaves NAME.json (rows, machine, versions, commit), NAME.txt (what it printed)
    and, if it draws, NAME.png; for all together report.md and report.json.

    Returns:
        0, or 1 if a script failed; the others are run all the same.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None

    def one(number: int, entry: Entry) -> bool:
        print(f"[{number}/{len(entries)}] {entry.short}: {entry.title}", flush=True)
        if (out / f"{entry.short}.json").exists():
            print(f"    {entry.short}: there already")
            return True
        started = time.monotonic()
        code = _run(entry, out, smoke)
        took = f"    {entry.short}: {time.monotonic() - started:.0f} s"
        print(took + (f", exit code {code}" if code else ""), flush=True)
        return code == 0

    # What is measured has the machine to itself; in a smoke run nothing is.
    with ThreadPoolExecutor((os.cpu_count() or 1) if smoke else 1) as pool:
        done = list(pool.map(one, range(1, len(entries) + 1), entries))
    failed = [entry.short for entry, well in zip(entries, done, strict=True) if not well]
    write_report(out, list(entries))
    print(f"{out / REPORT}: written" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _run(entry: Entry, out: Path, smoke: bool) -> int:
    command = [sys.executable, "-m", f"benchmarks.{entry.name}"]
    command += ["--smoke"] if smoke else list(entry.arguments)
    command += ["--json", str(out / f"{entry.short}.json")]
    if entry.figure:
        command += ["--png", str(out / f"{entry.short}.png")]
    if entry.keeps:
        command += ["--work", str(out / WORK)]
    # Errors and bars go to the terminal as they come.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    with AtomicFile(out, f"{entry.short}.txt") as file:
        file.write(done.stdout.encode())
    return done.returncode


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """What the scripts of a run wrote, by name.

    Raises:
        InputError: there is no such folder, or nothing in it.
        FormatError: a file is not what a script writes.
    """
    known = {entry.short for entry in ALL}
    found = {}
    for path in sorted(out.glob("*.json")) if out.is_dir() else ():
        if path.stem not in known:
            continue
        try:
            one = json.loads(path.read_text())
            [(row["id"], float(row["value"]), row["detail"]) for row in one["rows"]]
            one["machine"], one["commit"], one["smoke"]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{path}: not what a benchmark writes ({error}); remove it and run it again"
            ) from None
        found[path.stem] = one
    if not found:
        raise InputError(f"{out}: holds no results; make them with `python -m benchmarks run`")
    return found


def write_report(out: Path, entries: Sequence[Entry]) -> None:
    """report.md and report.json of what is in the folder."""
    known = {entry.short for entry in ALL}
    if not any(path.stem in known for path in out.glob("*.json")):
        return
    found = read_results(out)
    lines = ["# Benchmarks", "", about(found), ""]
    for entry in ALL:
        if entry.short not in found:
            continue
        lines += [f"## {entry.title}", "", f"`python -m benchmarks.{entry.name}`", ""]
        if entry.paper:
            lines += [f"The paper's {entry.paper}. {entry.says}".rstrip(), ""]
        lines += ["```", printed(out, entry), "```", ""]
        if (out / f"{entry.short}.png").exists():
            lines += [f"![{entry.title}]({entry.short}.png)", ""]
    with AtomicFile(out, REPORT) as file:
        file.write("\n".join(lines).encode())
    everything = {"machine": machine(), "commit": commit(), "benchmarks": found}
    with AtomicFile(out, "report.json") as file:
        file.write((json.dumps(everything, indent=2, ensure_ascii=False) + "\n").encode())


def printed(out: Path, entry: Entry) -> str:
    """What a script printed before its rows: its own table, if it has one; else the rows."""
    text = (out / f"{entry.short}.txt").read_text().rstrip()
    own, _, rows = text.partition("\nid ")
    return own.rstrip() if rows and own.strip() else text


def about(found: Mapping[str, Mapping[str, Any]]) -> str:
    """On what, and at which commit, results were measured."""
    one = next(iter(found.values()))
    commits = sorted({other["commit"] for other in found.values()})
    smoke = " **A smoke run: the values say nothing.**" if one["smoke"] else ""
    return f"{machine_line(one['machine'])}; commit {', '.join(commits)}.{smoke}"


def machine_line(machine: Mapping[str, Any]) -> str:
    """A machine and its versions, as people read them."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, backend {machine['backend']}, MLX "
        f"{machine['mlx']}, Python {machine['python']}, {machine['system']}"
    )
