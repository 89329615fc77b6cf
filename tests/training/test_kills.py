"""A run that is killed, at any moment and again and again, ends as one that was not: bit for bit.

Real processes and SIGKILL. That a machine loses power is another matter: what was written but not
synced cannot be lost here.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_hiermem.training.checkpoint import holds_run
from tests.corpus.corpora import files_of
from tests.training.runs import arguments, losses, validations

pytestmark = pytest.mark.slow

REGIMES = {"cotrain": {"freeze": "*embed*", "bank_dtype": "float32"}, "frozen": {}}
#: Random moments for each regime.
KILLS = 10


def command(place: Path, run: Path, regime: str) -> list[str]:
    return arguments(
        place, run, regime=regime, iters=30, batch_size=2, grad_accumulation_steps=2,
        save_every=3, steps_per_eval=10, val_batches=1, memory_budget=2 * 12 * 576,
        resume=(holds_run(run / "state") or (run / "model").exists()) or None, **REGIMES[regime],
    )  # fmt: skip


def start(script: list[str], err: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with open(err, "w") as file:
        return subprocess.Popen(
            [sys.executable, *script], env=environment, stdout=subprocess.DEVNULL, stderr=file
        )


def finish(process: subprocess.Popen, err: Path, finished: bool = False) -> None:
    """See a run end well; one that was finished already says so, and tidies up."""
    code, told = process.wait(120), err.read_text()
    assert code == (2 if finished else 0), told[-2000:]
    assert ("the run is finished, its result is" in told) == finished


def check(run: Path, whole: Path) -> None:
    """The finished run is the one that nothing happened to."""
    files = files_of(run / "model")
    assert files == files_of(whole / "model")
    assert "model.safetensors" in files and "memory/generic.safetensors" in files
    assert losses(run) == losses(whole) and len(losses(run)) == 30
    assert validations(run) == validations(whole) and len(validations(run)) == 4
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "log.jsonl", "model"]


@pytest.mark.parametrize("regime", list(REGIMES))
def test_killed_at_random_moments(place, tmp_path, regime):
    """Each run is killed and resumed until it ends by itself; then comes the next run."""
    reference, err = tmp_path / "whole", tmp_path / "err"
    started = time.perf_counter()
    finish(start(["-m", "mlx_hiermem", *command(place, reference, regime)], err), err)
    seconds = time.perf_counter() - started
    rng = random.Random(f"{regime} 0")
    # Spread over the whole of a run, from its first moment to its last.
    delays = [seconds * (number + rng.random()) / KILLS for number in range(KILLS)]
    rng.shuffle(delays)
    moments, runs = [], 0
    while delays:
        run = tmp_path / f"run-{runs}"
        runs += 1
        ended = False
        while not ended:
            finished = (run / "model").exists()
            process = start(["-m", "mlx_hiermem", *command(place, run, regime)], err)
            if delays and not finished:
                try:
                    process.wait(delays[-1])
                except subprocess.TimeoutExpired:
                    process.kill()
                if process.wait() == -signal.SIGKILL:  # else it had come to its end just now
                    delays.pop()
                    moments.append(moment(run))
                    continue
            finish(process, err, finished)
            ended = True
            if not finished:  # before its time: the machine is faster now than it was
                delays = [0.8 * delay for delay in delays]
        check(run, reference)
    print(f"{regime}: {runs} runs, killed at {sorted(moments)}")
    assert len(moments) == KILLS
    assert len(set(moments)) > 4, "wanted: moments all over the run"


def moment(run: Path) -> str:
    """How far a killed run is."""
    if not run.exists():
        return "start"
    names = {path.name for path in run.iterdir()}
    if "model" in names or ".model.partial" in names:
        return "export"
    found = sorted(path.name for path in run.glob("state/rank-0/*checkpoint-*"))
    return found[-1] if found else "before the first checkpoint"


CHILD = """
import json, sys
from tests.training.faults import faults, kill
from mlx_hiermem import cli
at, argv = json.loads(sys.argv[1])
with faults(at, kill) as count:
    code = cli.main(argv)
print(count.calls, file=sys.stderr)
sys.exit(code)
"""


def test_killed_in_the_middle_of_an_operation_on_files(place, tmp_path):
    """Writes are half done, and renames and removals are not: from the first to the last of them.

    ``test_checkpoint.py`` does the same in one process for each operation of the checkpoints.
    """
    reference, err = tmp_path / "whole", tmp_path / "err"

    def child(at: int | None, run: Path) -> subprocess.Popen:
        return start(["-c", CHILD, json.dumps([at, command(place, run, "cotrain")])], err)

    finish(child(None, reference), err)
    total = int(err.read_text().split()[-1])
    assert total > 300
    rng = random.Random(0)
    points = [
        total - 1 - rng.randrange(3),
        *(rng.randrange(total * i // 5, total * (i + 1) // 5) for i in range(5)),
    ]
    for at in points:
        run = tmp_path / f"run-{at}"
        process = child(at, run)
        assert process.wait(120) == -signal.SIGKILL, err.read_text()[-2000:]
        finished = (run / "model").exists()
        finish(child(None, run), err, finished)
        check(run, reference)
