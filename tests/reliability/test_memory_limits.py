"""Too little memory: the kernel kills a command, or a library gives up; nothing is lost.

A control group that allows less than a command needs, from its start or from a moment within its
writing on; and a small address space (``ulimit -v``).
"""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.disk_faults import Need
from tests.reliability.disk_jobs import (
    WRITING,
    Stopping,
    answer,
    generate_words,
    make_small_place,
)
from tests.reliability.kill_process import Command, Ended, look, run
from tests.reliability.memory_group import Group, can_limit
from tests.reliability.test_disks import Seen

pytestmark = pytest.mark.soak

#: Limits of each kind for each command.
LIMITS = 10
#: Memory config of a bank of 11 MB, for which some memory is needed while it is written.
MEDIUM = (1024, 512, 256)
#: Address space that is enough for every command here, without a fast BLAS: older ones wait forever
#: for what they do not get, so the package leaves them alone (``backend.preload_blas``).
ENOUGH = 4 << 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_place(tmp_path_factory.mktemp("memory"), MEDIUM)


@pytest.fixture(params=WRITING.values(), ids=WRITING, scope="module")
def stopping(request, place, tmp_path_factory) -> Stopping:
    return Stopping.of(request.param, place, tmp_path_factory.mktemp("stopping"))


_GIVEN_UP = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, 1, 127)


def how_it_ended(ended: Ended) -> str:
    """In which way a command has ended that may have had too little memory.

    Raises:
        AssertionError: in none that is allowed.
    """
    if ended.code == 0:
        return "done"
    if ended.code == -signal.SIGKILL:
        return "killed by the kernel"
    if ended.code < 0 or "mlx_hiermem: error: " not in ended.err:
        # MLX and OpenBLAS do not tell of memory that they do not get: they end the process.
        interrupted = ended.code == 130 and "OpenBLAS" in ended.err  # it raises SIGINT
        assert interrupted or ended.code in _GIVEN_UP, ended
        return "ended by a library"
    assert ended.code == 2 and "memory" in ended.complaint, ended
    return "refused"


def check_after(stopping: Stopping, work: Path, ended: Ended) -> str:
    """Whatever has happened: what is there is right, and the command can be run again."""
    found = how_it_ended(ended)
    state = stopping.check(work)
    assert found != "done" or state == "done"
    stopping.finish(work)
    return found


# ---- a control group -------------------------------------------------------------------


def test_the_kernel_kills_it(stopping, tmp_path, scaled, figure):
    if not can_limit():
        figure(f"memory.group.{stopping.job.name}.wrong", 0, "not tried: no control groups here")
        return
    seen, rng, work = Seen(), random.Random(stopping.job.name), tmp_path / "work"
    need = Need(stopping, tmp_path / "need")
    words = lambda: stopping.words(work)  # noqa: E731
    stopping.job.prepare(stopping.place, work)
    most = _most_used(words())

    def from_the_start(share: float) -> str:
        stopping.job.prepare(stopping.place, work)
        with Group() as group:
            group.limit(int((0.1 + 0.9 * share) * most))
            ended = run(words(), group.join)
        return check_after(stopping, work, ended)

    def from_a_moment_on(share: float) -> str:
        stopping.job.prepare(stopping.place, work)
        with Group() as group:
            before = look(work)
            command = Command(words(), group.join)
            if command.until(lambda: look(work) != before) and command.lives(share * need.writing):
                size = group.used
                while not group.limit(size) and command.process.poll() is None:
                    size += 1 << 20
            ended = command.wait()
        return check_after(stopping, work, ended)

    _each(seen, rng, scaled(LIMITS), from_the_start, from_a_moment_on)
    how = f"at most {most >> 20} MiB are needed; {_version()}"
    seen.tell(figure, f"memory.group.{stopping.job.name}", how)


def _each(seen: Seen, rng: random.Random, count: int, *kinds: Callable[[float], str]) -> None:
    for kind in kinds:
        for number in range(count):
            share = (number + rng.random()) / count
            name = kind.__name__.replace("_", " ")
            seen.see(name, lambda kind=kind, share=share: kind(share))


def _most_used(words: list[str]) -> int:
    """The most memory that a command has."""
    with Group() as group:
        command, most = Command(words, group.join), 0
        while command.process.poll() is None:
            most = max(most, group.used)
        assert command.wait().code == 0
    return most


def _version() -> str:
    with Group() as group:
        return f"control groups, version {group.version}"


def test_the_kernel_kills_what_only_reads(place, tmp_path, scaled, figure):
    words = generate_words(place / "model")
    expected = answer(run(words))
    if not can_limit():
        figure("memory.group.generate.wrong", 0, "not tried: no control groups here")
        return
    most = _most_used(words)
    seen = Seen()

    def from_the_start(share: float) -> str:
        with Group() as group:
            group.limit(int((0.1 + 0.9 * share) * most))
            ended = run(words, group.join)
        found = how_it_ended(ended)
        assert found != "done" or answer(ended) == expected
        return found

    _each(seen, random.Random(0), scaled(LIMITS), from_the_start)
    how = f"at most {most >> 20} MiB are needed; {_version()}"
    seen.tell(figure, "memory.group.generate", how)


# ---- a small address space -------------------------------------------------------------


@pytest.mark.parametrize("name", WRITING)
def test_a_small_address_space(name, place, tmp_path, scaled, figure):
    stopping = Stopping.of(WRITING[name], place, tmp_path / "stopping", _limit(ENOUGH))
    seen, rng, work = Seen(), random.Random(name), tmp_path / "work"
    stopping.job.prepare(place, work)
    most = _most_mapped(stopping.words(work))

    def limited(share: float) -> str:
        stopping.job.prepare(place, work)
        ended = run(stopping.words(work), _limit((0.05 + 0.95 * share) * most))
        return check_after(stopping, work, ended)

    _each(seen, rng, scaled(LIMITS), limited)
    how = f"up to the {most >> 20} MiB that it takes of {ENOUGH >> 20}; RLIMIT_AS"
    seen.tell(figure, f"memory.address space.{name}", how)


def _limit(size: float) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (int(size), int(size)))


def _most_mapped(words: list[str]) -> int:
    """The most address space that a command takes of what is enough."""
    command, most = Command(words, _limit(ENOUGH)), 0
    path = Path(f"/proc/{command.process.pid}/status")
    while command.process.poll() is None:
        try:
            found = [line.split() for line in path.read_text().splitlines()]
        except OSError:  # it has ended just now
            break
        most = max([most, *(int(line[1]) << 10 for line in found if line[0] == "VmPeak:")])
    assert command.wait().code == 0
    return most
