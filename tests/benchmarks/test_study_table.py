"""What studies share, and the two small ones: by frequency, and on another anchor."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from benchmarks.studies import anchor as study_anchor
from benchmarks.studies import beams as study_beams
from benchmarks.studies import blocking as study_blocking
from benchmarks.studies import frequency as study_frequency
from benchmarks.studies import prompts as study_prompts
from benchmarks.studies import rag as study_rag
from benchmarks.studies import wrong_path as study_wrong_path
from benchmarks.studies.asking import table as study_table
from mlx_hiermem import load
from mlx_hiermem.evaluation import atomic
from mlx_hiermem.evaluation.facts import CONTROL_FILE, QUESTIONS_FILE
from mlx_hiermem.evaluation.questions import read_questions
from tests.benchmarks.study_model import BUCKETS, make_study_model, rows, run
from tests.tiny import make_tiny_model

STUDIES = (
    study_anchor, study_beams, study_blocking, study_frequency, study_prompts, study_rag,
    study_wrong_path,
)  # fmt: skip


@pytest.fixture
def questions(model):
    return read_questions(model / QUESTIONS_FILE)[0]


# ---- shared ----------------------------------------------------------------------------


def test_questions_are_drawn_evenly():
    assert study_table.evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert study_table.evenly(range(3), 5) == [0, 1, 2]
    assert len(set(study_table.evenly(range(10), 7))) == 7


def test_the_spread_is_that_of_resampled_means():
    values = np.arange(400) % 4 == 0
    found = study_table.mean(values, seed=3)
    deviation = np.sqrt(0.25 * 0.75 / 400)  # of a mean of so many draws
    assert (found.value, found.count) == (0.25, 400)
    assert found.low == pytest.approx(0.25 - 1.96 * deviation, abs=0.006)
    assert found.high == pytest.approx(0.25 + 1.96 * deviation, abs=0.006)
    assert study_table.mean(values, seed=3) == found != study_table.mean(values, seed=4)
    assert study_table.mean([]).count == 0


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.NAME)
def test_what_cannot_be_measured_is_one_line(study, model, tmp_path, capsys):
    bare = make_tiny_model(tmp_path / "bare")
    (tmp_path / "file").write_text("")
    for arguments, text in (
        (["--model", bare], "facts.jsonl.gz"),
        (["--model", "nowhere"], "nowhere: no such folder"),
        (["--model", model, "--limit", 0], "--limit is 0; expected at least 1"),
        (["--model", model, "--seed", -1], "--seed is -1; expected at least 0"),
        (["--model", model, "--png", tmp_path / "file" / "x.png"], "x.png: cannot be written"),
    ):
        assert run(study, "--smoke", *arguments) == 2, text
        captured = capsys.readouterr()
        assert text in captured.err
        assert captured.err.count("error: ") == captured.err.count("\n") == 1


# ---- by frequency ----------------------------------------------------------------------


def test_shares_by_bucket_are_those_of_the_model(model, questions, tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"About {one}. " * (n % 7) for n, one in enumerate(ELEMENTS)))
    found = rows(study_frequency, model, tmp_path, "--corpus", corpus)
    out = capsys.readouterr().out
    assert all(name in out for name in (*BUCKETS, *atomic.BUCKETS))
    lm = load(model)
    control = study_frequency_control(model, tmp_path)
    for bucket in (0, 1):
        of = [question for question in questions if question.bucket == bucket]
        for name in study_frequency.CONDITIONS:
            asked = control if name == "anchor_same_tokens" else lm
            memory = "none" if name == "anchor_same_tokens" else name
            hits = [asked.score(one.prompt, one.continuation, memory)[1] for one in of]
            assert found[f"frequency.facts@{bucket}-{name}"] == pytest.approx(np.mean(hits))
    lm.bank.close()
    control.bank.close()
    assert {name for name in found if ".atomic@" in name} == {
        f"frequency.atomic@{bucket}-{name}"
        for bucket in range(5) for name in study_frequency.CONDITIONS
    }  # fmt: skip
    assert run(study_frequency, "--smoke", "--model", model) == 0
    assert "no atomic numbers: --corpus names" in capsys.readouterr().out


ELEMENTS = atomic.ELEMENTS


def study_frequency_control(model, tmp_path):
    """The model with the control's weights as its own, without ``load_control``."""
    copy = shutil.copytree(model, tmp_path / "copy")
    shutil.copy(model / CONTROL_FILE, copy / "model.safetensors")
    return load(copy)


# ---- another anchor --------------------------------------------------------------------


def test_a_bank_on_the_control_is_the_model_with_the_controls_weights(model, questions, tmp_path):
    found = rows(study_anchor, model, tmp_path)
    lm, control = load(model), study_frequency_control(model, tmp_path)
    paths = [lm.route(question.prompt).ids for question in questions]  # of the bank's own encoder
    for name, asked in (("own-on-own", lm), ("own-on-control", control)):
        for condition in study_anchor.CONDITIONS:
            hits = [
                asked.score(
                    one.prompt, one.continuation, path if condition == "fetched" else condition
                )[1]
                for one, path in zip(questions, paths, strict=True)
            ]
            assert found[f"anchor.accuracy@{name}-{condition}"] == pytest.approx(np.mean(hits))
        asked.bank.close()


def test_two_models_change_banks(model, questions, tmp_path, capsys):
    other = make_study_model(tmp_path / "other", seed=5)
    found = rows(study_anchor, model, tmp_path, "--other", other)
    for bank, anchor, name in ((model, other, "own-on-other"), (other, model, "other-on-own")):
        lm, mixed = load(bank), load(anchor, bank=bank / "memory")
        scores = [  # what is asked are the first model's questions
            mixed.score(one.prompt, one.continuation, lm.route(one.prompt).ids) for one in questions
        ]
        nats = [
            -logprob / len(one.continuation)  # a token is a byte
            for one, (logprob, _) in zip(questions, scores, strict=True)
        ]
        hits = [right for _, right in scores]
        assert found[f"anchor.accuracy@{name}-fetched"] == pytest.approx(np.mean(hits)), name
        assert found[f"anchor.loss@{name}-fetched"] == pytest.approx(np.mean(nats), rel=1e-4)
        lm.bank.close()
        mixed.bank.close()
    assert {name.split("@")[1].rsplit("-", 1)[0] for name in found} == {
        "own-on-own", "own-on-control", "own-on-other", "other-on-own", "other-on-other",
    }  # fmt: skip
    wide = make_tiny_model(tmp_path / "wide", ranks=(2, 2))
    assert run(study_anchor, "--smoke", "--model", model, "--other", wide) == 2
    assert "its memory config is another one" in capsys.readouterr().err
    (model / CONTROL_FILE).rename(tmp_path / "away")
    try:
        assert run(study_anchor, "--smoke", "--model", model) == 2
        assert "has no control to put its bank on" in capsys.readouterr().err
    finally:
        (tmp_path / "away").rename(model / CONTROL_FILE)


def test_rows_tell_their_spread(model, tmp_path):
    path = tmp_path / "rows.json"
    assert run(study_anchor, "--smoke", "--model", model, "--json", path) == 0
    report = json.loads(path.read_text())
    assert report["smoke"] and report["benchmark"] == "anchor"
    assert all("95 % of bootstrap samples" in row["detail"] for row in report["rows"])
