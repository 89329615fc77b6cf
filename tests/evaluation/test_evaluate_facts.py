"""The facts task against single runs of ``lm.generate`` and ``lm.score``, and its controls."""

from __future__ import annotations

from dataclasses import replace
from shutil import copytree

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem import load
from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.evaluation import facts
from mlx_hiermem.evaluation.facts import Question
from tests.tiny import make_tiny_model, random_texts, write_tiny_anchor

N = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def control_folder(folder, tmp_path_factory):
    """The same model folder with other anchor weights as its own."""
    copy = copytree(folder, tmp_path_factory.mktemp("control") / "model")
    write_tiny_anchor(copy, seed=7)
    return copy


@pytest.fixture
def lm(folder):
    return load(folder)


@pytest.fixture
def control(lm, control_folder):
    return facts.load_control(lm, control_folder / "model.safetensors")


def blocked_answer(lm, prompt, length):
    """What is written with each block on the prompt's path blocked, by the bank's public API."""
    keys = list(enumerate(lm.route(prompt).ids, 1))
    for key in keys:
        lm.bank.block(*key)
    try:
        return lm.generate(prompt, "fetched", length)
    finally:
        for key in keys:
            lm.bank.unblock(*key)


@pytest.fixture(scope="module")
def expected(folder, control_folder):
    """Questions whose continuations are what the conditions write in turn, and who writes which.

    The anchor of ``control_folder`` writes by itself, without ``load_control``.
    """
    lm, other = load(folder), load(control_folder)
    prompts, rng = random_texts(N, seed=3), np.random.default_rng(0)
    paths = np.array([lm.route(prompt).ids for prompt in prompts])
    leaves = [[int(path[-1])] for path in paths]
    wrong = facts.wrong_paths(paths, leaves, 3, seed=5).tolist()
    lengths = rng.integers(1, 4, N).tolist()
    written = {
        "none": [lm.generate(p, "none", n) for p, n in zip(prompts, lengths, strict=True)],
        "generic": [lm.generate(p, "generic", n) for p, n in zip(prompts, lengths, strict=True)],
        "fetched": [lm.generate(p, "fetched", n) for p, n in zip(prompts, lengths, strict=True)],
        "wrong": [
            lm.generate(p, path, n) for p, path, n in zip(prompts, wrong, lengths, strict=True)
        ],
        "blocked": [blocked_answer(lm, p, n) for p, n in zip(prompts, lengths, strict=True)],
        "anchor_same_tokens": [
            other.generate(p, "none", n) for p, n in zip(prompts, lengths, strict=True)
        ],
    }
    right = [written[facts.CONDITIONS[i % 6]][i] for i in range(N)]
    questions = [
        Question(prompt, continuation, continuation, "letters", 1, 0, trained)
        for prompt, continuation, trained in zip(prompts, right, leaves, strict=True)
    ]
    hits = {
        condition: [text == wanted for text, wanted in zip(texts, right, strict=True)]
        for condition, texts in written.items()
    }
    # The conditions differ, so that none can stand in for another; off and blocked are one.
    others = [hits[condition] for condition in facts.CONDITIONS if condition != "blocked"]
    assert all(4 <= sum(one) < N for one in others) and len({tuple(o) for o in others}) == 5
    return questions, hits


@pytest.mark.parametrize("batch, batch_bytes", [(64, 2**29), (4, 2**29), (64, 3 * 576 * 4)])
def test_teacher_forcing_is_what_single_runs_generate(
    lm, control, expected, monkeypatch, batch, batch_bytes
):
    questions, hits = expected
    monkeypatch.setattr(facts, "BATCH", batch)
    monkeypatch.setattr(facts, "BATCH_BYTES", batch_bytes)
    assert lm.bank.config.fetch_size() == 576
    found = facts.answer(lm, questions, control, seed=5)
    assert tuple(found) == facts.CONDITIONS
    assert {condition: right.tolist() for condition, right in found.items()} == hits


def test_every_token_up_to_the_full_stop_counts(lm):
    prompt = "The number of hafnium is"
    text = lm.generate(prompt, "fetched", 3)
    exact = Question(prompt, text, text, "letters", 1, 0, [0])
    for i in range(len(text)):
        other = text[:i] + ("!" if text[i] != "!" else "?") + text[i + 1 :]
        found = facts.answer(lm, [exact, replace(exact, continuation=other)])
        assert found["fetched"].tolist() == [True, False]
        assert "anchor_same_tokens" not in found
        assert lm.score(prompt, other)[1] is False


def test_each_path_is_fetched_once_per_condition(lm, expected, monkeypatch):
    questions, _ = expected
    fetched = []
    fetch = lm.bank.fetch
    monkeypatch.setattr(
        lm.bank,
        "fetch",
        lambda path, blocked: fetched.append((tuple(path), set(blocked))) or fetch(path, blocked),
    )
    monkeypatch.setattr(facts, "BATCH", 8)
    facts.answer(lm, questions)
    paths = {lm.route(question.prompt).ids for question in questions}
    blocked = [(path, keys) for path, keys in fetched if keys]
    free = [path for path, keys in fetched if not keys]
    assert sorted(path for path, _ in blocked) == sorted(paths)
    assert all(keys == {(1, path[0]), (2, path[1])} for path, keys in blocked)
    assert len(paths) + 9 >= len(free) > len(paths) and paths <= set(free)


def test_the_banks_own_blocks_stay_as_they_are_also_after_an_error(lm, expected, monkeypatch):
    questions, _ = expected
    ids = lm.route(questions[0].prompt).ids
    lm.bank.block(2, ids[1])
    before = lm.bank.blocked
    facts.answer(lm, questions[:6])
    assert lm.bank.blocked == before

    fetch = lm.bank.fetch

    def failing(path, blocked):
        if blocked:
            raise FormatError("the disk is gone")
        return fetch(path, blocked)

    monkeypatch.setattr(lm.bank, "fetch", failing)
    with pytest.raises(FormatError, match="the disk is gone"):
        facts.answer(lm, questions)
    assert lm.bank.blocked == before


def test_a_level_without_memory_has_nothing_to_block(tmp_path, monkeypatch):
    lm = load(make_tiny_model(tmp_path, ranks=(3, 0, 2), branching=2))
    question = Question("the", " x.", "x", "letter", 1, 0, [5])
    blocks = []
    fetch = lm.bank.fetch
    monkeypatch.setattr(
        lm.bank, "fetch", lambda path, blocked: blocks.append(list(blocked)) or fetch(path, blocked)
    )
    facts.answer(lm, [question])
    path = lm.route("the").ids
    assert [(1, path[0]), (3, path[2])] in blocks and blocks.count([]) == len(blocks) - 1


@given(st.data())
def test_wrong_paths_are_wrong(data):
    k, levels = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    leaf = st.integers(0, k**levels - 1)
    rows = data.draw(st.lists(st.tuples(leaf, st.lists(leaf, max_size=4)), min_size=1, max_size=8))
    paths = np.array([[own // k**below for below in range(levels)[::-1]] for own, _ in rows])
    trained, seed = [leaves for _, leaves in rows], data.draw(st.integers(0, 99))
    found = facts.wrong_paths(paths, trained, k, seed)
    assert found.shape == paths.shape
    for path, right, leaves in zip(found.tolist(), paths.tolist(), trained, strict=True):
        assert 0 <= path[0] < k and path[0] != right[0]
        assert all(child // k == parent for parent, child in zip(path, path[1:], strict=False))
        near = {right[0], *(one // k ** (levels - 1) for one in leaves)}
        assert path[0] not in near or len(near) == k
    assert np.array_equal(found, facts.wrong_paths(paths, trained, k, seed))
    # The first questions get the same paths without those that follow.
    assert np.array_equal(found[:1], facts.wrong_paths(paths[:1], trained[:1], k, seed))


def test_wrong_paths_are_drawn_evenly_by_a_seed():
    paths, trained = np.zeros((3000, 2), np.int64), [[8]] * 3000
    found = facts.wrong_paths(paths, trained, 4, seed=0)
    leaves, counts = np.unique(found[:, 1], return_counts=True)
    assert leaves.tolist() == [4, 5, 6, 7, 12, 13, 14, 15] and counts.min() > 300
    assert not np.array_equal(found, facts.wrong_paths(paths, trained, 4, seed=1))


def test_the_control_is_the_anchor_of_its_file_alone(lm, control, control_folder):
    other = load(control_folder)
    tokens = mx.array([[5, 6, 7]])
    expected = other.model.anchor(tokens)
    assert mx.array_equal(control.model(tokens), expected)
    assert not mx.array_equal(lm.model(tokens), expected)
    assert control.context_length == lm.context_length


def test_a_control_in_half_precision_computes_as_the_model_does(lm, folder, tmp_path):
    weights = mx.load(str(folder / "model.safetensors"))
    path = tmp_path / "half.safetensors"
    mx.save_safetensors(str(path), {key: w.astype(mx.bfloat16) for key, w in weights.items()})
    control = facts.load_control(lm, path)
    assert control.dtype == lm.dtype == mx.float32
    assert control.model(mx.array([[1, 2]])).dtype == mx.float32


def test_a_control_of_another_anchor_or_damaged_is_refused(lm, folder, tmp_path):
    path = tmp_path / "control.safetensors"
    weights = mx.load(str(folder / "model.safetensors"))
    data = (folder / "model.safetensors").read_bytes()
    path.write_bytes(data[:-100])
    refused(lm, path)
    path.write_bytes(b"nonsense")
    refused(lm, path)
    refused(lm, tmp_path / "missing.safetensors")
    mx.save_safetensors(str(path), {key: w for key, w in weights.items() if "norm" not in key})
    refused(lm, path)
    mx.save_safetensors(str(path), {**weights, "lm_head.weight": mx.zeros((2, 16))})
    refused(lm, path)
    head = weights["lm_head.weight"].astype(mx.int32)
    mx.save_safetensors(str(path), {**weights, "lm_head.weight": head})
    refused(lm, path)


def refused(lm, path):
    with pytest.raises(FormatError) as error:
        facts.load_control(lm, path)
    assert str(error.value).startswith(f"{path}: not the weights") and "\n" not in str(error.value)


def test_shares_per_bucket_and_family():
    questions = [
        Question("p", " a.", "a", family, 1, bucket, [])
        for family, bucket in [("x", 0), ("y", 0), ("x", 2), ("x", 0), ("x", 0)]
    ]
    hits = {"none": np.array([1, 0, 0, 0, 0], bool), "fetched": np.array([1, 1, 1, 0, 1], bool)}
    assert facts.by_bucket(questions, ["often", "some", "rare"], hits) == {
        "buckets": ["often", "some", "rare"],
        "none": [0.25, None, 0.0],
        "fetched": [0.75, None, 1.0],
        "n": [4, 0, 1],
    }
    assert facts.by_family(questions, hits) == {
        "x": {"none": 0.25, "fetched": 0.75, "n": 4},
        "y": {"none": 0.0, "fetched": 1.0, "n": 1},
    }


def test_no_questions_and_too_long_ones_are_refused(lm):
    with pytest.raises(InputError, match="no questions"):
        facts.answer(lm, [])
    long = Question("x" * 255, " a.", "a", "x", 1, 0, [0])
    with pytest.raises(InputError, match="258 tokens.*256"):
        facts.answer(lm, [long])
    assert not lm.bank.blocked
