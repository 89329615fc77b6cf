"""The processes of studies: what they share, and that they end with who made them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import CancelledError

import psutil
import pytest

from benchmarks.studies.workers import blas_threads, processes

PARENT = """
import time
from benchmarks.studies.workers import processes
with processes(2) as pool:
    for _ in range(2):
        pool.submit(time.sleep, 600)
    pool.submit(print, "never")
    while len(pool._processes) < 2:
        time.sleep(0.01)
    print(*pool._processes, flush=True)
    time.sleep(600)
"""


def test_workers_have_a_share_of_the_processors_each(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with processes(2, os.putenv, "BEGUN", "yes") as pool:
        assert pool.submit(os.getenv, "OPENBLAS_NUM_THREADS").result() == "3"
    assert "OPENBLAS_NUM_THREADS" not in os.environ
    with blas_threads(4), blas_threads(1):
        assert os.environ["OPENBLAS_NUM_THREADS"] == "1"


def test_an_error_ends_what_waits():
    with pytest.raises(KeyError), processes(1) as pool:
        first = pool.submit(time.sleep, 0.2)
        others = [pool.submit(time.sleep, 5) for _ in range(9)]
        first.result()
        raise KeyError
    with pytest.raises(CancelledError):
        others[-1].result(60)


def test_workers_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    workers = [psutil.Process(int(number)) for number in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(worker.is_running() for worker in workers)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive and len(gone) == 2
