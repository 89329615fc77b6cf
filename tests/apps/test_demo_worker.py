"""The demo's model thread: one owner of MLX, answers through tickets, and nobody left waiting."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import pytest

from apps.demo.tickets import Ask, Began, End, Ticket
from apps.demo.worker import ModelThread
from mlx_hiermem import load
from mlx_hiermem.engine import MemoryLM, Response
from mlx_hiermem.errors import ConfigError
from tests.tiny import make_tiny_model

#: Seconds after which a test gives up on an answer of milliseconds.
PATIENCE = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def thread(folder) -> Iterator[ModelThread]:
    thread = ModelThread(lambda: load(folder))
    thread.start()
    yield thread
    thread.close()
    assert not thread.alive


def updates(ticket: Ticket) -> Iterator[Response | End]:
    """All that a ticket brings, to its end."""
    while True:
        batch = ticket.take(PATIENCE)
        assert batch, "no answer"
        yield from (update for update in batch if not isinstance(update, Began))
        if isinstance(batch[-1], End):
            return


def answer(ticket: Ticket) -> tuple[str, Response, End]:
    *responses, end = updates(ticket)
    return "".join(response.text for response in responses), responses[-1], end


def held_thread(
    folder, models: list[MemoryLM] | None = None
) -> tuple[ModelThread, threading.Event, threading.Event]:
    """A thread whose model stops before its first token until the second event is set.

    The first event is set when it gets there. ``models`` takes the model.
    """
    reached, go = threading.Event(), threading.Event()

    class Held(MemoryLM):
        def fetch(self, *args, **options):
            reached.set()
            assert go.wait(PATIENCE)
            return super().fetch(*args, **options)

    def load_held() -> MemoryLM:
        lm = load(folder)
        lm.__class__ = Held
        if models is not None:
            models.append(lm)
        return lm

    thread = ModelThread(load_held)
    thread.start()
    return thread, reached, go


def test_facts_are_those_of_the_bank(folder):
    config = load(folder).bank.config
    thread = ModelThread(lambda: load(folder))
    facts = thread.start()
    thread.close()
    assert [(level.level, level.clusters) for level in facts.levels] == [(1, 3), (2, 9)]
    assert [level.block_bytes for level in facts.levels] == [
        config.block_bytes(1),
        config.block_bytes(2),
    ]
    assert facts.fetch_bytes == 4 * config.fetch_size()
    assert facts.bank_bytes == 4 * config.bank_size()
    assert facts.context_length == 256
    assert facts.anchor_parameters > 10_000
    assert not facts.chat


def test_what_failed_to_load_is_raised_where_it_was_started(tmp_path):
    thread = ModelThread(lambda: load(tmp_path / "none"))
    with pytest.raises(ConfigError, match="none"):
        thread.start()
    assert not thread.alive
    assert answer_error(thread.submit(Ask("Oslo"))) == "the model could not be loaded"


def answer_error(ticket: Ticket) -> str | None:
    (end,) = updates(ticket)
    assert end.reason == "error"
    return end.error


@pytest.mark.parametrize("memory", ["fetched", "generic", "none"])
def test_an_answer_is_what_the_model_says(folder, thread, memory):
    expected = list(load(folder).stream("Oslo lies in", memory, max_tokens=20))
    text, last, end = answer(thread.submit(Ask("Oslo lies in", memory, 20)))
    assert text == "".join(response.text for response in expected)
    assert end == End("length")
    assert (last.memory, last.path) == (memory, expected[-1].path)
    assert [(b.level, b.cluster, b.bytes) for b in last.fetch.blocks] == [
        (b.level, b.cluster, b.bytes) for b in expected[-1].fetch.blocks
    ]


def test_requests_of_many_threads_do_not_mix(folder, thread):
    prompts = [f"Number {i} of {chr(97 + i) * 9}" for i in range(12)]
    lm = load(folder)
    expected = [lm.generate(prompt, max_tokens=12) for prompt in prompts]

    def ask(prompt: str) -> str:
        return answer(thread.submit(Ask(prompt, max_tokens=12)))[0]

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, prompts)) == expected
    assert len(set(expected)) > 6


def test_withdrawn_within_one_token(thread):
    ticket = thread.submit(Ask("Oslo", max_tokens=250))
    stream = updates(ticket)
    next(stream)
    thread.withdraw(ticket)
    # Those that were on their way, and one that was being computed.
    *rest, end = stream
    assert end == End("withdrawn")
    assert len(rest) < 200
    assert answer(thread.submit(Ask("Oslo", max_tokens=3)))[2] == End("length")


def test_withdrawn_in_the_line_ends_at_once(folder):
    thread, reached, go = held_thread(folder)
    first = thread.submit(Ask("Oslo", max_tokens=2))
    assert reached.wait(PATIENCE)
    second, third = (thread.submit(Ask(name, max_tokens=2)) for name in ("Rome", "Bonn"))
    assert [thread.ahead(ticket) for ticket in (first, second, third)] == [0, 1, 2]
    thread.withdraw(second)
    assert second.take(PATIENCE) == [End("withdrawn")]
    assert thread.ahead(third) == 1
    go.set()
    assert answer(first)[2] == answer(third)[2] == End("length")
    thread.withdraw(third)  # over already: nothing comes
    assert third.take(0) == []
    thread.close()


def test_an_error_ends_its_own_request(thread):
    assert answer_error(thread.submit(Ask(" "))).startswith("the prompt is empty")
    assert "257 tokens" in answer_error(thread.submit(Ask("x" * 257)))
    assert "max_tokens is 0" in answer_error(thread.submit(Ask("Oslo", max_tokens=0)))
    assert "memory is 'all'" in answer_error(thread.submit(Ask("Oslo", "all")))
    assert answer(thread.submit(Ask("Oslo", max_tokens=2)))[2] == End("length")


def test_together_a_token_of_each_in_turn(folder, thread):
    asks = [Ask("Oslo lies in", memory, 20) for memory in ("none", "generic", "fetched")]
    tickets = thread.submit_together(asks, "a")
    answers = [answer(ticket) for ticket in tickets]
    lm = load(folder)
    assert [text for text, *_ in answers] == [
        lm.generate("Oslo lies in", ask.memory, 20) for ask in asks
    ]
    # Cut off in the midst, all have got as far.
    tickets = thread.submit_together([replace(ask, max_tokens=250) for ask in asks], "a")
    assert tickets[0].take(PATIENCE)
    thread.call(lambda lm: [ticket.withdrawn.set() for ticket in tickets]).result(PATIENCE)
    lengths = [sum(1 for _ in updates(ticket)) for ticket in tickets]
    assert max(lengths) - min(lengths) <= 2 and max(lengths) < 240


def test_one_of_several_is_withdrawn_and_the_others_go_on(folder):
    thread, reached, go = held_thread(folder)
    first = thread.submit(Ask("Oslo", max_tokens=2), "a")
    assert reached.wait(PATIENCE)
    group = thread.submit_together([Ask("Rome", max_tokens=2), Ask("Bonn", max_tokens=2)], "b")
    thread.withdraw(group[0])
    thread.withdraw(group[0])
    assert group[0].take(PATIENCE) == [End("withdrawn")]
    go.set()
    assert answer(group[1])[2] == answer(first)[2] == End("length")
    assert group[0].take(0) == []
    thread.close()


def test_visitors_are_answered_in_turn(folder):
    thread, reached, go = held_thread(folder)
    thread.submit(Ask("Oslo", max_tokens=2), "a")
    assert reached.wait(PATIENCE)
    mine = [thread.submit(Ask(name, max_tokens=2), "a") for name in ("Rome", "Bonn")]
    theirs = thread.submit(Ask("Riga", max_tokens=2), "b")
    assert [thread.ahead(ticket) for ticket in (*mine, theirs)] == [1, 3, 2]
    thread.forget("a")
    assert [ticket.take(PATIENCE) for ticket in mine] == [[End("withdrawn")]] * 2
    assert thread.ahead(theirs) == 1
    go.set()
    assert answer(theirs)[2] == End("length")
    thread.close()


def test_calls_come_between_two_tokens(thread):
    ticket = thread.submit(Ask("Oslo", max_tokens=250))
    stream = updates(ticket)
    next(stream)
    assert thread.call(lambda lm: lm.bank.config.branching).result(PATIENCE) == 3
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda lm: 1 // 0).result(PATIENCE)
    assert list(stream)[-1] == End("length")
    thread.close()
    with pytest.raises(RuntimeError, match="closed"):
        thread.call(lambda lm: None).result(PATIENCE)


def test_conversations_are_kept_by_visitor(tmp_path):
    chat = make_tiny_model(tmp_path)
    config = json.loads((chat / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    (chat / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    thread = ModelThread(lambda: load(chat))
    thread.start()

    def turn(text: str, visitor: str) -> int:
        return answer(thread.submit(Ask(text, max_tokens=4, turn=True), visitor))[1].prompt_tokens

    alone = turn("Oslo", "a")
    assert turn("Oslo", "b") == alone
    assert turn("Rome", "a") == alone * 2 + 5  # it sees the turn before, of four tokens in brackets
    thread.forget("a")
    assert turn("Rome", "a") == alone
    assert thread.conversations() == 2
    thread.close()
    assert thread.conversations() == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_ends_its_own_request(folder, capsys):
    class Faulty(MemoryLM):
        def route(self, text):
            if text == "fault":
                raise KeyError("lost")
            if text == "death":
                raise SystemExit
            return super().route(text)

    def load_faulty() -> MemoryLM:
        lm = load(folder)
        lm.__class__ = Faulty
        return lm

    thread = ModelThread(load_faulty)
    thread.start()
    assert answer_error(thread.submit(Ask("fault"))).startswith("KeyError (a fault of ours")
    assert "KeyError: 'lost'" in capsys.readouterr().err  # who runs the server sees all of it
    assert answer(thread.submit(Ask("Oslo", max_tokens=2)))[2] == End("length")
    # If the thread itself ends, those in the line and those who come later are told.
    assert "thread has ended" in answer_error(thread.submit(Ask("death")))
    assert "thread has ended" in answer_error(thread.submit(Ask("Oslo")))
    thread.close()
    assert not thread.alive


def test_close_ends_what_runs_and_what_waits(folder):
    models: list[MemoryLM] = []
    thread, reached, go = held_thread(folder, models)
    first, second = (thread.submit(Ask(name, max_tokens=250)) for name in ("Oslo", "Rome"))
    assert reached.wait(PATIENCE)
    go.set()
    thread.close()
    assert list(updates(first))[-1] == End("withdrawn")
    assert answer_error(second) == "the model was closed"
    assert not thread.alive
    assert models[0].bank._closed


def test_a_chat_model_is_asked_through_its_template(folder, tmp_path):
    chat = make_tiny_model(tmp_path)
    config = json.loads((chat / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    (chat / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    thread = ModelThread(lambda: load(chat))
    assert thread.start().chat
    text, last, _ = answer(thread.submit(Ask("Oslo", max_tokens=8)))
    expected = list(load(folder).stream("[Oslo]>", max_tokens=8, route_on="Oslo"))
    assert text == "".join(response.text for response in expected)
    assert last.path == expected[-1].path
    thread.close()


def test_the_thread_clears_its_streams(folder, monkeypatch):
    # Or MLX aborts, now and then, when the process ends right after the thread.
    clear, threads = mx.clear_streams, []
    monkeypatch.setattr(
        mx, "clear_streams", lambda: (threads.append(threading.current_thread().name), clear())
    )
    thread = ModelThread(lambda: load(folder))
    thread.start()
    assert answer(thread.submit(Ask("Oslo", max_tokens=2)))[2] == End("length")
    assert threads == []
    thread.close()
    assert threads == ["model"]


def test_visitors_see_no_folder(folder, tmp_path, capsys):
    """Of an error that names files, as that of a bank without a tree does."""
    private = shutil.copytree(folder, tmp_path / "of somebody" / "tiny")

    def load_without_tree() -> MemoryLM:
        lm = load(private)
        lm.tree = lm.encoder = None
        return lm

    thread = ModelThread(load_without_tree, [str(private)])
    thread.start()
    told = answer_error(thread.submit(Ask("Oslo")))
    assert "this bank has no tree" in told and "/" not in told.partition(";")[0], told
    assert str(tmp_path) not in told and "somebody" not in told
    assert str(private) in capsys.readouterr().err
    thread.close()
