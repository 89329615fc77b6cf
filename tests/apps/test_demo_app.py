"""The demo page's handlers: what hangs on a visitor's session, and what ends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

from apps.demo.app import _has_browser
from apps.demo.ask_tab import AskTab
from apps.demo.controls import updates
from apps.demo.desk import Desk
from apps.demo.hands_on_tab import HandsOnTab
from apps.demo.talk_tab import TalkTab
from apps.demo.tickets import Ask, End, Ticket
from apps.demo.worker import ModelThread
from mlx_hiermem import cli, load
from tests.tiny import make_tiny_model

VISITOR, OTHER = SimpleNamespace(session_hash="a"), SimpleNamespace(session_hash="b")


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Iterator[Desk]:
    folder = make_tiny_model(tmp_path)
    thread = ModelThread(lambda: load(folder))
    facts = thread.start()
    tickets = []
    submit = thread.submit_together
    monkeypatch.setattr(
        thread,
        "submit_together",
        lambda *given: tickets.extend(made := submit(*given)) or made,
    )
    desk = Desk(thread, facts, "tiny")
    desk.tickets = tickets
    yield desk
    thread.close()


def end_of(ticket: Ticket) -> End:
    while not isinstance(last := ticket.take(60)[-1], End):
        pass
    return last


def last_answer(shown: Iterator[tuple]) -> str:
    """The newest answer of what a tab yields."""
    return [update[0] for update in shown if isinstance(update[0], str)][-1]


def click(level: object, cluster: object) -> gr.EventData:
    return gr.EventData(None, {"level": level, "cluster": cluster})


def test_a_visitor_who_leaves_is_withdrawn(desk):
    answers = AskTab(desk).answer("Oslo", "fetched", 250, VISITOR)
    next(answers)
    answers.close()  # as Gradio does when the page is gone
    (ticket,) = desk.tickets
    assert ticket.withdrawn.is_set()
    assert end_of(ticket) == End("withdrawn")
    assert list(AskTab(desk).answer("Rome", "none", 3, VISITOR))


def test_nothing_is_left_of_a_visitor_who_leaves(desk):
    HandsOnTab(desk).click(click(1, 2), VISITOR)
    list(TalkTab(desk).answer("Oslo", 3, VISITOR))
    list(TalkTab(desk).answer("Oslo", 3, OTHER))
    waiting = AskTab(desk).answer("Oslo", "none", 250, VISITOR)
    next(waiting)
    assert desk.thread.conversations() == 2
    desk.leave("a")
    assert desk.tickets[-1].withdrawn.is_set()
    assert set(desk.visitors) == {"b"}
    desk.thread.call(lambda lm: None).result()
    assert desk.thread.conversations() == 1
    assert desk.visitor("a").blocked == frozenset()


def test_stop_ends_what_its_own_visitor_runs(desk):
    tab = AskTab(desk)
    mine, theirs = (tab.answer("Oslo", "none", 250, one) for one in (VISITOR, OTHER))
    next(mine), next(theirs)
    desk.stop("a", "compare")  # nothing runs there
    assert not desk.tickets[0].withdrawn.is_set()
    desk.stop("a", "ask")
    assert [ticket.withdrawn.is_set() for ticket in desk.tickets] == [True, False]
    *_, (*parts, send, stop) = mine
    assert "stopped" in parts[0]
    assert send.interactive and not stop.interactive
    assert "length limit reached" in last_answer(theirs)
    desk.stop("a", "ask")  # nothing runs any more


def test_blocks_and_pins_are_in_the_requests_of_their_visitor(desk):
    tab = HandsOnTab(desk)
    tab.click(click(1, 2), VISITOR)
    tab.click(click(2, 8), VISITOR)
    tab.pin("2,8", VISITOR)
    assert desk.ask("a", "Oslo", "fetched", 5) == Ask(
        "Oslo", (2, 8), 5, frozenset({(1, 2), (2, 8)})
    )
    assert desk.ask("a", "Oslo", "generic", 5) == Ask("Oslo", "generic", 5)
    assert desk.ask("b", "Oslo", "fetched", 5) == Ask("Oslo", "fetched", 5)
    tab.click(click(1, 2), VISITOR)
    assert desk.visitor("a").blocked == {(2, 8)}
    tab.reset(VISITOR)
    assert desk.ask("a", "Oslo", "fetched", 5) == Ask("Oslo", "fetched", 5)


@pytest.mark.parametrize("sent", [(1, 3), (3, 0), (0, 0), (1, -1), ("1", 2), (1, None), (True, 0)])
def test_a_browser_may_send_what_it_likes(desk, sent):
    shown, *_ = HandsOnTab(desk).click(click(*sent), VISITOR)
    assert "cannot be switched" in shown
    assert desk.visitor("a").blocked == frozenset()


def test_an_answer_without_a_block_and_the_one_before(desk):
    tab = HandsOnTab(desk)
    plain = last_answer(tab.answer("Oslo", 20, VISITOR))
    assert "hm-differs" not in plain
    path = desk.visitor("a").shown["hands"].last.path.ids
    assert list(tab.again(20, VISITOR)) == [(gr.skip(),) * 5]  # nothing has changed
    tab.click(click(1, path[0]), VISITOR)
    changed = last_answer(tab.again(20, VISITOR))
    assert "data-when='before'" in changed and "hm-differs" in changed
    assert desk.visitor("a").shown["hands"].last.fetch.blocks[0].source == "blocked"


def test_a_newer_answer_takes_the_place_of_an_older_one(desk):
    tab = HandsOnTab(desk)
    older = tab.answer("Oslo", 250, VISITOR)
    next(older)
    newer = tab.answer("Rome", 3, VISITOR)
    next(newer)
    assert list(older) == []  # it draws nothing over the newer one
    assert "Rome" in last_answer(newer)


def test_a_prompt_of_megabytes_is_not_even_tokenized(desk):
    (shown,) = AskTab(desk).answer("x" * 10_000_000, "fetched", 5, VISITOR)
    assert "the prompt has 10,000,000 characters" in shown[0]
    assert len(shown[0]) < 1000
    assert desk.tickets == []


def test_what_a_visitor_left_empty_is_an_error_in_the_page(desk):
    tab = AskTab(desk)
    assert "the prompt is empty" in last_answer(tab.answer(None, None, 5, VISITOR))
    assert "max_tokens is 0" in last_answer(tab.answer("Oslo", "fetched", None, VISITOR))
    assert end_of(desk.thread.submit(Ask("Oslo", max_tokens=1))) == End("length")


def test_only_what_changes_is_sent():
    shown = list(updates([("a", "x", True), ("b", "x", True), ("b", "x", True), ("b", "y", False)]))
    assert [update[:2] for update in shown] == [
        ("a", "x"), ("b", gr.skip()), (gr.skip(), "y"),
    ]  # fmt: skip
    assert [update[2] == gr.skip() for update in shown] == [False, True, False]


@pytest.mark.parametrize(
    ("system", "display", "found"),
    [("Linux", "", False), ("Linux", ":0", True), ("Darwin", "", True)],
)
def test_only_a_browser_with_windows_is_opened(monkeypatch, system, display, found):
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(sysname=system))
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert _has_browser() is found


def test_levels_elsewhere_are_verified_too(tmp_path, monkeypatch):
    """By the command line, whose folders are texts."""
    from mlx_hiermem.apps.demo import app

    folder, other = make_tiny_model(tmp_path / "m"), tmp_path / "disk"
    other.mkdir()
    for path in (folder / "memory").glob("level-2-*"):
        path.rename(other / path.name)
    places: list[Path] = []

    def serve(demo: app.Demo, *_: object) -> None:
        reader = demo._verification._open()
        places.extend(reader.place(level) for level in (1, 2))
        reader.close()

    monkeypatch.setattr(app, "serve", serve)
    line = ["demo", "--model", str(folder), "--level-folder", f"2={other}", "--port", "0"]
    assert cli.main(line) == 0
    assert places == [folder / "memory", other]
