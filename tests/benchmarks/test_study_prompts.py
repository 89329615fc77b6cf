"""Variants of prompts, and what routing and answers come to, against single calls."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.studies import prompts as study_prompts
from benchmarks.studies.asking import variants as study_variants
from mlx_hiermem import load
from mlx_hiermem.evaluation.facts import QUESTIONS_FILE, Question
from mlx_hiermem.evaluation.questions import read_questions
from tests.benchmarks.study_model import rows

# ---- variants --------------------------------------------------------------------------


def test_a_name_is_what_is_rare_in_its_family():
    names = ["hafnium", "Isle of Man", *(f"x{i}" for i in range(18))]
    blank = Question("", " 1.", "1", "x", 1, 0, [0])
    every = [replace(blank, prompt=f"The number of {name} is") for name in names]
    spans = study_variants.names_of(every, every)
    found = [
        question.prompt[begin:end] for question, (begin, end) in zip(every, spans, strict=True)
    ]
    assert found == names
    alone = [replace(blank, prompt="The number")]
    assert study_variants.names_of(alone, alone) == [(0, 10)]


def test_prompts_are_shortened_word_by_word():
    prompt = "The number of hafnium is"
    found = study_variants.shortened(prompt, (14, 21))
    assert found == {
        "left-1": "number of hafnium is", "left-2": "of hafnium is", "left-3": "hafnium is",
        "from-name": "hafnium is", "name": "hafnium",
        "right-1": "The number of hafnium", "right-2": "The number of", "right-3": "The number",
    }  # fmt: skip
    assert study_variants.without_words("one two", left=5) == "two"
    assert study_variants.without_words("one two", right=5) == "one"


def test_statements_are_worded_otherwise_and_nothing_else_is():
    assert study_variants.reworded("The number of hafnium is") == {
        "question": "What is the number of hafnium?",
        "request": "Tell me the number of hafnium:",
        "doubt": "Do you know the number of hafnium? It is",
    }
    assert study_variants.reworded("Hafnium has the number") == {}


def distance(a: str, b: str) -> int:
    """Optimal string alignment: insertions, deletions, changes and swaps of neighbours."""
    table = [[i + j if 0 in (i, j) else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            best = [table[i - 1][j] + 1, table[i][j - 1] + 1]
            best.append(table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                best.append(table[i - 2][j - 2] + 1)
            table[i][j] = min(best)
    return table[-1][-1]


@given(st.integers(0, 10_000), st.sampled_from([None, (14, 21)]))
def test_one_edit_is_one_edit_and_stays_in_its_place(seed, span):
    prompt = "The number of hafnium is"
    text = study_variants.misspelt(prompt, 1, random.Random(seed), span)
    assert distance(prompt, text) == 1
    if span:
        assert text.startswith("The number of ") and text.endswith(" is")
    assert study_variants.misspelt(prompt, 1, random.Random(seed), span) == text
    more = study_variants.misspelt(prompt, 3, random.Random(seed), span)
    assert abs(len(more) - len(prompt)) <= 3 and distance(prompt, more) <= 6


def test_what_has_no_letters_stays_as_it_is():
    assert study_variants.misspelt("72, 73", 2, random.Random(0)) == "72, 73"


# ---- what they come to -----------------------------------------------------------------


def test_agreement_and_accuracy_are_those_of_the_model(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study_prompts, "SEEDS", 2)
    found = rows(study_prompts, model, tmp_path)
    out = capsys.readouterr().out
    assert "such as" in out and "training-0" not in out  # the atlas alone has these
    lm = load(model)
    questions, _ = read_questions(model / QUESTIONS_FILE)
    names = study_variants.names_of(questions, questions)
    cut = {
        "full": [question.prompt for question in questions],
        "right-1": [question.prompt.removesuffix(" is") for question in questions],
        "name": [q.prompt[a:b] for q, (a, b) in zip(questions, names, strict=True)],
    }
    for name, texts in cut.items():
        sums = dict.fromkeys(("level1", "level2", *study_prompts.ASKED), 0)
        for question, text in zip(questions, texts, strict=True):
            path, full = lm.route(text).ids, lm.route(question.prompt).ids
            sums["level1"] += path[0] in [leaf // 3 for leaf in question.leaves]
            sums["level2"] += path[1] in question.leaves
            end = question.continuation
            sums["typed"] += lm.score(text, end, path)[1]
            sums["routed"] += lm.score(question.prompt, end, path)[1]
            sums["given"] += lm.score(text, end, full)[1]
            sums["off"] += lm.score(text, end, "none")[1]
        for what, count in sums.items():
            assert found[f"prompts.{what}@{name}"] == pytest.approx(count / len(questions))
    lm.bank.close()
    edited = [name for name in found if "edits" in name]
    assert len(edited) == 2 * len(study_prompts.EDITS) * 6
    assert any(found[name] * len(questions) % 1 for name in edited)  # a mean over seeds
    other = rows(study_prompts, model, tmp_path, "--seed", 1)
    differ = {name for name in found if found[name] != other[name]}
    assert differ and differ <= set(edited)
