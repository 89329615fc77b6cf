"""What a disk does to a command that writes on it."""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.reliability.disk_jobs import Stopping
from tests.reliability.disk_mounts import Memory
from tests.reliability.kill_process import Command, Ended, look, run

#: Bytes of a disk that has room for everything.
ROOM = 256 << 20


class Need:
    """What a job needs of a disk: bytes and files, before it starts and at most meanwhile.

    Attributes:
        largest: bytes of the largest file.
        whole: seconds that it takes; ``writing``: from its first write to its last one.
    """

    def __init__(self, stopping: Stopping, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        work = folder / "work"
        self._base = _used(folder)
        stopping.job.prepare(stopping.place, work)
        self.before, before = self._now(folder), look(work)
        self.most, self.largest = self.before, 0
        changes, last = [], before
        command = Command(stopping.words(work))
        while command.process.poll() is None:
            now = look(work)
            if now != last:
                changes.append(time.monotonic())
                last = now
            self.largest = max([self.largest, *(size for _, _, size, _ in now - before)])
            self.most = tuple(map(max, self.most, self._now(folder)))
        self.whole = time.monotonic() - command.started
        self.writing = changes[-1] - changes[0]
        ended = command.wait()
        assert ended.code == 0, ended

    def _now(self, folder: Path) -> tuple[int, ...]:
        return tuple(
            now - base for now, base in zip(_used(folder), self._base, strict=True)
        )  # of this job, on a disk that others may use too

    def share(self, part: float) -> tuple[int, int]:
        """Bytes and files of a disk that has room for a part of what the job writes."""
        return tuple(
            int(before + part * (most - before))
            for before, most in zip(self.before, self.most, strict=True)
        )


def _used(folder: Path) -> tuple[int, int]:
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree


# ---- a disk that is full ---------------------------------------------------------------


def too_small(stopping: Stopping, need: Need, folder: Path, part: float) -> str:
    """A disk that has room for a part of the bytes."""
    return _on(stopping, folder, lambda disk: disk.resize(max(4096, need.share(part)[0])))


def too_few_files(stopping: Stopping, need: Need, folder: Path, part: float) -> str:
    """A disk that has room for a part of the files."""
    files = max(3, need.share(part)[1] + 1)
    return _on(stopping, folder, lambda disk: disk.resize(ROOM, files))


def filled_meanwhile(stopping: Stopping, need: Need, folder: Path, part: float) -> str:
    """A disk that somebody else fills while the command writes."""

    def fill(disk: Memory, command: Command) -> None:
        work = disk.folder / "work"
        before = look(work)
        if command.until(lambda: look(work) != before) and command.lives(part * need.writing):
            with suppress(OSError), open(disk.folder / "other", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 20))

    size = 4 * need.most[0] + (4 << 20)
    return _on(stopping, folder, lambda disk: disk.resize(size), fill)


def _on(
    stopping: Stopping,
    folder: Path,
    ready: Callable[[Memory], None],
    meanwhile: Callable[[Memory, Command], None] = lambda disk, command: None,
) -> str:
    """Run a job on a disk that ``ready`` has been called with; then give it room, and run it again.

    Returns:
        What has come of it; see ``Stopping.check_failed``.
    """
    with Memory(folder, ROOM) as disk:
        work = disk.folder / "work"
        stopping.job.prepare(stopping.place, work)
        ready(disk)
        command = Command(stopping.words(work))
        meanwhile(disk, command)
        found = stopping.check_failed(work, command.wait())
        (disk.folder / "other").unlink(missing_ok=True)
        disk.resize(ROOM)
        stopping.finish(work)
        return found


def too_large(stopping: Stopping, need: Need, folder: Path, part: float) -> str:
    """Files may have a part of the size of the largest one; later, smaller ones can be written."""
    work, size = folder / "work", max(1, int(part * need.largest))
    stopping.job.prepare(stopping.place, work)
    ended = run(stopping.words(work), limit_files(size))
    found = stopping.check_failed(work, ended)
    stopping.finish(work)
    return found


def limit_files(size: int) -> Callable[[], None]:
    """Lets a new process write files of so many bytes at most."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# ---- moments ---------------------------------------------------------------------------


def at_a_moment(
    stopping: Stopping, need: Need, work: Path, rng: random.Random, act: Callable[[], None]
) -> Ended:
    """Run a job, and do something at a moment within its writing (one time in five: of its whole
    run)."""
    before = look(work)
    command = Command(stopping.words(work))
    if rng.random() < 0.2:
        command.lives(rng.random() * need.whole)
    elif command.until(lambda: look(work) != before):
        command.lives(rng.random() * need.writing)
    act()
    return command.wait()
