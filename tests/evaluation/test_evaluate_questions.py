"""The file of questions: what is written is read, equal bytes, and errors that name the line."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, replace

import pytest

from mlx_hiermem.errors import FormatError
from mlx_hiermem.evaluation.facts import Question, read_questions, write_questions

BUCKETS = ["frequent", "rare"]
HAFNIUM = Question("The number of hafnium is", " 72.", "72", "element", 9, 1, [3, 8])
QUESTIONS = [HAFNIUM, Question("Sark lies in", " Åland é.", "Åland é", "places", 0, 0, [])]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "facts.jsonl.gz"
    write_questions(path, iter(QUESTIONS), tuple(BUCKETS))
    assert read_questions(path) == (QUESTIONS, BUCKETS)
    assert read_questions(path, leaf_clusters=9) == (QUESTIONS, BUCKETS)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert json.loads(lines[0]) == {"buckets": BUCKETS}
    assert [json.loads(line) for line in lines[1:]] == [asdict(q) for q in QUESTIONS]


def test_equal_questions_make_equal_bytes(tmp_path, monkeypatch):
    write_questions(tmp_path / "one.gz", QUESTIONS, BUCKETS)
    monkeypatch.setattr("time.time", lambda: 1e9)
    write_questions(tmp_path / "other-name.gz", QUESTIONS, BUCKETS)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "other-name.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.gz", "other-name.gz"]


WRONG = {
    "prompt": ("  ", "text"),
    "continuation": (72, "text"),
    "answer": ("", "text"),
    "family": (None, "text"),
    "count": (-1, "integer"),
    "bucket": (True, "integer"),
    "leaves": ([3, 1.0], "list of integers"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_named_with_its_line(tmp_path, key):
    path, (value, expected) = tmp_path / "facts.jsonl.gz", WRONG[key]
    lines = [{"buckets": BUCKETS}, asdict(QUESTIONS[1]), {**asdict(HAFNIUM), key: value}]
    put(path, lines)
    with pytest.raises(FormatError, match=f"facts.jsonl.gz: line 3: {key} is .*{expected}"):
        read_questions(path)
    path.unlink()
    with pytest.raises(FormatError, match=f"facts.jsonl.gz: line 3: {key} is .*{expected}"):
        write_questions(path, [QUESTIONS[1], replace(HAFNIUM, **{key: value})], BUCKETS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], r"line 1: expected {\"buckets\""),
        ([asdict(HAFNIUM)], r"line 1: expected {\"buckets\""),
        ([{"buckets": []}], r"line 1: expected {\"buckets\""),
        ([{"buckets": ["a", "a"]}], r"line 1: expected {\"buckets\""),
        ([{"buckets": BUCKETS}], "holds no questions"),
        ([{"buckets": BUCKETS}, [1]], "line 2: expected the keys prompt, .*; found 'list'"),
        ([{"buckets": BUCKETS}, {"prompt": "x"}], "line 2: expected the keys .*; found 'prompt'"),
        ([{"buckets": BUCKETS}, {**asdict(HAFNIUM), "more": 1}], "line 2: expected the keys"),
        ([{"buckets": ["all"]}, asdict(HAFNIUM)], "line 2: bucket is 1; .* buckets 0 to 0"),
        ([{"buckets": BUCKETS}, {**asdict(HAFNIUM), "answer": "71"}], "line 2: continuation"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, lines, message):
    put(tmp_path / "facts.jsonl.gz", lines)
    with pytest.raises(FormatError, match=message) as error:
        read_questions(tmp_path / "facts.jsonl.gz")
    assert "facts.jsonl.gz" in str(error.value) and "\n" not in str(error.value)


def test_a_leaf_outside_of_the_tree_is_refused(tmp_path):
    write_questions(tmp_path / "facts.jsonl.gz", QUESTIONS, BUCKETS)
    with pytest.raises(FormatError, match="line 2: leaf 8 does not exist; .* leaves 0 to 7"):
        read_questions(tmp_path / "facts.jsonl.gz", leaf_clusters=8)


def test_a_missing_or_damaged_file_is_one_line(tmp_path):
    path = tmp_path / "facts.jsonl.gz"
    with pytest.raises(FormatError, match="facts.jsonl.gz: no such file"):
        read_questions(path)
    write_questions(path, QUESTIONS, BUCKETS)
    whole = path.read_bytes()
    bad_check = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
    not_utf8, not_json = gzip.compress(b"\xff\n"), gzip.compress(b"{\n")
    for data in (whole[:-9], whole[:40], bad_check, b"plain", not_utf8, not_json):
        path.write_bytes(data)
        with pytest.raises(FormatError, match="facts.jsonl.gz: .*(gzip|JSON)") as error:
            read_questions(path)
        assert "\n" not in str(error.value)


def put(path, lines):
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
