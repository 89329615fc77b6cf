"""The perplexity task against ``lm.score`` of one text at a time, and its files."""

from __future__ import annotations

import json
import math

import pytest

from mlx_hiermem import load
from mlx_hiermem.errors import InputError
from mlx_hiermem.evaluation.perplexity import compare, read_documents
from tests.tiny import make_tiny_model, random_texts


def test_perplexity_is_that_of_single_texts_each_with_its_own_memory(tmp_path):
    lm, documents = load(make_tiny_model(tmp_path)), random_texts(20, seed=6)
    assert len({lm.route(document).ids for document in documents}) > 3
    found = compare(lm, documents)
    assert list(found) == ["none", "generic", "fetched", "documents"]
    assert found["documents"] == 20
    count = sum(len(document) - 1 for document in documents)  # a token is a letter
    for memory in ("none", "generic", "fetched"):
        total = sum(lm.score(d[0], d[1:], memory, route_on=d)[0] for d in documents)
        assert found[memory] == pytest.approx(math.exp(-total / count), rel=1e-4)
    assert len({round(found[memory], 3) for memory in ("none", "generic", "fetched")}) == 3


def test_blank_lines_part_the_documents_of_a_text(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("\n\none\nstill one\n \t\ntwo é\u2028two\n\n\n\nthree", encoding="utf-8")
    assert read_documents(path) == ["one\nstill one", "two é\u2028two", "three"]


def test_each_line_of_jsonl_is_a_document(tmp_path):
    path = tmp_path / "some.jsonl"
    texts = ["one\n\nstill one", "two\u2028two"]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join([lines[0], "", lines[1], ""]), encoding="utf-8")
    assert read_documents(str(path)) == texts


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"x", r"a.csv: the name ends in '.csv'; expected .jsonl"),
        ("a.txt", None, "a.txt: cannot be read"),
        ("a.txt", b" \n\n ", "a.txt: holds no document"),
        ("a.txt", b"\xff", "a.txt: line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{', "a.jsonl: line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n[]', 'a.jsonl: line 3: expected an object with a "text"'),
        ("a.jsonl", b'{"text": " "}', "a.jsonl: line 1: expected an object"),
        ("a.jsonl", b'{"txt": "x"}', "a.jsonl: line 1: expected an object"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_documents(tmp_path / name)
    assert "\n" not in str(error.value)
