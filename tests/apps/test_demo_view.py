"""The demo's HTML: what visitors and models write is text in it, and numbers are exact."""

from __future__ import annotations

import re

import pytest

from apps.demo import view
from apps.demo.worker import Ask, End, Facts, Level
from mlx_hiermem.bank.report import BlockReport, FetchReport
from mlx_hiermem.engine import Response
from mlx_hiermem.routing.tree import ClusterPath

FACTS = Facts(2_400_000, 64, (Level(1, 16, 1_234_567), Level(2, 256, 8_000)), 1_242_567, 21_801_072)
BLOCKS = [
    BlockReport(1, 3, 1_234_567, 0.0104, "resident"),
    BlockReport(2, 50, 0, 0.5, "blocked", True),
]
EVIL = "<script>alert('x')</script>${alert(1)}{{value}}\"'&"


def response(memory="fetched", path=(3, 50), blocks=BLOCKS, text=" 72") -> Response:
    return Response(
        text=text,
        token=1,
        memory=memory,
        path=ClusterPath(path, ()) if path else None,
        fetch=FetchReport(blocks, ms=sum(block.ms for block in blocks)),
        prompt_tokens=7,
        prompt_tps=100.0,
        generation_tokens=2,
        tokens_per_second=1234.5,
        peak_memory=0,
        finish_reason=None,
    )


def state(*updates, prompt="hafnium is") -> view.Answer:
    answer = view.Answer(Ask(prompt))
    for update in updates:
        answer.update(update)
    return answer


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_what_is_written_is_text():
    evil = state(response(text=EVIL), prompt=EVIL)
    for html in (
        view.answer(evil),
        view.answer(state(End("error", EVIL))),
        view.head(EVIL, FACTS),
    ):
        assert "<script" not in html
        assert "&lt;script&gt;" in html


def test_an_error_is_one_line_and_clears_the_report():
    failed = state(response(), End("error", "the prompt\nis empty"))
    assert text_of(view.answer(failed)) == "the prompt is empty"
    assert view.report(failed, FACTS) == ""


def test_the_report_is_exact():
    html = view.report(state(response()), FACTS)
    assert "data-path='3,50'" in html
    text = text_of(html)
    assert "1 3 1,234,567 0.010 resident no" in text
    assert "2 50 0 0.500 blocked yes" in text
    assert "Total 1,234,567 0.510" in text
    assert "1,234 tokens/s" in text
    assert "7 read, 2 written" in text
    assert "1.2 MB of 21.8 MB (5.66%)" in text


def test_generic_and_off_say_so():
    blocks = [BlockReport(1, None, 96, 0.1, "disk")]
    generic = text_of(view.report(state(response("generic", None, blocks)), FACTS))
    assert "generic memory" in generic and "1 generic 96" in generic
    off = text_of(view.report(state(response("none", None, [])), FACTS))
    assert "nothing is fetched" in off and "0 bytes of 21.8 MB" in off and "Level" not in off


def test_the_status_follows_the_answer():
    waiting = state()
    assert waiting.status == "fetching"
    waiting.ahead = 2
    assert waiting.status == "waiting, 2 ahead"
    assert state(response()).status == "writing"
    assert state(response(), End("stop")).status == "end of text"
    assert state(response(), End("withdrawn")).status == "stopped"
    assert "data-state='running'" in view.answer(waiting)
    assert "data-state='done'" in view.answer(state(response(), End("length")))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB"),
     (999_950, "1.0 MB"), (9_200_000_000, "9.2 GB"), (3 * 10**15, "3000.0 TB")],
)  # fmt: skip
def test_size(number, text):
    assert view.size(number) == text


def test_count():
    assert [view.count(n) for n in (7, 13_500, 2_400_000, 4_600_000_000)] == [
        "7", "13.5k", "2.4M", "4.6B",
    ]  # fmt: skip
