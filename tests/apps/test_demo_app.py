"""The demo page's handlers: what hangs on a visitor's session, and what ends it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from apps.demo.app import Demo, _has_browser
from apps.demo.worker import Ask, End, ModelThread, Ticket
from mlx_hiermem import load
from tests.tiny import make_tiny_model

VISITOR, OTHER = SimpleNamespace(session_hash="a"), SimpleNamespace(session_hash="b")


@pytest.fixture
def demo(tmp_path, monkeypatch) -> Iterator[Demo]:
    folder = make_tiny_model(tmp_path)
    thread = ModelThread(lambda: load(folder))
    facts = thread.start()
    tickets = []
    submit = thread.submit
    monkeypatch.setattr(thread, "submit", lambda ask: tickets.append(submit(ask)) or tickets[-1])
    demo = Demo(thread, facts, "tiny")
    demo.tickets = tickets
    yield demo
    thread.close()


def end_of(ticket: Ticket) -> End:
    while not isinstance(last := ticket.take(60)[-1], End):
        pass
    return last


def test_a_visitor_who_leaves_is_withdrawn(demo):
    updates = demo.answer("Oslo", "fetched", 250, VISITOR)
    next(updates)
    updates.close()  # as Gradio does when the page is gone
    (ticket,) = demo.tickets
    assert ticket.withdrawn.is_set()
    assert end_of(ticket) == End("withdrawn")
    assert list(demo.answer("Rome", "none", 3, VISITOR))


def test_stop_ends_what_its_own_visitor_runs(demo):
    mine, theirs = (demo.answer("Oslo", "none", 250, one) for one in (VISITOR, OTHER))
    next(mine), next(theirs)
    demo.stop(VISITOR)
    assert [ticket.withdrawn.is_set() for ticket in demo.tickets] == [True, False]
    answer, _, send, stop = list(mine)[-1]
    assert "stopped" in answer
    assert send.interactive and not stop.interactive
    assert "length limit reached" in list(theirs)[-1][0]
    demo.stop(VISITOR)  # nothing runs any more


def test_a_prompt_of_megabytes_is_not_even_tokenized(demo):
    (shown,) = demo.answer("x" * 10_000_000, "fetched", 5, VISITOR)
    assert "the prompt has 10,000,000 characters" in shown[0]
    assert len(shown[0]) < 1000
    assert demo.tickets == []


def test_what_a_visitor_left_empty_is_an_error_in_the_page(demo):
    assert "the prompt is empty" in list(demo.answer(None, None, 5, VISITOR))[-1][0]
    assert "max_tokens is 0" in list(demo.answer("Oslo", "fetched", None, VISITOR))[-1][0]
    assert demo.thread.submit(Ask("Oslo", max_tokens=1)).take(60)


@pytest.mark.parametrize(
    ("system", "display", "found"),
    [("Linux", "", False), ("Linux", ":0", True), ("Darwin", "", True)],
)
def test_only_a_browser_with_windows_is_opened(monkeypatch, system, display, found):
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(sysname=system))
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert _has_browser() is found
