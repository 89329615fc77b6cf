"""SIGKILL at random moments of every command that writes: nothing that loads and is wrong.

Real processes. Most moments lie between the first write of a command and its last one, the others
anywhere from its start to its end; every second process starts from what a killed one has left.
That a machine loses power is in ``test_disks.py``.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.reliability.kill_jobs import JOBS, LARGE, make_place
from tests.reliability.kill_process import look
from tests.reliability.kill_rounds import Killing, show
from tests.training.runs import make_place as make_training_place
from tests.training.test_kills import REGIMES, check, command, finish, moment, start

pytestmark = pytest.mark.soak

#: Random moments for each command.
KILLS = 50


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("kills"), LARGE)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_killed_at_random_moments(job, place, tmp_path, scaled, figure):
    killing = Killing(job, place, tmp_path)
    killing.run(scaled(KILLS), random.Random(job.name))
    figure(f"kills.{job.name}.wrong", len(killing.wrong), killing.told)
    assert killing.where.total() == scaled(KILLS)
    assert not killing.wrong, killing.wrong[0]


# ---- training --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_training_place(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("regime", list(REGIMES))
def test_training_killed_at_random_moments(training_place, tmp_path, regime, scaled, figure):
    """Each run is killed and resumed until it ends by itself; then comes the next run.

    Every moment is counted from the first write of a process, so that none of them is spent on
    its start alone.
    """
    place, whole, err = training_place, tmp_path / "whole", tmp_path / "err"

    def begin(run: Path):
        """A process that trains, once it has begun to write or has ended."""
        before = look(run)
        process = start(["-m", "mlx_hiermem", *command(place, run, regime)], err)
        while process.poll() is None and look(run) == before:
            time.sleep(0.002)
        return process, time.monotonic()

    process, began = begin(whole)
    finish(process, err)
    seconds = time.monotonic() - began
    rng = random.Random(regime)
    kills = scaled(KILLS)
    delays = [seconds * (number + rng.random()) / kills for number in range(kills)]
    rng.shuffle(delays)
    moments: list[str] = []
    runs = 0
    while delays:
        run, resumed = tmp_path / f"run-{runs}", False
        runs += 1
        while True:
            finished = (run / "model").exists()
            process, _ = begin(run)
            if delays and not finished:
                try:
                    process.wait(delays[-1])
                except subprocess.TimeoutExpired:
                    process.kill()
                if process.wait() == -signal.SIGKILL:
                    delays.pop()
                    moments.append(moment(run))
                    resumed = True
                    continue
            finish(process, err, finished)
            if not (finished or resumed):  # before its time: the machine is faster now
                delays = [0.9 * delay for delay in delays]
            break
        check(run, whole)
    told = Counter("between checkpoints" if "check" in one else one for one in moments)
    figure(
        f"kills.train {regime}.wrong", 0,
        f"of {len(moments)} kills ({show(told)}; {len(set(moments))} places, {seconds:.1f} s from "
        f"the first write on); {runs} runs resumed to their end, bit for bit that without kills",
    )  # fmt: skip
    assert len(moments) == kills
