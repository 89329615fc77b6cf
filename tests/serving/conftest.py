"""What the scheduler's tests share: a tiny model, and schedulers on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_hiermem import MemoryLM, load
from mlx_hiermem.serving.scheduler import Scheduler
from tests.serving.serving_lm import WAIT, Gate, running
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model's."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(folder) -> MemoryLM:
    """The model, for what it answers alone."""
    return load(folder)


@pytest.fixture(scope="module")
def scheduler(folder) -> Iterator[Scheduler]:
    """One that keeps no prompts."""
    with running(folder, prompt_cache_bytes=0) as scheduler:
        yield scheduler


@pytest.fixture
def gate(folder) -> Gate:
    """The model, which goes on when it is let."""
    return Gate(folder)


@pytest.fixture
def gated(gate) -> Iterator[Scheduler]:
    """A scheduler of one place on it; two may wait."""
    scheduler = Scheduler(gate, max_batch=1, max_waiting=2)
    scheduler.start()
    yield scheduler
    gate.open.set()
    scheduler.close(drain=False, timeout=WAIT)
