"""How the server ends: by a signal, or with its model."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.serving.processes import QUESTION, Served, asking
from tests.serving.test_http_protocol import refused
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("end") / "tiny")


def until_closed(served: Served) -> None:
    """Wait until it takes no more requests."""
    while True:
        try:
            served.http.get(f"{served.url}/health")
        except httpx.TransportError:
            return


def test_a_signal_lets_answers_finish(model, tmp_path):
    with Served(model, tmp_path) as served:
        with served.held(3):
            with served.http.stream(
                "POST", f"{served.v1}/completions", json={**QUESTION, "stream": True}
            ) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                served.signal(signal.SIGTERM)
                until_closed(served)
                served.signal(signal.SIGTERM)
                time.sleep(0.5)  # uvicorn waits a tenth of a second for answers in any case
                assert served.process.poll() is None
                served.release()
                told = [line for line in lines if line]
        assert told[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in told[-2]
        assert served.wait() == 0
        assert "Traceback" not in served.log


def test_a_shutdown_has_a_limit(model, tmp_path):
    with Served(model, tmp_path, "--shutdown-timeout", "0.2", "--host", "0.0.0.0") as served:
        assert "warning: 0.0.0.0 lets others in" in served.log
        with served.held(), asking(served, 1) as answers:
            served.until("requests_running", 1)
            served.signal(signal.SIGINT)
            assert served.wait() == 0
        assert refused(answers[0].result(), 503)["code"] == "server_stopped"


def test_a_second_interrupt_waits_for_nothing(model, tmp_path):
    with Served(model, tmp_path, "--shutdown-timeout", "1000") as served:
        with served.held(3):
            with served.http.stream(
                "POST", f"{served.v1}/completions", json={**QUESTION, "stream": True}
            ) as answer:
                lines = answer.iter_lines()
                next(lines)
                served.signal(signal.SIGINT)
                until_closed(served)
                served.signal(signal.SIGINT)
                with pytest.raises(httpx.TransportError):
                    list(lines)
            assert served.wait() == 0


def test_a_process_whose_model_dies_says_so_and_ends(model, tmp_path):
    with Served(model, tmp_path, "--max-concurrent", "1") as served:
        with served.held(), asking(served, 2) as answers:
            served.until("requests_running", 1)
            served.until("requests_waiting", 1)
            served.die()
            told = [answer.result() for answer in answers]
        for answer in told:
            assert refused(answer, 503)["code"] == "server_stopped"
        assert served.wait() == 1
        assert "the model has stopped: told to in" in served.log
