"""The server's benchmark counts what it says that it counts."""

from __future__ import annotations

import json

import pytest

from benchmarks import decode_models as models
from benchmarks import serve
from benchmarks.harness import main
from benchmarks.serve_clients import Question, Told, together
from benchmarks.serve_soak import soak
from mlx_hiermem.errors import HierMemError

QUESTIONS = [(Question(text, "none", 4), text.upper()) for text in ("abcd", "efgh", "ijkl")]


class Made:
    """A server that answers in capitals; some of its answers are wrong."""

    def __init__(self, wrong: dict[int, Told | Exception]) -> None:
        self.asked = 0
        self.left: list[int] = []
        self.wrong = wrong

    def ask(self, question: Question, vanish_after: int | None = None) -> Told:
        number, self.asked = self.asked, self.asked + 1
        if number in self.wrong:
            if isinstance(self.wrong[number], Exception):
                raise self.wrong[number]
            return self.wrong[number]
        text = question.text.upper()
        if vanish_after is not None:
            self.left.append(number)
            return Told(text[:vanish_after], vanish_after, 0.1, 0.2, ended=False)
        return Told(text, question.max_tokens, 0.1, 0.2)

    def resident(self) -> int:
        return 1000 + self.asked


def test_one_in_a_hundred_vanishes_and_all_are_counted():
    server = Made({})
    found = soak(server, QUESTIONS, 300, clients=1)
    assert server.left == [50, 150, 250]
    assert (found.answered, found.vanished, found.lost, found.mixed_up) == (297, 3, 0, 0)
    assert found.resident == tuple(1000 + n for n in range(30, 301, 30))


def test_what_is_lost_or_mixed_up_is_noticed():
    wrong = {
        3: HierMemError("gone"),
        4: Told("IJKL", 4, 0.1, 0.2),  # another's answer
        7: Told("EFGH", 0, 0.1, 0.2),  # broken off
        50: Told("X", 1, 0.1, 0.2, ended=False),  # vanished, with what another was told
    }
    found = soak(Made(wrong), QUESTIONS, 100, clients=1)
    assert (found.answered, found.vanished, found.lost, found.mixed_up) == (97, 1, 2, 2)
    assert found.reasons == ("HierMemError: gone", "")


def test_a_short_answer_is_no_measurement():
    with pytest.raises(HierMemError, match="3 tokens came where 4 were due"):
        together(Made({1: Told("ABC", 3, 0.1, 0.2)}), [question for question, _ in QUESTIONS])


def test_the_clients_ask_for_different_memories():
    sizes = models.sizes("160M", smoke=True)
    asked = serve.asked(sizes)
    assert len({one.memory[:-1] for one in asked["mixed"]}) == len(asked["mixed"]) == 8
    assert len({one.memory for one in asked["same"]}) == 1
    assert [one.text for one in asked["same"]] == [one.text for one in asked["mixed"]]
    assert asked["one"] == asked["mixed"][:1]


def test_a_smoke_run(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["--smoke", "--soak", "120", "--folder", str(tmp_path), "--json", str(file)]
    assert main(serve.NAME, serve.measure, arguments, serve.options) == 0
    rows = {row["id"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == [
        "serve.mixed_vs_same", "serve.batch_vs_one", "serve.first_token_p50",
        "serve.first_token_p99", "serve.wrong", "serve.memory",
    ]  # fmt: skip
    assert rows["serve.wrong"]["value"] == 0, rows["serve.wrong"]["detail"]
    assert "119 answered, 1 vanished" in rows["serve.wrong"]["detail"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_wrong_arguments(tmp_path, capsys):
    arguments = ["--smoke", "--folder", str(tmp_path / "none")]
    assert main(serve.NAME, serve.measure, arguments, serve.options) == 2
    assert "cannot be written" in capsys.readouterr().err
    arguments = ["--smoke", "--soak", "-1"]
    assert main(serve.NAME, serve.measure, arguments, serve.options) == 2
