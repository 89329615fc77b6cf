"""The command line in processes of its own, and what is seen of them from outside.

Nothing of the package runs otherwise in such a process than for a user: what happens to it comes
from the system, and when it writes is seen in its folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Seconds after which a command hangs.
LONG = 300
#: Seconds between two looks at a folder or a process.
_TICK = 0.001

#: What a new process does before the command begins, such as limiting itself.
Before = Callable[[], None] | None
#: What is in a folder: name, number, size and time of each file.
Look = frozenset[tuple[str, int, int, int]]


@dataclass(frozen=True)
class Ended:
    """How a command has ended.

    Attributes:
        code: its exit code; below 0 the signal that killed it.
        out, err: what it wrote.
    """

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """Its one line of an error, if that is all that it complains of; else AssertionError."""
        lines = [line for line in self.err.splitlines() if line.startswith("mlx_hiermem: error: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self
        assert self.err.rstrip().endswith(lines[0]), self
        return lines[0].removeprefix("mlx_hiermem: error: ")


class Command:
    """``python -m mlx_hiermem`` with some words, running.

    Args:
        words: the arguments.
        before: called in the new process, before the command.
    """

    def __init__(self, words: Sequence[str], before: Before = None) -> None:
        self.started = time.monotonic()
        # Pipes, which hold all that a command says until it is waited for: limits of the size of
        # files, which some tests set, would cut what it says in a file.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_hiermem", *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before,
        )  # fmt: skip

    def wait(self, seconds: float = LONG) -> Ended:
        """Wait for its end; one that hangs is killed, with an AssertionError."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, err = self.process.communicate()
            raise AssertionError(f"hangs: {self.process.args}, {err}") from None
        return Ended(self.process.returncode, out, err)

    def until(self, happened: Callable[[], bool]) -> bool:
        """Wait until something has happened; False if the command ends before."""
        while not happened():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < self.started + LONG, "hangs"
            time.sleep(_TICK)
        return True

    def lives(self, seconds: float) -> bool:
        """Let it run for so long; False if it ends before."""
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return True
        return False

    def ended_after(self) -> float:
        """Seconds from its start to its end, which has to be a good one."""
        ended = self.wait()
        assert ended.code == 0, ended
        return time.monotonic() - self.started

    def kill(self) -> Ended:
        """SIGKILL."""
        self.process.kill()
        return self.wait()


def run(words: Sequence[str], before: Before = None) -> Ended:
    """Run a command to its end."""
    return Command(words, before).wait()


def look(folder: Path) -> Look:
    """What is in a folder now, which may change meanwhile."""
    found: list[tuple[str, int, int, int]] = []

    def enter(path: str) -> None:
        try:
            entries = list(os.scandir(path))
        except OSError:  # gone
            return
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
                found.append((entry.path, status.st_ino, status.st_size, status.st_mtime_ns))
                if entry.is_dir(follow_symlinks=False):
                    enter(entry.path)
            except OSError:
                continue

    enter(str(folder))
    return frozenset(found)
