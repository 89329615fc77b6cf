"""One command, killed again and again at moments that are spread over its run."""

from __future__ import annotations

import random
import shutil
import signal
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlx_hiermem.bank.reader import BlockReader
from tests.reliability.kill_jobs import Job
from tests.reliability.kill_process import Command, Ended, Look, look, run
from tests.reliability.kill_states import States


class Killing:
    """A job, killed again and again; each second time what a killed one has left is killed too.

    Attributes:
        writing: seconds from the first write of the command to its last one.
        where: how many kills came before the first write, within the writing, and after it.
        states: in which state the kills have left what is there.
        ended: how many commands were run to their end afterwards.
        wrong: what should not be.
    """

    def __init__(self, job: Job, place: Path, folder: Path) -> None:
        self.job, self.place = job, place
        self.work = folder / "work"
        self.expected = States.of(job, place, folder)
        self.where: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.ended = 0
        self.wrong: list[str] = []
        self._old: BlockReader | None = None
        times = [self._measure() for _ in range(3)]
        self.whole, self.writing = map(statistics.median, zip(*times, strict=True))

    def _measure(self) -> tuple[float, float]:
        """Seconds that the command takes, and those from its first write to its last one."""
        self.job.prepare(self.place, self.work)
        before = look(self.work)
        command = Command(self.job.words(self.place, self.work))
        assert command.until(lambda: look(self.work) != before)
        first = last = time.monotonic()
        now = look(self.work)
        while command.process.poll() is None:
            if (found := look(self.work)) != now:
                now, last = found, time.monotonic()
        ended = command.wait()
        assert ended.code == 0, ended
        return time.monotonic() - command.started, last - first

    def run(self, count: int, rng: random.Random) -> None:
        """Kill so many commands."""
        moments = spread(count, rng)
        self._anew()
        while moments:
            before = look(self.work)
            ended = self._stopped(*moments[-1], before)
            if ended.code == -signal.SIGKILL:
                moments.pop()
                self.where[self._place_of(before)] += 1
                self._see(self._check)
                if moments and rng.random() < 0.5:
                    continue
                ended = run(self.job.words(self.place, self.work))
            else:  # before its time: the machine is faster now, or all was done already
                self.whole, self.writing = 0.95 * self.whole, 0.95 * self.writing
            self.ended += 1
            self._see(partial(self._check_ended, ended))
            self._anew()

    def _stopped(self, within: bool, share: float, before: Look) -> Ended:
        """The command, killed at a moment, if it lives so long."""
        command = Command(self.job.words(self.place, self.work))
        if within:
            alive = command.until(lambda: look(self.work) != before)
            alive = alive and command.lives(share * self.writing)
        else:
            alive = command.lives(share * self.whole)
        return command.kill() if alive else command.wait()

    def _anew(self) -> None:
        if self._old is not None:
            self._old.close()
        self.job.prepare(self.place, self.work)
        if self.job.gone:
            self._old = BlockReader(self.work / "model" / "memory")

    def _place_of(self, before: Look) -> str:
        if look(self.work) == before:
            return "before the first write"
        if self.job.source is None:
            return "after the last" if self.job.done(self.work) else "within"
        memory = self.work / "model" / "memory"
        hidden = any(path.name.startswith(".") for path in memory.iterdir())
        return "within" if hidden else "after the last"

    def _check(self) -> None:
        self.states.update([self.expected.check(self.work)])

    def _check_ended(self, ended: Ended) -> None:
        self.expected.check_ended(self.work, ended)
        for level, cluster in self.job.gone:  # nor left in the free space of the disk
            assert not self._old.stored(level, cluster).any(), f"{level}:{cluster} is still there"

    def _see(self, check: Callable[[], None]) -> None:
        """Note what is wrong, and keep the folder that it is in."""
        try:
            check()
        except AssertionError:
            self.wrong.append(traceback.format_exc())
            shutil.copytree(self.work, self.work.parent / f"wrong-{len(self.wrong)}")

    @property
    def told(self) -> str:
        """All of it in a line."""
        return (
            f"of {self.where.total()} kills ({show(self.where)}; a writing takes "
            f"{self.writing:.2f} s; found: {show(self.states)}); then {self.ended} runs to the end"
        )


def show(counts: Counter[str]) -> str:
    """Such as ``3 done, 2 none``."""
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def spread(count: int, rng: random.Random) -> list[tuple[bool, float]]:
    """Moments, shuffled: whether one lies within the writing, and at which share of it.

    One in five is anywhere from the start of the process to its end.
    """
    anywhere = count // 5
    found = [
        (within, (number + rng.random()) / many)
        for within, many in ((True, count - anywhere), (False, anywhere))
        for number in range(many)
    ]
    rng.shuffle(found)
    return found
