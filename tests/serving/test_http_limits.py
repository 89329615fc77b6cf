"""What the server refuses, and how it says so."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_hiermem.serving.job import Failed, Finished, Job, Piece, Started
from mlx_hiermem.serving.streaming import Following
from tests.serving.fakes import FETCH, Asker, hello
from tests.serving.processes import LONG, QUESTION, Served, ask, asking
from tests.serving.test_http_protocol import refused
from tests.tiny import make_tiny_model

JSON = {"content-type": "application/json"}
EXPECT = {"expect": "100-continue"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("limits") / "tiny")


@pytest.fixture(scope="module")
def small(model, tmp_path_factory) -> Iterator[Served]:
    """A server with little room."""
    options = ("--max-concurrent", "1", "--max-waiting", "1", "--max-body", "20000")
    with Served(model, tmp_path_factory.mktemp("small"), *options) as served:
        yield served


# ---- room ------------------------------------------------------------------------------


def test_503_when_full_and_nothing_is_lost(small):
    with small.held():
        with asking(small, 1) as running:
            small.until("requests_running", 1)
            with asking(small, 1) as waiting:
                small.until("requests_waiting", 1)
                for stream in (False, True):
                    answer = ask(small, stream=stream)
                    error = refused(answer, 503)
                    assert error["code"] == "server_busy"
                    assert int(answer.headers["retry-after"]) >= 1
                # Others than completions are answered meanwhile.
                assert small.http.get(f"{small.url}/health").status_code == 200
                small.release()
    texts = [one.result().json()["choices"][0]["text"] for one in (*running, *waiting)]
    assert texts[0] == texts[1] != ""


def test_prompts_of_a_list_go_in_together_or_not_at_all(small):
    before = small.metric("scheduler_finished_cancelled")
    with small.held():
        with asking(small, 1) as running:
            small.until("requests_running", 1)
            refused(ask(small, prompt=["one", "two", "three"]), 503)
            assert small.metric("requests_waiting") == 0
            small.release()
    assert running[0].result().status_code == 200
    assert small.metric("scheduler_finished_cancelled") == before + 1


def test_413(small):
    # The large ones are still being sent when the answer is there, which a reset would drop.
    for size in (20_001, 200_000, *[10_000_000] * 8):
        answer = small.http.post(f"{small.v1}/completions", content=b" " * size, headers=JSON)
        assert "20000 bytes" in refused(answer, 413)["message"]

    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    answer = small.http.post(f"{small.v1}/completions", content=chunks(), headers=JSON)
    refused(answer, 413)
    body = json.dumps(QUESTION).encode()
    answer = small.http.post(f"{small.v1}/completions", content=body.ljust(20_000), headers=JSON)
    assert answer.status_code == 200


def told_raw(served: Served, data: bytes) -> tuple[bytes, bytes]:
    """The head, in lower case, and the body that come back for these bytes, until the end."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), LONG) as raw, raw.makefile("rb") as file:
        raw.sendall(data)
        head, _, body = file.read().partition(b"\r\n\r\n")
    return head.lower(), body


def test_a_body_that_is_announced_as_too_large_is_not_asked_for(small):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    asks = b"content-length: 20001\r\nexpect: 100-Continue\r\n\r\n"
    head, body = told_raw(small, head + asks)
    assert head.startswith(b"http/1.1 413 ") and b"20000 bytes" in body
    answer = small.http.post(f"{small.v1}/completions", json=QUESTION, headers=EXPECT)
    assert answer.status_code == 200


def test_broken_requests_break_nothing(small):
    for data in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n"):
        head, body = told_raw(small, data)
        assert head.startswith(b"http/1.1 400 ") and b"content-type: application/json" in head
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), LONG) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\n")
    assert ask(small).status_code == 200
    assert "Traceback" not in small.log


# ---- who may ask -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> Asker:
    return Asker(api_key="sekrit", allow_origins=("http://localhost:3000",))


@pytest.mark.parametrize(
    "header",
    [None, "", "sekrit", "Bearer", "Bearer ", "Bearer sekrit2", "Basic sekrit", "Bearer \xe9"],
)
def test_401(locked, header):
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics")):
        answer = locked.ask(method, path, headers=headers)
        assert refused(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "sekrit" not in answer.text
        assert "connection" not in answer.headers  # or else one that still sends would not hear it
    assert locked.ask("GET", "/nowhere", headers=headers).status_code == 401
    assert locked.ask("GET", "/health", headers=headers).status_code == 200


def test_the_key_opens(locked):
    for key in ("Bearer sekrit", "bearer sekrit "):
        headers = {"authorization": key}
        assert locked.ask("GET", "/v1/models", headers=headers).status_code == 200


def test_web_pages_may_not_ask_unless_allowed(locked):
    free = Asker()
    headers = {"origin": "http://evil.example"}
    assert refused(free.ask("GET", "/v1/models", headers=headers), 403)
    answer = free.ask("POST", "/v1/completions", json=QUESTION, headers=headers)
    assert refused(answer, 403)["code"] == "origin_not_allowed"
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = {
        "origin": "http://localhost:3000", "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }  # fmt: skip
    assert free.ask("OPTIONS", "/v1/completions", headers=preflight).status_code == 403
    answer = locked.ask("OPTIONS", "/v1/completions", headers=preflight)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    good = {"origin": "http://localhost:3000", "authorization": "Bearer sekrit"}
    assert locked.ask("GET", "/v1/models", headers=good).status_code == 200
    assert locked.ask("GET", "/v1/models", headers={**good, **headers}).status_code == 403
    assert Asker(allow_origins=("*",)).ask("GET", "/health", headers=headers).status_code == 200


def test_too_many_open_requests_are_not_even_read():
    asker = Asker(max_open=0)
    assert refused(asker.complete(), 503)["code"] == "server_busy"
    assert asker.ask("GET", "/health").status_code == 200


# ---- time ------------------------------------------------------------------------------


def test_answers_and_bodies_have_a_time(model, tmp_path):
    with Served(model, tmp_path, "--timeout", "0.5", "--log-level", "error") as served:
        with served.held():
            answer = ask(served)
            assert refused(answer, 504)["code"] == "timeout"
            assert answer.headers["x-should-retry"] == "false"
            refused(ask(served, stream=True), 504)
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), LONG) as raw:
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n"
            raw.sendall(f"{head}content-type: application/json\r\n\r\n{{".encode())
            assert raw.recv(100).startswith(b"HTTP/1.1 408")
        # What timed out has left the batch.
        served.until_is("requests_running", 0)


@pytest.fixture
def unwatched(monkeypatch) -> None:
    """No request is ended for its client having gone, which the client of these tests is at once
    when it has its answer."""
    monkeypatch.setattr(Following, "watch", lambda following, receive: None)


def slowly(job: Job) -> Iterator[Started | Piece]:
    """An answer that never ends."""
    yield Started(None, "none", {"bytes": 0, "ms": 0.0, "blocks": []}, 0, 1)
    while True:
        yield Piece("x")
        time.sleep(0.01)


def test_a_stream_that_has_begun_ends_with_an_error(unwatched):
    asker = Asker(slowly, timeout=0.2)
    answer = asker.complete(stream=True)
    assert answer.status_code == 200
    *_, last, empty = answer.text.split("\n\n")
    assert empty == "" and json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert asker.scheduler.handles[0].ended.is_set()


# ---- faults ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failed, status, code",
    [
        (Failed("no such path: /srv/models/tiny/memory", client_error=True), 400, None),
        (Failed("too late", timed_out=True), 504, "timeout"),
        (Failed("NaN in /srv/models/tiny/memory"), 500, "generation_failed"),
    ],
)
def test_answers_that_fail(failed, status, code):
    asker = Asker(lambda job: iter([failed]))
    for stream in (False, True):
        error = refused(asker.complete(stream=stream), status)
        assert error["code"] == code and "/srv" not in error["message"]

    def late(job: Job) -> Iterator[Started | Failed]:
        yield Started(None, "none", FETCH, 0, 1)
        yield failed

    answer = Asker(late).complete(stream=True)
    assert answer.text.count("data: ") == 2 and '"error"' in answer.text


def test_folders_with_spaces_are_not_named_either():
    failed = Failed("/srv/my models/tiny: gone", client_error=True)
    asker = Asker(lambda job: iter([failed]), roots=("/srv/my models/tiny",))
    assert refused(asker.complete())["message"] == "the model's files: gone"


def test_one_prompt_of_several_that_fails_ends_the_others(unwatched):
    def script(job: Job) -> Iterator[object]:
        return iter([Failed("bad", client_error=True)]) if job.text == "b" else slowly(job)

    asker = Asker(script)

    async def ask_both() -> None:  # a loop that ends would end them too
        refused(await asker.send("POST", "/v1/completions", json={"prompt": ["a", "b"]}))
        assert asker.scheduler.handles[0].ended.is_set()

    asyncio.run(ask_both())


@pytest.mark.parametrize("events", [[], [Started(None, "none", FETCH, 0, 1)]])
def test_events_that_break_off(events):
    asker = Asker(lambda job: iter(events))
    refused(asker.complete(), 500)


def test_events_that_raise():
    def script(job: Job) -> Iterator[object]:
        yield Started(None, "none", FETCH, 0, 1)
        raise OSError("/srv/models/tiny is gone")

    error = refused(Asker(script).complete(), 500)
    assert "/srv" not in error["message"]


def test_a_fault_of_the_server_has_a_shape_too():
    asker = Asker()
    asker.scheduler.tokenize = None
    error = refused(asker.complete(), 500)
    assert error["code"] == "fault" and "NoneType" not in error["message"]


def test_a_dead_thread_is_told():
    asker = Asker()
    asker.scheduler.alive = False
    for answer in (asker.complete(), asker.chat(stream=True), asker.ask("GET", "/health")):
        assert refused(answer, 503)["code"] == "server_stopped"
        assert int(answer.headers["retry-after"]) >= 1
    assert "mlx_hiermem_alive 0" in asker.ask("GET", "/metrics").text


def test_a_thread_that_ends_in_silence_is_noticed():
    asker, silent = Asker(), threading.Event()

    def script(job: Job) -> Iterator[object]:
        asker.scheduler.alive = False
        silent.wait(LONG)
        return iter([])

    asker.scheduler.script = lambda job: (event for _ in [0] for event in script(job))
    try:
        assert refused(asker.complete(), 503)["code"] == "server_stopped"
    finally:
        silent.set()


def test_a_chat_without_a_template_is_its_question():
    asker = Asker(hello)
    asker.facts.has_chat_template = False
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "gold is"}]
    asker.chat(messages=messages)
    assert bytes(asker.scheduler.job.tokens) == b"gold is"


def test_finished_is_what_ends_an_answer():
    # A scheduler that cancels, as when the server ends, still gives a whole answer.
    asker = Asker(lambda job: iter([Started(None, "none", FETCH, 0, 1), Finished("cancelled", 1)]))
    assert asker.complete().json()["choices"][0]["finish_reason"] == "cancelled"
