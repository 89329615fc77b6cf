"""If the model cannot be loaded, if its thread dies, when it is closed: everybody is told."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_hiermem import load
from mlx_hiermem.errors import FormatError
from mlx_hiermem.serving.job import Dead, Failed
from mlx_hiermem.serving.scheduler import Scheduler
from tests.serving.serving_lm import LONG, WAIT, answers, begun, job

# ---- the thread ------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(3)], ids=["error", "exit"])
def test_if_the_thread_dies_everybody_is_told(gate, gated, error):
    handles = [gated.submit(job("a"))]
    begun(handles[0])
    handles += [gated.submit(job("b")), gated.submit(job("c"))]
    gate.error = error
    gate.open.set()
    for handle in handles:
        end = list(handle.events(WAIT))[-1]
        assert isinstance(end, Failed) and not end.client_error and "boom" not in end.message
    assert not gated.alive
    assert gated.failure is error
    with pytest.raises(Dead, match="has ended"):
        gated.submit(job("d"))
    assert gated.stats()["failed_server"] == 3
    gated.close()
    handles[0].cancel()


def test_a_model_that_cannot_be_loaded(folder):
    def broken():
        raise FormatError("no such model")

    scheduler = Scheduler(broken)
    with pytest.raises(Dead, match="not loaded"):
        scheduler.submit(job("a"))
    with pytest.raises(Dead, match="not loaded"):
        scheduler.tokenize("a")
    with pytest.raises(FormatError, match="no such model"):
        scheduler.start()
    assert not scheduler.alive and isinstance(scheduler.failure, FormatError)
    with pytest.raises(Dead, match="has ended"):
        scheduler.submit(job("a"))
    scheduler.close()


def test_a_bank_that_cannot_be_read_fails_the_request_alone(folder, tmp_path):
    held = []

    def loaded():
        lm = load(folder)
        fetch = lm.fetch

        def failing(memory, *arguments):
            if memory == (2, 8):
                raise FormatError(f"{folder}: truncated")
            if memory == (2, 7):
                raise ZeroDivisionError
            return fetch(memory, *arguments)

        lm.fetch = failing
        held.append(lm)
        return lm

    scheduler = Scheduler(loaded)
    scheduler.start()
    held.clear()
    jobs = [job("a", (1, 4)), job("a", (2, 8)), job("a", (2, 7)), job("a", (1, 4))]
    found = answers(scheduler, jobs)
    assert found[0].text == found[3].text and len(found[0].text) == 16
    for one in found[1:3]:
        assert isinstance(one.end, Failed) and not one.end.client_error
        assert str(folder) not in one.end.message
    assert scheduler.alive and scheduler.stats()["failed_server"] == 2
    scheduler.close()


def test_a_memory_that_gives_nan_fails_its_request_alone(folder):
    def loaded():
        lm = load(folder)
        fetch = lm.fetch

        def poisoned(memory, *arguments):
            fetched = fetch(memory, *arguments)
            if memory == (2, 8):
                return replace(fetched, memory=fetched.memory * mx.nan)
            return fetched

        lm.fetch = poisoned
        return lm

    scheduler = Scheduler(loaded)
    scheduler.start()
    jobs = [job("a", (1, 4), 30), job("a", (2, 8), 30), job("a", (2, 8), 1), job("a", (1, 4), 30)]
    found = answers(scheduler, jobs)
    assert found[0].text == found[3].text and len(found[0].text) == 30
    for one in found[1:3]:
        assert isinstance(one.end, Failed) and "NaN" in one.end.message
        assert one.pieces == []
    scheduler.close()


# ---- closing ---------------------------------------------------------------------------


def test_closing_finishes_what_was_taken(gate):
    scheduler = Scheduler(gate, max_batch=1)
    scheduler.start()
    handles = [scheduler.submit(job(text)) for text in "abc"]
    begun(handles[0])
    closing = threading.Thread(target=scheduler.close, kwargs={"timeout": WAIT})
    closing.start()
    while scheduler._ended is None:
        time.sleep(0.001)
    with pytest.raises(Dead, match="closing"):
        scheduler.submit(job("d"))
    assert scheduler.alive
    gate.open.set()
    assert [list(handle.events(WAIT))[-1].reason for handle in handles] == ["length"] * 3
    closing.join(WAIT)
    assert not scheduler.alive and scheduler.failure is None
    scheduler.close()


def test_closing_at_once_fails_what_was_taken(gate):
    scheduler = Scheduler(gate, max_batch=1)
    scheduler.start()
    handles = [scheduler.submit(job(text, max_tokens=LONG)) for text in "abc"]
    begun(handles[0])
    gate.open.set()
    scheduler.close(drain=False, timeout=WAIT)
    for handle in handles:
        end = list(handle.events(WAIT))[-1]
        assert isinstance(end, Failed) and "closing" in end.message and not end.client_error
    assert not scheduler.alive and scheduler.failure is None


def test_closing_waits_no_longer_than_it_may(gate, gated):
    handle = gated.submit(job("a", max_tokens=LONG))
    begun(handle)
    gated.close(timeout=0.01)
    assert gated.alive  # the model stands still; the thread ends with its token
    gate.open.set()
    assert isinstance(list(handle.events(WAIT))[-1], Failed)
