"""Several processes of ``mlx.launch`` on one machine, over its ring, against a single one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from mlx_hiermem.training.checkpoint import whole_steps
from mlx_hiermem.training.distributed import _groups
from tests.training.runs import arguments, bank, losses, train, validations, weights

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "iters": 6, "batch_size": 4, "grad_accumulation_steps": 2, "learning_rate": 0.01,
    "steps_per_eval": 3, "val_batches": 2, "bank_dtype": "float32", "generic_probability": 0.3,
}  # fmt: skip
REGIMES = {
    "anchor": {"ranks": None, "generic_probability": None, "warmup_steps": 0},
    "frozen": {},
    "cotrain": {"freeze": "*embed*"},
}


def free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nobody listens on."""
    for first in range(20000 + os.getpid() % 1000 * 10, 60000, 10):
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def start(place: Path, run: Path, processes: int, **options) -> subprocess.Popen:
    launch = Path(sys.executable).with_name("mlx.launch")
    command = [launch, "-n", str(processes), "-p", str(free_ports(processes)), "--"]
    command += [sys.executable, "-m", "mlx_hiermem", *arguments(place, run, **options)]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return output


def kill(process: subprocess.Popen) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    for one in [*children, psutil.Process(process.pid)]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass
    process.communicate()
    psutil.wait_procs(children, timeout=30)


@pytest.mark.parametrize(
    ("regime", "processes"), [("anchor", 2), ("frozen", 2), ("cotrain", 2), ("cotrain", 4)]
)
def test_processes_make_the_model_of_a_single_one(place, tmp_path, regime, processes):
    options = OPTIONS | {"regime": regime} | REGIMES[regime]
    process = start(place, tmp_path / "many", processes, **options)
    assert train(place, tmp_path / "one", **options) == 0
    output = finish(process)
    assert output.count("setting ") == 1, "only the first process prints"
    one, many = tmp_path / "one", tmp_path / "many"
    assert [step for step, _ in losses(many)] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(
        [loss for _, loss in losses(many)], [loss for _, loss in losses(one)], rtol=1e-5
    )
    for (_, found), (_, expected) in zip(validations(many), validations(one), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    for name, expected in weights(one / "model").items():
        np.testing.assert_allclose(weights(many / "model")[name], expected, atol=3e-4)
    if regime != "anchor":
        found = bank(many / "model")
        for key, expected in bank(one / "model").items():
            # Where a gradient is about zero, AdamW turns its rounding into a step.
            far = np.abs(found[key] - expected) > 3e-4
            assert far.mean() < 0.01, key
    assert not (many / "state").exists()


@pytest.mark.slow
def test_processes_hold_the_same_bits_and_resume_to_the_same_bits(place, tmp_path):
    options = OPTIONS | {"regime": "cotrain", "freeze": "*embed*", "iters": 12, "save_every": 3}
    finish(start(place, tmp_path / "whole", 2, **options))
    run = tmp_path / "stopped"
    process = start(place, run, 2, **options)
    wanted = [run / "state" / f"rank-{rank}" / "checkpoint-00000003" for rank in (0, 1)]
    until = time.time() + 120
    while not all(map(Path.exists, wanted)) and time.time() < until:
        time.sleep(0.005)
    kill(process)
    assert not (run / "model").exists()

    steps = [whole_steps(run / "state" / f"rank-{rank}") for rank in (0, 1)]
    assert all(steps) and set(steps[0]) & set(steps[1])
    output = finish(start(place, run, 2, **options, resume=True))
    assert f"resumed at step {min(map(max, steps))}" in output
    assert losses(run) == losses(tmp_path / "whole")
    assert validations(run) == validations(tmp_path / "whole")
    for key, expected in bank(tmp_path / "whole" / "model").items():
        assert np.array_equal(bank(run / "model")[key], expected)
    for name, expected in weights(tmp_path / "whole" / "model").items():
        assert np.array_equal(weights(run / "model")[name], expected)


def test_groups_keep_their_order_and_stay_small(monkeypatch):
    monkeypatch.setattr("mlx_hiermem.training.distributed._MOST", 10)
    sizes = {"a": 4, "b": 6, "c": 1, "d": 25, "e": 2}
    assert list(_groups(sizes)) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert list(_groups({})) == []
