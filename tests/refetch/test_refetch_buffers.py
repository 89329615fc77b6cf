"""Refetching in the midst of an answer: whose buffer it is, and what an error leaves behind."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.generate import generation_stream

from mlx_hiermem.errors import FormatError
from mlx_hiermem.refetch import KV_CACHES
from tests.topics import NEAR, A, B, C, follower, sources, tokens_of

PROMPT = "the gold of the north"
COUNT = 16


@pytest.fixture
def loans(lm, monkeypatch):
    """Watches the pool: a slot is given back by who has it, and only once."""
    pool, out = lm.bank._pool, []
    take, give_back = pool.take, pool.give_back

    def taken(wanted):
        slot = take(wanted)
        assert all(slot is not other for other in out)
        out.append(slot)
        return slot

    def given(slot):
        assert any(slot is other for other in out)
        out[:] = [other for other in out if other is not slot]
        give_back(slot)

    monkeypatch.setattr(pool, "take", taken)
    monkeypatch.setattr(pool, "give_back", given)
    return out


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_only_what_differs_is_read(lm, routes, loans, kv_cache):
    routes(A, NEAR, B)
    pieces = list(lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:4", kv_cache=kv_cache))
    assert sources(pieces[4]) == ["disk"] * 3
    assert sources(pieces[5]) == sources(pieces[8]) == ["kept", "kept", "disk"]
    assert sources(pieces[9]) == ["disk"] * 3
    assert [block.cluster for block in pieces[-1].fetch.blocks] == list(B)
    assert lm.bank.slots_made == 1 and not loans


def test_nothing_is_given_back_before_the_step_that_reads_it_is_done(lm, routes, monkeypatch):
    events, synchronize = [], mx.synchronize
    pool, give_back = lm.bank._pool, lm.bank._pool.give_back
    monkeypatch.setattr(
        mx, "synchronize", lambda stream: events.append(stream) or synchronize(stream)
    )
    monkeypatch.setattr(pool, "give_back", lambda slot: events.append("back") or give_back(slot))
    routes(A, B, C)
    list(lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:3"))
    routes(A, B, C)
    stream = lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:3")
    next(stream)
    stream.close()
    waited = [event is generation_stream for event in events[::2]]
    assert waited == [True] * 4 and events[1::2] == ["back"] * 4


def test_answers_that_take_turns_do_not_meet(lm, routes, loans, monkeypatch):
    plans = [(A, B, A, C), (B, NEAR, C), (C, A, NEAR, B), (A, NEAR)]
    expected = []
    for plan in plans:
        routes(*plan)
        expected.append(tokens_of(lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:3")))
    routers = [follower([], *plan) for plan in plans]
    streams = [lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:3") for _ in plans]
    found = [[] for _ in plans]
    for _ in range(COUNT):
        for router, stream, tokens in zip(routers, streams, found, strict=True):
            monkeypatch.setattr(lm, "route", router)
            tokens.append(next(stream).token)
    assert found == expected
    for stream in streams:
        assert next(stream, None) is None
    assert not loans


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("after", [1, 3, 4, 5, 9])
def test_a_stream_that_is_closed_gives_its_buffer_back(lm, routes, loans, after, kv_cache):
    routes(B)
    expected = lm.generate(PROMPT, max_tokens=COUNT)
    for _ in range(3):
        routes(A, B, C)
        stream = lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:3", kv_cache=kv_cache)
        for _ in range(after):
            next(stream)
        stream.close()
        assert not loans
        routes(B)
        assert lm.generate(PROMPT, max_tokens=COUNT) == expected
    assert lm.bank.slots_made == 1


@pytest.mark.parametrize("what", ["route", "fetch"])
def test_an_error_in_the_midst_ends_one_answer(lm, routes, loans, monkeypatch, what):
    routes(B)
    expected = lm.generate(PROMPT, max_tokens=COUNT)
    routes(A, B)
    calls, real = [], getattr(lm, what)

    def fails(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise FormatError("the disk is gone")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lm, what, fails)
        if what == "fetch":
            routes(A, B, C)
        pieces = []
        with pytest.raises(FormatError, match="the disk is gone"):
            for piece in lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:3"):
                pieces.append(piece)
    assert len(pieces) == 6
    assert len(loans) == (1 if what == "route" else 0)  # what is not given back is freed by itself
    routes(B)
    assert lm.generate(PROMPT, max_tokens=COUNT) == expected
    assert lm.prefetch("gold") is not None and not lm._running


def test_a_memory_of_nan_is_told_when_it_comes(lm, routes, monkeypatch):
    routes(A, B)
    real = lm._ready

    def ready(found):
        memory = real(found)
        return memory if found.report.blocks[0].cluster == A[0] else memory * mx.nan

    monkeypatch.setattr(lm, "_ready", ready)
    pieces = []
    with pytest.raises(FormatError, match="fetched memory on path 2,7,21 the model gives NaN"):
        for piece in lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:3"):
            pieces.append(piece)
    assert len(pieces) == 4
