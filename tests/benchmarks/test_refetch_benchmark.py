"""The benchmark of topic changes: its documents, its training, and that its figures are right."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks import refetch, refetch_documents
from benchmarks.harness import main
from mlx_hiermem import load
from mlx_hiermem.evaluation.facts import QUESTIONS_FILE, Question, write_questions
from mlx_hiermem.evaluation.questions import read_questions
from tests.tiny import make_tiny_model, random_texts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model and questions of which every leaf has some."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    lm = load(folder)
    questions = [
        Question(prompt, " 72.", "72", "x", 5, 0, [lm.route(prompt).ids[-1]])
        for prompt in random_texts(120, seed=8)
    ]
    lm.bank.close()
    (folder / "evaluation").mkdir()
    write_questions(folder / QUESTIONS_FILE, questions, ["all"])
    return folder


@pytest.fixture
def lm(model):
    lm = load(model)
    yield lm
    lm.bank.close()


@pytest.fixture
def questions(model):
    return read_questions(model / QUESTIONS_FILE)[0]


def run(*arguments):
    return main(refetch.NAME, refetch.measure, list(map(str, arguments)), refetch.options)


# ---- documents -------------------------------------------------------------------------


def test_every_fact_is_in_one_half_under_its_own_leaf(lm, questions):
    halves = refetch_documents.topics(lm, questions)
    texts = [text for half in halves for known in half.values() for text in known]
    assert sorted(texts) == sorted(q.prompt + q.continuation for q in questions)
    assert abs(sum(map(len, halves[0].values())) - sum(map(len, halves[1].values()))) <= 1
    for half in halves:
        for leaf, known in half.items():
            path = refetch_documents.path_of(lm, leaf)
            assert all(lm.route(text.removesuffix(" 72.")).ids == path for text in known)


def test_a_document_is_about_two_topics(lm, questions):
    _, known = refetch_documents.topics(lm, questions)
    given = refetch_documents.documents(lm, known, 2, 12)
    assert len(given) == 12 and len({document.paths for document in given}) > 3
    for document in given:
        assert document.paths[0][0] != document.paths[1][0]
        for text, path in zip((document.first, document.second), document.paths, strict=True):
            sentences = [one for one in known[path[-1]] if one in text]
            assert " ".join(sorted(sentences, key=text.index)) == text and len(sentences) == 2
    assert refetch_documents.documents(lm, known, 2, 12) == given
    assert refetch_documents.documents(lm, known, 2, 12, seed=1) != given


def test_training_leaves_routes_and_bank_as_they_are(lm, questions):
    train, _ = refetch_documents.topics(lm, questions)
    routes = [lm.route(question.prompt) for question in questions]
    memory = np.array(lm.fetch((1, 4)).memory)
    before = dict(tree_flatten(lm.model.parameters()))
    losses = [refetch_documents.adapt(lm, train, steps) for steps in (1, 30)]
    assert losses[1] < losses[0] - 0.5
    after = dict(tree_flatten(lm.model.parameters()))
    assert before.keys() == after.keys()
    same = [name for name in before if mx.array_equal(before[name], after[name])]
    assert same == ["anchor.model.embed_tokens.weight"]
    assert [lm.route(question.prompt) for question in questions] == routes
    np.testing.assert_array_equal(np.array(lm.fetch((1, 4)).memory), memory)
    assert not lm.model.training


# ---- figures ---------------------------------------------------------------------------


def test_the_figures_are_those_of_the_model(lm, questions):
    _, known = refetch_documents.topics(lm, questions)
    given = refetch_documents.documents(lm, known, 2, 40)
    # Some whose text is not routed to their topic, so that the oracle knows better.
    strays = [document for document in given if lm.route(document.first).ids != document.paths[0]]
    given = [*strays[:2], next(document for document in given if document not in strays)]
    assert len(given) == 3
    found = refetch.run_all(lm, given, refetch.POLICIES)
    routed = refetch.run_all(lm, given, {"turn,recompute": refetch.turn("recompute")})
    for name, memory_of in (
        ("none", lambda document: ("none", "none")),
        ("never", lambda document: (lm.route(document.first).ids,) * 2),
        ("oracle", lambda document: document.paths),
        ("turn,recompute", lambda document: tuple(
            lm.route(text).ids for text in (document.first, document.second))),
    ):  # fmt: skip
        nats = {"second": 0.0, "both": 0.0}
        counts = {"second": 0, "both": 0}
        for document in given:
            first, second = memory_of(document)
            after = -lm.score(document.first, " " + document.second, second)[0]
            before = -lm.score(document.first[:1], document.first[1:], first)[0]
            nats["second"] += after
            nats["both"] += before + after
            counts["second"] += 1 + len(document.second)  # a token is a byte
            counts["both"] += len(document.first) + len(document.second)
        one = (routed if name == "turn,recompute" else found)[name]
        assert one.after == pytest.approx(math.exp(nats["second"] / counts["second"]), rel=1e-3)
        assert one.both == pytest.approx(math.exp(nats["both"] / counts["both"]), rel=1e-3)
    length = sum(len(document.first) for document in given)
    assert found["never"].prefilled == found["turn,recompute"].prefilled == length
    assert found["turn,keep"].prefilled == len(given)
    kept, again = found["tokens:8,keep"], found["tokens:8,recompute"]
    assert kept.prefilled == length < again.prefilled
    assert kept.refetches == again.refetches > 0
    assert len({round(one.after, 6) for one in found.values()}) == len(found)


def test_a_smoke_run_has_every_row_and_the_figure(model, tmp_path, capsys):
    path, png = tmp_path / "rows.json", tmp_path / "new" / "figure.png"
    arguments = ["--smoke", "--model", model, "--sentences", 2, "--json", path, "--png", png]
    assert run(*arguments) == 0
    rows = {row["id"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {
        "refetch.unadapted@oracle",
        *(f"refetch.{figure}@{policy}" for policy in refetch.POLICIES
          for figure in ("second", "both", "prefilled")),
        *(f"refetch.window@{window}" for window in refetch.WINDOWS),
    }  # fmt: skip
    assert all(row["value"] > 0 and row["detail"] for row in rows.values())
    assert rows["refetch.window@32"]["value"] == rows["refetch.second@tokens:16,keep"]["value"]
    assert rows["refetch.unadapted@oracle"]["value"] != rows["refetch.second@oracle"]["value"]
    assert png.read_bytes()[:4] == b"\x89PNG"
    text = capsys.readouterr().out
    assert "anchor adapted for 3 steps" in text and "tokens:32,recompute" in text
    assert run(*arguments, "--steps", 0) == 0
    again = {row["id"]: row["value"] for row in json.loads(path.read_text())["rows"]}
    assert again["refetch.unadapted@oracle"] == again["refetch.second@oracle"]


def test_what_cannot_be_measured_is_one_line(model, tmp_path, capsys):
    bare = make_tiny_model(tmp_path / "bare")
    (tmp_path / "file").write_text("")
    small = ["--smoke", "--sentences", 1, "--model", model]
    for arguments, text in (
        (["--smoke", "--model", bare], "facts.jsonl.gz"),
        (["--smoke", "--model", "nowhere"], "nowhere: no such folder"),
        ([*small, "--steps", -1], "--steps is -1; expected at least 0"),
        ([*small, "--documents", 0], "--documents is 0; expected at least 1"),
        ([*small, "--sentences", 0], "--sentences is 0; expected at least 1"),
        ([*small, "--sentences", 99], "no two topics of 99 sentences"),
        ([*small, "--png", tmp_path / "file" / "x.png"], "x.png: cannot be written"),
    ):
        assert run(*arguments) == 2, text
        captured = capsys.readouterr()
        assert text in captured.err
        assert captured.err.count("error: ") == captured.err.count("\n") == 1
