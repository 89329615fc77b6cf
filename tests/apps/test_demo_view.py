"""The demo's HTML: what visitors and models write is text in it, and numbers are exact."""

from __future__ import annotations

import re

import pytest

from apps.demo import compare, hands_on, talk, view
from apps.demo.desk import Visitor
from apps.demo.facts import Facts, Held, Level
from apps.demo.meters import meters
from apps.demo.tickets import Ask, Began, End
from mlx_hiermem.bank.report import BlockReport, FetchReport
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.engine import Response
from mlx_hiermem.errors import PathError
from mlx_hiermem.routing.names import ClusterNames
from mlx_hiermem.routing.tree import ClusterPath

EVIL = "<script>alert('x')</script>${alert(1)}{{value}}\"'&"
FACTS = Facts(
    2_400_000, 64, (Level(1, 16, 1_234_567), Level(2, 256, 8_000)), 1_242_567, 21_801_072,
    anchor_bytes=9_600_000, names=ClusterNames([[EVIL[:40]] * 16]),
    config=MemoryConfig(ranks=(4, 2), branching=16),
)  # fmt: skip
BLOCKS = [
    BlockReport(1, 3, 1_234_567, 0.0104, "resident"),
    BlockReport(2, 50, 0, 0.5, "blocked", True),
]


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
        view.report(evil, FACTS),
        compare.side_by_side([evil, evil], FACTS),
        hands_on.change(state(response(text="x")), evil),
        hands_on.own(Visitor(frozenset({(1, 3)})), FACTS),
        hands_on.own(Visitor(), FACTS, EVIL),
        talk.conversation([evil], FACTS),
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


def test_the_meters_are_exact():
    began = Began(0.0123, Held(resident=2_000_000, cached=180_107, blocks=4, hits=3))
    text = text_of(meters(state(began, response()), FACTS))
    assert "1,234 tokens/s" in text
    assert "12.3 ms" in text
    assert "7 read, 2 written" in text
    assert "1.2 MB of 21.8 MB (5.66%)" in text
    assert "1 of 1 blocks; since the start 75%" in text  # the blocked one was not looked for
    assert "In memory 13.0 MB; the whole bank has 21.8 MB, of which 10.0% is in memory" in text
    assert "Cached 2.2 MB" in text and "On disk only 19.6 MB" in text
    assert meters(state(response()), FACTS) == meters(None, FACTS) == ""


def test_generic_and_off_say_so():
    blocks = [BlockReport(1, None, 96, 0.1, "disk")]
    generic = text_of(view.report(state(response("generic", None, blocks)), FACTS))
    assert "generic memory" in generic and "1 generic 96" in generic
    off = text_of(view.report(state(response("none", None, [])), FACTS))
    assert "nothing is fetched" in off and "Level" not in off


def test_the_status_follows_the_answer():
    waiting = state()
    assert waiting.status == "fetching"
    waiting.ahead = 2
    assert waiting.status == "waiting, 2 ahead of you"
    assert state(response()).status == "writing"
    assert state(response(), End("stop")).status == "end of text"
    assert state(response(), End("withdrawn")).status == "stopped"
    assert "data-state='running'" in view.answer(waiting)
    done = state(response(), End("length"))
    assert "data-state='running'" in view.answer(done)  # its levels are not lit up yet
    done.lit = 2
    assert "data-state='done'" in view.answer(done)


def test_words_that_differ():
    text, other = "the capital of  France is Paris.", "the capital of Norway is Oslo. "
    pieces = compare.differences(text, other)
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece.strip() for piece, differs in pieces if differs] == ["France", "Paris."]
    assert compare.differences(text, text) == [(text, False)]
    assert compare.marked("a <b>", "a") == "a <mark class='hm-differs'>&lt;b&gt;</mark>"
    assert compare.marked("", "a") == compare.marked("", "") == ""


def test_turns_say_what_stayed():
    def turn(*blocks: BlockReport) -> view.Answer:
        return state(response(blocks=list(blocks)), End("stop"))

    first = turn(BlockReport(1, 3, 9, 0.1, "disk"), BlockReport(2, 50, 9, 0.1, "disk"))
    second = turn(BlockReport(1, 3, 9, 0.0, "kept"), BlockReport(2, 51, 9, 0.1, "disk"))
    third = turn(BlockReport(1, 3, 9, 0.2, "disk"), BlockReport(2, 51, 0, 0.0, "blocked", True))
    html = talk.conversation([first, second, third], FACTS)
    changes = re.findall("data-change='([a-z ]*)'", html)
    assert changes == ["first", "first", "stayed", "changed", "read again", "changed"]
    assert html.count("<li class='hm-card") == 3
    assert talk.conversation([first] * 99, FACTS).count("<li class='hm-card") == talk.SHOWN


@pytest.mark.parametrize("text", ["3,50", " 3 → 50 ", "(3, 50)", "50"])
def test_paths_as_people_write_them(text):
    assert hands_on.parse_path(text, FACTS) == (3, 50)


@pytest.mark.parametrize("text", [None, "", "x", "4,50", "3,50,1", "256", "9" * 30, EVIL])
def test_what_is_no_path(text):
    with pytest.raises(PathError):
        hands_on.parse_path(text, FACTS)


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
