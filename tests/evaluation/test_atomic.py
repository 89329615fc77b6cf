"""Atomic numbers: names counted in a corpus, numbers read from what a model writes, the command."""

from __future__ import annotations

import argparse
import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.atlas import facts as atlas_facts
from mlx_hiermem import load
from mlx_hiermem.cli import main as cli
from mlx_hiermem.commands import evaluate_atomic
from mlx_hiermem.commands.options import add_model_arguments
from mlx_hiermem.errors import HierMemError, InputError
from mlx_hiermem.evaluation import atomic, names
from mlx_hiermem.evaluation.facts import CONTROL_FILE
from tests.tiny import make_tiny_model, write_tiny_anchor

TEXTS = [
    "Lead leads to lead. LEAD-free; misleading, lead's, (lead)",  # five
    "Sulphur and sulfur; Aluminum, aluminium. Cesium",
    "tin ore in a tin, tinned",  # two
    "Fe, Au, Pb: symbols do not count",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    (folder / "evaluation").mkdir()
    write_tiny_anchor(folder, 7, CONTROL_FILE)
    return folder


# ---- elements --------------------------------------------------------------------------


def test_the_elements_are_those_of_the_atlas_facts():
    numbers = {
        fact.entity: fact.answer
        for fact in atlas_facts.facts()
        if (fact.family, fact.relation) == ("element", "number")
    }
    asked, _ = atomic.questions()
    assert len(asked) == 118
    assert {q.prompt: q.continuation for q in asked} == {
        f"The atomic number of {name} is": f" {number}." for name, number in numbers.items()
    }
    assert set(atomic.ALIASES) <= set(atomic.ELEMENTS)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 72.", 72), ("72", 72), (" about 1,234, say", 1234), (" is 6, 7 or 8", 6),
        (" 1.008 (12)", None), (" unknown", None), ("", None), (" no. 47: 48", 47),
        (" 1,23", 1), (" 118!", 118), (" v2.5 is", None),
    ],
)  # fmt: skip
def test_the_first_number_is_read_if_it_is_an_integer(text, number):
    assert atomic.read_integer(text) == number


# ---- counting --------------------------------------------------------------------------


def test_names_count_with_their_aliases_in_any_case_as_words_of_their_own():
    found = dict(zip(atomic.ELEMENTS, atomic.count_elements(TEXTS), strict=True))
    expected = {"lead": 5, "sulfur": 2, "aluminium": 2, "caesium": 1, "tin": 2}
    assert {name: count for name, count in found.items() if count} == expected


@given(st.lists(st.text("leadtin -_1.É'", max_size=40), max_size=5))
def test_counts_are_those_of_regular_expressions(texts):
    given = {"lead": ("led",), "tin": ()}
    found = names.count_names(texts, given)
    for name, aliases in given.items():
        pattern = re.compile(rf"\b(?:{'|'.join((name, *aliases))})\b", re.IGNORECASE)
        assert found[name] == sum(len(pattern.findall(text)) for text in texts)


def test_a_name_has_to_be_one_word_that_stands_for_one_thing():
    with pytest.raises(InputError, match="'sal ammoniac': expected a single word"):
        names.count_names([], {"salt": ("sal ammoniac",)})
    with pytest.raises(InputError, match="'TIN' stands for tin and can"):
        names.count_names([], {"tin": (), "can": ("TIN",)})


def test_a_corpus_may_be_files_of_any_kind_or_a_folder_of_them(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines))
    (folder / "b.txt").write_text("\n\n".join(TEXTS))
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.writelines(lines)
    pq.write_table(pa.table({"text": TEXTS}), folder / "d.parquet")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"body": "lead"}))
    assert sorted(names.corpus_texts([str(folder)])) == sorted(4 * TEXTS)
    assert list(names.corpus_texts([str(other)], "body")) == ["lead"]
    with pytest.raises(InputError, match='other.jsonl: line 1: expected an object with a "text"'):
        list(names.corpus_texts([str(other)]))
    with pytest.raises(InputError, match="no such file"):
        list(names.corpus_texts([str(tmp_path / "nothing")]))


def test_a_corpus_folder_is_read_as_it_is_trained_on(model, tmp_path, capsys):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    out = tmp_path / "corpus"
    arguments = ["cluster", "--data", data, "--out", out, "--model", model, "--branching", 2]
    arguments += ["--levels", 1, "--sequence-length", 256, "--encoder", "embeddings"]
    arguments += ["--validation", 0]
    assert cli(list(map(str, arguments))) == 0, capsys.readouterr().err
    found = dict(
        zip(atomic.ELEMENTS, atomic.count_elements(names.corpus_texts([str(out)])), strict=True)
    )
    expected = {"lead": 20, "sulfur": 8, "aluminium": 8, "caesium": 4, "tin": 8}
    assert {name: count for name, count in found.items() if count} == expected


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 6))
def test_buckets_are_of_one_size_and_the_first_is_the_most_frequent(counts, number):
    found = names.buckets(counts, number)
    sizes = [int((found == bucket).sum()) for bucket in range(number)]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == len(counts)
    for i in range(len(counts)):
        for j in range(i):
            # An earlier bucket means at least as frequent; of equals the earlier comes first.
            if found[i] != found[j]:
                first, second = (i, j) if found[i] < found[j] else (j, i)
                assert (-counts[first], first) < (-counts[second], second)


# ---- answers ---------------------------------------------------------------------------


@pytest.fixture
def writes(monkeypatch):
    """Makes the tiny model's tokenizer write digits, so that it has answers."""

    def make(lm):
        decode = lm.tokenizer.detokenizer.__class__.add_token

        def as_digit(self, token, *args, **kwargs):
            return decode(self, 48 - 33 + token % 10 if token % 5 else token, *args, **kwargs)

        monkeypatch.setattr(lm.tokenizer.detokenizer.__class__, "add_token", as_digit)
        return lm

    return make


def test_answers_are_the_numbers_that_are_written_under_each_condition(model, writes):
    from mlx_hiermem.evaluation import facts

    lm = writes(load(model))
    control = facts.load_control(lm, model / CONTROL_FILE)
    asked, _ = atomic.questions()
    asked = asked[::10]
    length = atomic.MAX_TOKENS
    written = {name: [] for name in atomic.CONDITIONS}
    for question in asked:
        for memory in ("none", "generic", "fetched"):
            written[memory].append(lm.generate(question.prompt, memory, length))
        path = lm.route(question.prompt).ids
        for level in (1, 2):
            lm.bank.block(level, path[level - 1])
        written["blocked"].append(lm.generate(question.prompt, "fetched", length))
        for level in (1, 2):
            lm.bank.unblock(level, path[level - 1])
        written["anchor_same_tokens"].append(control.generate(question.prompt, "none", length))
    numbers = {name: list(map(atomic.read_integer, texts)) for name, texts in written.items()}
    assert all(any(found) for found in numbers.values())
    # Each question's answer is what one of the conditions writes, so that some are right.
    from dataclasses import replace

    right = [
        replace(question, answer=str(numbers[atomic.CONDITIONS[i % 5]][i] or 0))
        for i, question in enumerate(asked)
    ]
    hits = atomic.answer(lm, right, control)
    assert tuple(hits) == atomic.CONDITIONS
    for name, found in hits.items():
        expected = [number == int(q.answer) for number, q in zip(numbers[name], right, strict=True)]
        assert found.tolist() == expected, name
    assert any(found.any() for found in hits.values())
    assert not lm.bank.blocked
    assert tuple(atomic.answer(lm, right[:1])) == atomic.CONDITIONS[:-1]
    with pytest.raises(InputError, match="no questions"):
        atomic.answer(lm, [])
    lm.bank.close()


def test_questions_are_in_buckets_by_count():
    counts = list(range(118))  # the later an element the more frequent
    asked, buckets = atomic.questions(counts)
    assert buckets == list(atomic.BUCKETS)
    assert [question.count for question in asked] == counts
    assert np.bincount([question.bucket for question in asked]).tolist() == [24, 23, 24, 23, 24]
    assert asked[-1].bucket == 0 and asked[0].bucket == 4
    with pytest.raises(InputError, match="3 counts; expected 118"):
        atomic.questions([1, 2, 3])


# ---- the command -----------------------------------------------------------------------


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    evaluate_atomic.add_arguments(parser)
    parser.add_argument("--limit", type=int)
    return evaluate_atomic.run(parser.parse_args(list(map(str, arguments))))


def test_the_command_sorts_elements_by_the_corpus(model, tmp_path):
    corpus = tmp_path / "corpus.txt"
    texts = [" ".join([name] * (117 - n)) for n, name in enumerate(atomic.ELEMENTS)]
    corpus.write_text("\n\n".join(texts[:-1]))
    result, text = run("--model", model, "--limit", 8, "--corpus", corpus)
    assert result["occurrences"]["oganesson"] == 0 and result["occurrences"]["helium"] == 116
    assert result["n"] == [8, 0, 0, 0, 0] and result["fetched"][1:] == [None] * 4
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert ["most frequent", "8", "110-117"] in [row[:3] for row in rows]
    assert ["all", "8", "110-117"] in [row[:3] for row in rows]
    result, text = run("--model", model, "--limit", 2)
    assert result["buckets"] == ["all"] and "No buckets: --corpus names" in text
    (tmp_path / "none.txt").write_text("nothing of that kind")
    with pytest.raises(HierMemError, match="names no element"):
        run("--model", model, "--corpus", tmp_path / "none.txt")
