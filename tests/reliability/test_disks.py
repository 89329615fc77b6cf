"""Disks that are full, read-only or cut off: clear errors, nothing lost, nothing half done.

Real disks where this machine lets us mount them: a small tmpfs, and an ext4 in a file. Elsewhere
the system limits the size of files, and folders are moved away.
"""

from __future__ import annotations

import os
import random
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_hiermem.bank.remove import remove
from tests.reliability import disk_faults as faults
from tests.reliability.disk_jobs import (
    WRITING,
    Stopping,
    answer,
    empty,
    generate_words,
    make_small_place,
)
from tests.reliability.disk_mounts import Image, Memory, can_cut_off, can_mount
from tests.reliability.kill_process import run
from tests.reliability.kill_rounds import show
from tests.reliability.kill_states import files_of

pytestmark = pytest.mark.soak

#: Faults of each kind for each command.
FAULTS = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_place(tmp_path_factory.mktemp("disks"))


@pytest.fixture(params=WRITING.values(), ids=WRITING, scope="module")
def stopping(request, place, tmp_path_factory) -> Stopping:
    return Stopping.of(request.param, place, tmp_path_factory.mktemp("stopping"))


class Seen:
    """What has come of faults; those after which something was wrong are noted, not raised."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def see(self, kind: str, check: Callable[[], str]) -> None:
        """Do a fault of a kind, which says what has come of it."""
        try:
            self.counts[f"{kind}: {check()}"] += 1
        except AssertionError:
            self.wrong.append(f"{kind}: {traceback.format_exc()}")

    def tell(self, figure, name: str, how: str) -> None:
        """Write the figure, and fail if something was wrong."""
        count = self.counts.total() + len(self.wrong)
        figure(f"{name}.wrong", len(self.wrong), f"of {count} faults ({show(self.counts)}); {how}")
        assert not self.wrong, self.wrong[0]


def test_a_full_disk(stopping, tmp_path, scaled, figure):
    """Room for a part of what is written: of the bytes, of the files, of the largest file; or
    somebody else fills the disk meanwhile. With room, the same command ends as ever."""
    kinds, how = [faults.too_large], "by RLIMIT_FSIZE"
    if can_mount():
        kinds += [faults.too_small, faults.too_few_files, faults.filled_meanwhile]
        how = "on a tmpfs, and by RLIMIT_FSIZE"
        with Memory(tmp_path / "measure", faults.ROOM) as disk:
            need = faults.Need(stopping, disk.folder)
    else:
        need = faults.Need(stopping, tmp_path / "measure")
    seen, rng, count = Seen(), random.Random(stopping.job.name), scaled(FAULTS)
    for kind in kinds:
        for number in range(count):
            part = (number + rng.random()) / count
            folder = tmp_path / f"{kind.__name__}-{number}"
            name = kind.__name__.replace("_", " ")
            seen.see(name, lambda k=kind, f=folder, p=part: k(stopping, need, f, p))
    seen.tell(figure, f"disks.full.{stopping.job.name}", how)


def test_a_disk_that_cannot_be_written(stopping, tmp_path, figure):
    """Nothing happens to it; once it can be written, the same command ends as ever."""

    def check(folder: Path, lock: Callable[[bool], None], **options) -> str:
        work = folder / "work"
        stopping.job.prepare(stopping.place, work)
        files = files_of(work)
        lock(True)
        ended = run(stopping.words(work), **options)
        assert files_of(work) == files
        found = stopping.check_failed(work, ended)
        assert found == "refused" and "writ" in ended.complaint, ended
        lock(False)
        stopping.finish(work)
        return found

    seen = Seen()
    if can_mount():
        how = "a tmpfs that is mounted read-only"
        with Memory(tmp_path / "disk", faults.ROOM) as disk:
            lock = lambda locked: disk.set_writable(not locked)  # noqa: E731
            seen.see("read-only", lambda: check(disk.folder, lock))
    elif os.geteuid() != 0:
        how = "a folder that its owner may not write"
        seen.see("read-only", lambda: check(tmp_path / "disk", _lock(tmp_path / "disk")))
    else:
        how = "files of no byte, by RLIMIT_FSIZE"
        limit = faults.limit_files(0)
        seen.see("read-only", lambda: check(tmp_path / "disk", lambda _: None, before=limit))
    seen.tell(figure, f"disks.read-only.{stopping.job.name}", how)


def _lock(folder: Path) -> Callable[[bool], None]:
    def lock(locked: bool) -> None:
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o555 if locked else 0o755)

    return lock


def test_a_disk_that_is_cut_off(stopping, tmp_path, scaled, figure):
    """At a random moment: what was not written down is lost. Connected again, all is as it was or
    done, and what had said that it is done, is done."""
    how = "an ext4 that is shut down, its caches lost" if can_cut_off() else "a folder moved away"
    seen, rng = Seen(), random.Random(stopping.job.name)
    need = faults.Need(stopping, tmp_path / "measure")

    def on_image() -> str:
        with Image(tmp_path / "disk", 64 << 20) as disk:
            work = disk.folder / "work"
            stopping.job.prepare(stopping.place, work)
            disk.sync()
            ended = faults.at_a_moment(stopping, need, work, rng, disk.cut_off)
            disk.connect()
            return after(work, ended)

    def on_folder() -> str:
        work, away = tmp_path / "disk" / "work", tmp_path / "away"
        stopping.job.prepare(stopping.place, work)
        ended = faults.at_a_moment(stopping, need, work, rng, lambda: work.rename(away))
        empty(work.parent)
        away.rename(work)
        return after(work, ended)

    def after(work: Path, ended) -> str:
        state = stopping.check(work)
        if ended.code != 0:
            assert ended.code == 2 and ended.complaint, ended
        else:
            assert state == "done", "it had said that it was done"
        stopping.finish(work)
        return state

    for _ in range(scaled(FAULTS)):
        seen.see("cut off", on_image if can_cut_off() else on_folder)
    seen.tell(figure, f"disks.cut off.{stopping.job.name}", how)


def test_models_on_a_disk_that_cannot_be_written(place, tmp_path, figure):
    """They answer, also one of which an edit was stopped before its end."""
    model = place / "model"
    expected = answer(run(generate_words(model)))
    seen = Seen()

    def check(folder: Path, lock: Callable[[bool], None]) -> str:
        for stopped in (False, True):
            work = folder / f"work-{stopped}"
            WRITING["add"].prepare(place, work)
            if stopped:
                _stop_an_edit(work / "model", expected[1][0])
            lock(True)
            found = answer(run(generate_words(work / "model")))
            lock(False)
            assert found[1] == expected[1] and (found == expected) != stopped
        return "answered"

    if can_mount():
        with Memory(tmp_path / "disk", faults.ROOM) as disk:
            seen.see("read-only", lambda: check(disk.folder, lambda on: disk.set_writable(not on)))
    else:
        seen.see("read-only", lambda: check(tmp_path / "disk", _lock(tmp_path / "disk")))
    seen.tell(figure, "disks.read-only.generate", "a model, and one whose edit was stopped")


class _StopError(BaseException):
    pass


def _stop_an_edit(model: Path, subtree: int) -> None:
    """Remove a subtree, and stop when that is in force but no file has its name."""

    def step(name: str) -> None:
        if name == "rename":
            raise _StopError

    with pytest.raises(_StopError):
        remove(model / "memory", subtrees=[subtree], step=step)
