"""Mutated inputs by the thousand, in processes of their own: what came of each.

A process tries many inputs, each made from a seed. It runs in a folder of its own that also holds
its home and its temporary folder, and looks at all of that after every input. What must not happen
is a fault, and so is a process that ends or hangs: the parent then knows the seed, and goes on
behind it with a new process.

``python -m tests.reliability.fuzz_process KIND FOLDER FIRST COUNT`` tries the seeds from FIRST on;
for one that is known, this is how it is seen again.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from mlx_hiermem.backend import preload_blas

preload_blas()  # before any target imports MLX

from mlx_hiermem.errors import HierMemError  # noqa: E402
from tests.bank.mutations import small_memory  # noqa: E402

ROOT = Path(__file__).parents[2]
#: Seconds of computing that one input may take.
SLOW = 10.0
#: Characters that an error may have: a line to be read, not a dump.
LONGEST = 800
#: Faults after which a process gives up, and processes that may end before their time.
MOST_FAULTS = 20


class Target(ABC):
    """What is fuzzed: it makes something honest, changes it, and reads it.

    Args:
        folder: which it makes, and may write in.
        canary: a file that code out of an input would make.
    """

    #: Seconds of the clock after which the process hangs. Many, as the machine may be busy.
    hangs: ClassVar[float] = 120.0

    def __init__(self, folder: Path, canary: Path) -> None:
        self.folder = folder
        self.canary = canary

    @abstractmethod
    def change(self, random: Random) -> str:
        """Put a changed input in the place of the honest one; says what was changed."""

    @abstractmethod
    def look(self, random: Random) -> bool | None:
        """Do all that reads the input.

        Returns:
            False where it was refused in another way than by an error.

        Raises:
            HierMemError: it is refused.
        """

    @abstractmethod
    def restore(self) -> None:
        """Put the honest one back."""


class FolderTarget(Target):
    """A target that is a folder of files, written by ``make``.

    Attributes:
        files: name -> bytes of each, as it was made.
    """

    def __init__(self, folder: Path, canary: Path) -> None:
        super().__init__(folder, canary)
        folder.mkdir(parents=True)
        self.make()
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self._put: set[str] = set()
        self._before: object = None
        #: Whether reading the input may write into the folder.
        self.writes = False

    @abstractmethod
    def make(self) -> None:
        """Write the honest files."""

    def put(self, name: str, data: bytes) -> None:
        """Write a file, until :meth:`restore`."""
        self._put.add(name)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)

    def remove(self, name: str) -> None:
        """Take a file away, until :meth:`restore`."""
        self._put.add(name)
        (self.folder / name).unlink(missing_ok=True)

    def restore(self) -> None:
        """The files are as they were made."""
        changed = self._put
        if self.writes:
            for path in self.folder.rglob("*"):
                if not path.is_dir():
                    path.unlink()
            changed = set(self.files)
        for name in changed:
            if name in self.files:
                (self.folder / name).write_bytes(self.files[name])
            else:
                (self.folder / name).unlink(missing_ok=True)
        self._put, self.writes = set(), False


@dataclass
class Tried:
    """What came of some inputs.

    Attributes:
        inputs, refused, accepted: how many.
        faults: for each what is wrong, and how to see it again.
    """

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)


# ---- in the process --------------------------------------------------------------------


def try_inputs(make: Callable[[Path, Path], Target], home: Path, first: int, count: int) -> Tried:
    """Try the inputs of these seeds; ``home / "now"`` always holds the seed that is tried."""
    found, canary = Tried(), home / "canary"
    target = make(home / "target", canary)
    now = os.open(home / "now", os.O_WRONLY | os.O_CREAT)
    try:
        for seed in range(first, first + count):
            if fault := _try(target, home, seed, found, partial(_note, now, seed)):
                found.faults.append({"seed": seed, **fault})
                print(f"seed {seed}: {fault}", file=sys.stderr, flush=True)
            found.inputs += 1
            if len(found.faults) >= MOST_FAULTS:
                break
            if seed % 50 == 0:
                gc.collect()
    finally:
        os.close(now)
    return found


def _note(file: int, seed: int, changed: str) -> None:
    """Write down what is tried, for the case that nobody can tell it later."""
    data = f"{seed}\n{changed}".encode("utf-8", "backslashreplace")[:2000]
    os.pwrite(file, data.ljust(2000), 0)


def _try(
    target: Target, home: Path, seed: int, found: Tried, note: Callable[[str], None]
) -> dict[str, str] | None:
    """Try one input: what is wrong, if anything."""
    random = Random(seed)
    changed = "nothing yet"
    note(changed)
    try:
        changed = target.change(random)
        note(changed)
        inside = isinstance(target, FolderTarget) and not target.writes
        before = _listing(home, target.folder if not inside else None)
        start = time.process_time()
        faulthandler.dump_traceback_later(target.hangs, exit=True)
        try:
            with small_memory():
                accepted = target.look(random)
        except HierMemError as error:
            text = str(error)
            assert text.strip() and text.isprintable(), f"not a line: {text[:LONGEST]!r}"
            assert len(text) < LONGEST, f"{len(text)} characters: {text[:LONGEST]!r}"
            accepted = False
        finally:
            faulthandler.cancel_dump_traceback_later()
        took = time.process_time() - start
        assert not target.canary.exists(), "code of the input was run"
        after = _listing(home, target.folder if not inside else None)
        assert before == after, f"something was written: {sorted(before ^ after)[:3]}"
        assert took < SLOW, f"slow: {took:.1f} seconds"
    except BaseException as error:  # whatever it is, it is no refusal
        if isinstance(error, KeyboardInterrupt):
            raise
        where = "".join(traceback.format_exception(error)[-4:])
        return {"fault": f"{type(error).__name__}: {error}"[:1000], "change": changed[:400],
                "where": where[-1500:]}  # fmt: skip
    finally:
        target.canary.unlink(missing_ok=True)
        target.restore()
    found.refused += accepted is False
    found.accepted += accepted is not False
    return None


def _listing(home: Path, but: Path | None) -> set[tuple[str, int, int]]:
    """Everything in a folder, with size and time of change; apart from what is below ``but``."""
    found: set[tuple[str, int, int]] = set()
    folders = [str(home)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    if but is None or entry.path != str(but):
                        folders.append(entry.path)
                    found.add((entry.path, 0, 0))
                elif entry.name != "now" and "/tmp/mlx/" not in entry.path:  # kernels of MLX
                    found.add((entry.path, status.st_size, status.st_mtime_ns))
    return found


def main(kind: str, home: str, first: str, count: str) -> None:
    """Try inputs, and print what came of them as JSON."""
    from tests.reliability.fuzz_kinds import KINDS, TESTS

    os.fsync = lambda fd: None  # nobody pulls the plug here, and waiting for the disk costs
    found = try_inputs({**KINDS, **TESTS}[kind], Path(home), int(first), int(count))
    print(json.dumps(asdict(found)))
    sys.stdout.flush()
    os._exit(0)  # what is left in threads is not waited for


# ---- in the parent ---------------------------------------------------------------------


def fuzz(kind: str, count: int, home: Path, first: int = 0, chunk: int = 2500) -> Tried:
    """Try so many inputs of a kind, in processes one after the other.

    Args:
        home: a folder for all of them; is made.
        chunk: inputs of one process.
    """
    total, number, end = Tried(), 0, first + count
    while first < end and len(total.faults) < MOST_FAULTS:
        number += 1
        found, seed = _run(kind, home / str(number), first, min(chunk, end - first))
        for name in ("inputs", "refused", "accepted", "faults"):
            setattr(total, name, getattr(total, name) + getattr(found, name))
        first = seed + 1
    return total


def _run(kind: str, home: Path, first: int, count: int) -> tuple[Tried, int]:
    """Try inputs in a process: what came of them, and the last seed that was tried."""
    for name in ("home", "tmp", "cwd"):
        (home / name).mkdir(parents=True)
    environment = {
        **os.environ, "HOME": str(home / "home"), "TMPDIR": str(home / "tmp"),
        "XDG_CACHE_HOME": str(home / "home"), "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    arguments = [kind, str(home), str(first), str(count)]
    said = home.with_suffix(".stderr")  # not in what is looked at
    with open(said, "wb") as log:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-m", "tests.reliability.fuzz_process",
             *arguments],
            cwd=home / "cwd", env=environment, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
    log_text = said.read_text(errors="replace")
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode == 0 and lines:
        found = Tried(**json.loads(lines[-1]))
        return found, first + found.inputs - 1
    if not (home / "now").exists():
        raise AssertionError(f"{kind}: the honest input is not read: {log_text[-3000:]}")
    seed, _, changed = (home / "now").read_text().partition("\n")
    seed = int(seed)
    # What it had counted is lost, but not that these inputs did no harm.
    fault = {"seed": seed, "fault": f"the process ended with {done.returncode}",
             "change": changed.strip(), "where": log_text[-3000:]}  # fmt: skip
    return Tried(inputs=seed - first + 1, faults=[fault]), seed


def told(kind: str, found: Tried) -> Iterator[str]:
    """The faults, for people."""
    for fault in found.faults:
        yield (
            f"python -m tests.reliability.fuzz_process {kind} NEW_FOLDER {fault['seed']} 1\n"
            f"{fault.get('change', '')}\n{fault['fault']}\n{fault.get('where', '')}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
