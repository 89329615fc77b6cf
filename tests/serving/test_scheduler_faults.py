"""Limits, cancelled requests, failures: what goes wrong stays with whom it belongs to."""

from __future__ import annotations

import gc
import time
import weakref

import mlx.core as mx
import pytest

from mlx_hiermem.errors import InputError
from mlx_hiermem.serving.job import Failed, Finished, Full, Piece
from mlx_hiermem.serving.scheduler import Scheduler
from tests.serving.serving_lm import LONG, WAIT, begun, job, read, running

# ---- limits ----------------------------------------------------------------------------


def test_full(gate, gated):
    first = gated.submit(job("a"))
    begun(first)
    waiting = [gated.submit(job("b")), gated.submit(job("c"))]
    assert gated.stats()["waiting"] == 2
    with pytest.raises(Full, match="2 requests wait already"):
        gated.submit(job("d"))
    gate.open.set()
    for handle in [first, *waiting]:
        assert list(handle.events(WAIT))[-1].reason == "length"
    assert read(gated.submit(job("d"))).end.reason == "length"
    stats = gated.stats()
    assert (stats["refused_full"], stats["submitted"], stats["finished_length"]) == (1, 4, 4)
    assert stats["waiting"] == stats["running"] == 0


def test_one_that_waits_is_cancelled_at_once_and_makes_room(gate, gated):
    first = gated.submit(job("a"))
    begun(first)
    waiting = [gated.submit(job("b")), gated.submit(job("c"))]
    waiting[0].cancel()
    waiting[0].cancel()
    # The model stands still, and it has ended all the same.
    assert read(waiting[0]).end == Finished("cancelled", 1, 0, 0)
    assert list(waiting[0].events(WAIT)) == []
    gated.submit(job("d")).cancel()
    gate.open.set()
    assert read(waiting[1]).text


def test_a_running_one_ends_within_a_token(gate, gated):
    handle = gated.submit(job("a", max_tokens=LONG))
    begun(handle)
    handle.cancel()
    before = gate.calls
    gate.open.set()
    found = list(handle.events(WAIT))
    assert found[-1].reason == "cancelled"
    # The token that was on its way, and mlx-lm is one ahead.
    assert gate.calls - before <= 2
    assert sum(isinstance(event, Piece) for event in found) <= 1
    assert gated.stats()["running"] == 0
    handle.cancel()


def test_time_limits(gate, gated):
    running_ = gated.submit(job("a", max_tokens=LONG, time_limit=0.05))
    begun(running_)
    waiting = gated.submit(job("b", time_limit=0.05))
    patient = gated.submit(job("c"))
    time.sleep(0.1)
    gate.open.set()
    for handle in (running_, waiting):
        *before, end = handle.events(WAIT)
        assert isinstance(end, Failed) and end.timed_out and not end.client_error
    assert before == []  # no memory was fetched for it any more
    assert read(patient).end.reason == "length"
    stats = gated.stats()
    assert (stats["failed_timeout"], stats["running"], stats["waiting"]) == (2, 0, 0)


def test_the_schedulers_time_limit_holds_for_all(folder):
    with running(folder, time_limit=0.0) as scheduler:
        end = read(scheduler.submit(job("a", max_tokens=LONG, time_limit=100.0))).end
        assert isinstance(end, Failed) and end.timed_out


def test_a_reader_need_not_wait_for_ever(gate, gated):
    handle = gated.submit(job("a"))
    begun(handle)
    with pytest.raises(TimeoutError, match="no event"):
        list(handle.events(0.01))
    gate.open.set()
    assert list(handle.events(WAIT))[-1].reason == "length"


@pytest.mark.parametrize("name", ["max_batch", "max_waiting", "prompt_cache_bytes"])
def test_limits_that_are_none(name):
    with pytest.raises(InputError, match=name):
        Scheduler(lambda: None, **{name: -1})


# ---- what is left behind ---------------------------------------------------------------


def test_cancelled_requests_leave_nothing_behind(folder):
    with running(folder, max_batch=8, max_waiting=300) as scheduler:
        companion = scheduler.submit(job("gold is", max_tokens=LONG))
        handles = []
        for number in range(200):
            path = (number % 3, number % 3 * 3 + number % 2)
            handles.append(scheduler.submit(job("what is it?", path, LONG)))
        for handle in handles[::2]:  # some of them run, most wait
            handle.cancel()
        for number, handle in enumerate(handles[1::2]):
            if number < 12:
                begun(handle)
                next(handle.events(WAIT))
            handle.cancel()
        ends = [list(handle.events(WAIT))[-1] for handle in handles]
        assert {end.reason for end in ends} == {"cancelled"}
        assert read(companion).end.reason == "length"
        stats = scheduler.stats()
        assert stats["finished_cancelled"] == 200
        assert (stats["running"], stats["waiting"]) == (0, 0)
        assert stats["prompt_cache_entries"] == 1  # the companion's
        assert stats["slots_made"] == 1
        gone = [weakref.ref(one) for one in handles]
        del handles, handle, companion
        read(scheduler.submit(job("a", max_tokens=1)))  # the thread is past all of them
        gc.collect()
        assert [one() for one in gone if one() is not None] == []


def test_arrays_do_not_grow_with_cancelled_requests(folder):
    with running(folder, max_batch=4, prompt_cache_bytes=0) as scheduler:

        def one_round() -> int:
            for number in range(6):
                handle = scheduler.submit(job("what is it?", (number % 3, number % 3 * 3), LONG))
                events = handle.events(WAIT)
                next(events), next(events)
                handle.cancel()
                list(events)
            read(scheduler.submit(job("a", max_tokens=1)))
            gc.collect()
            return mx.get_active_memory()

        one_round()
        held = one_round()
        for _ in range(2):
            assert one_round() <= held + 4096
