"""Scores in batches and in pieces: the numbers of whole single sequences, and how much is held."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_hiermem import load, scoring
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.memories import MemoryModel, attach
from tests.anchors.tiny import GATED, LAYERS, NESTED, VOCAB, WINDOW, D, make
from tests.tiny import make_tiny_model, random_texts

PIECE = 3
CONFIG = MemoryConfig((4, 2), branching=2)
#: More than two windows of those anchors whose attention has one, and no multiple of the piece.
LENGTHS = (11, 4, 2, 11)
assert PIECE < WINDOW and max(LENGTHS) > 2 * WINDOW + PIECE - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lm(folder):
    return load(folder)


@pytest.fixture
def calls(monkeypatch):
    """(sequences, positions, memories) of each call of a model."""
    seen = []
    call = MemoryModel.__call__

    def spy(self, inputs, cache=None, memory=None, **options):
        seen.append((*inputs.shape, 0 if memory is None else len(memory)))
        return call(self, inputs, cache=cache, memory=memory, **options)

    monkeypatch.setattr(MemoryModel, "__call__", spy)
    return seen


# ---- pieces ----------------------------------------------------------------------------


def expected(model, tokens, memory):
    """Log-probabilities of all tokens but the first, and whether each is the likeliest: the
    sequence whole, alone and without a cache."""
    logits = np.array(model(mx.array([tokens[:-1]]), memory=memory)[0]).astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    logits -= top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    targets = np.array(tokens[1:])
    return logits[np.arange(len(targets)), targets], logits.argmax(axis=-1) == targets


@pytest.mark.parametrize("how", ["one after the other", "as a batch"])
@pytest.mark.parametrize("name", [*GATED, *NESTED])
def test_pieces_give_what_whole_sequences_do(name, how, monkeypatch, calls):
    """Local attention, recurrent states and all else that a cache holds included."""
    model = attach(make(name), CONFIG)
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, VOCAB, length).tolist() for length in LENGTHS]
    size = (len(rows), LAYERS * 3 * sum(CONFIG.ranks) * D)
    memories = list(mx.array(0.3 * rng.standard_normal(size, dtype=np.float32))[:, None])
    lm = SimpleNamespace(
        model=model,
        vocabulary=VOCAB,
        context_length=None,
        tokenize=lambda text: [ord(letter) for letter in text],
        dtype=mx.float32,
        bank=SimpleNamespace(config=SimpleNamespace(fetch_size=lambda: size[1])),
    )
    if how == "as a batch":
        monkeypatch.setattr(scoring, "_PREFILL", PIECE)
    else:
        monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * VOCAB * PIECE)
    texts = ["".join(map(chr, row)) for row in rows]
    for given in (memories, [memories[0]] * len(rows), [None] * len(rows)):
        whole = [expected(model, row, memory) for row, memory in zip(rows, given, strict=True)]
        for start in (1, 3):
            long = [i for i, row in enumerate(rows) if len(row) > start]
            pairs = [(texts[i][:start], texts[i][start:]) for i in long]
            calls.clear()
            found = scoring.score(lm, pairs, [given[i] for i in long])
            assert max(positions for _, positions, _ in calls) == PIECE
            assert max(count for count, _, _ in calls) == (1 if "one" in how else len(long))
            for i, (logprob, greedy) in zip(long, found, strict=True):
                values, likeliest = (one[start - 1 :] for one in whole[i])
                assert logprob == pytest.approx(values.sum(), rel=1e-3, abs=1e-3)
                assert greedy == likeliest.all()


def test_every_token_of_a_piece_is_scored(lm, monkeypatch):
    text = "the city of gold"
    whole = [lm.score(text[:i], text[i:], "generic")[0] for i in range(1, len(text))]
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * lm.vocabulary * 4)
    pieces = [lm.score(text[:i], text[i:], "generic")[0] for i in range(1, len(text))]
    np.testing.assert_allclose(np.diff(pieces), np.diff(whole), atol=1e-4)
    assert len(set(np.round(whole, 3))) == len(whole)


@pytest.mark.parametrize("refetch", ["never", "tokens:5"])
@pytest.mark.parametrize("kv_cache", ["keep", "recompute"])
def test_an_answer_in_pieces(lm, monkeypatch, calls, refetch, kv_cache):
    prompt, answer = "the gold of the north", lm.tokenize("nobody knows what lies")
    whole = scoring.score_answer(lm, prompt, answer, refetch=refetch, kv_cache=kv_cache)
    monkeypatch.setattr(scoring, "_PREFILL", 7)
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * lm.vocabulary * PIECE)
    calls.clear()
    pieces = scoring.score_answer(lm, prompt, answer, refetch=refetch, kv_cache=kv_cache)
    np.testing.assert_allclose(pieces.logprobs, whole.logprobs, atol=1e-4)
    assert pieces.logprobs.shape == (len(answer),) and pieces.refetches == whole.refetches
    if refetch == "never":
        assert [positions for _, positions, _ in calls] == [7, 7, 6, 1, *[PIECE] * 7, 1]


# ---- what is held at once --------------------------------------------------------------


def test_rows_of_about_one_length_share_a_batch_and_come_back_in_order(lm, calls, monkeypatch):
    texts = [text * (20 if i % 2 else 1) for i, text in enumerate(random_texts(24, seed=4))]
    texts = [text[:200] for text in texts]
    memories = [one.memory for one in lm.fetch_batch("fetched", texts)]
    pairs = [(text[:2], text[2:]) for text in texts]
    alone = [scoring.score(lm, [p], [m])[0][0] for p, m in zip(pairs, memories, strict=True)]
    limit = 4 * lm.vocabulary * 600
    monkeypatch.setattr(scoring, "LOGITS_BYTES", limit)
    calls.clear()
    found = [logprob for logprob, _ in scoring.score(lm, pairs, memories)]
    np.testing.assert_allclose(found, alone, rtol=1e-4)
    assert all(4 * lm.vocabulary * count * positions <= limit for count, positions, _ in calls)
    assert max(count for count, _, _ in calls) > 3
    fed = sum(count * positions for count, positions, _ in calls)
    assert fed < 1.2 * sum(len(text) - 1 for text in texts)


def test_no_more_memories_are_there_than_fit(lm, calls, monkeypatch):
    texts = random_texts(20, seed=6)
    whole = {memory: lm.perplexity(texts, memory) for memory in ("fetched", "generic")}
    asked = []
    fetch = lm.fetch_batch
    monkeypatch.setattr(lm, "fetch_batch", lambda m, t: asked.append(len(t)) or fetch(m, t))
    bytes_of_one = lm.bank.config.fetch_size() * lm.dtype.size
    monkeypatch.setattr(scoring, "MEMORY_BYTES", 3 * bytes_of_one)
    for memory, most in (("fetched", 3), ("generic", 16)):
        calls.clear()
        asked.clear()
        assert lm.perplexity(texts, memory) == pytest.approx(whole[memory], rel=1e-5)
        assert max(asked) == max(count for count, _, _ in calls) == most
        assert max(memories for _, _, memories in calls) == (3 if memory == "fetched" else 1)
    pairs = [(text[0], text[1:]) for text in texts]
    calls.clear()
    scoring.score(lm, pairs, [one.memory for one in fetch("fetched", texts)])
    assert max(count for count, _, _ in calls) == 3


@pytest.mark.parametrize(
    "measure",
    [
        lambda lm, text: lm.perplexity([text] * 4, "generic"),
        lambda lm, text: lm.score(text[:100], text[100:], "generic"),
        lambda lm, text: scoring.score_answer(lm, text[:100], lm.tokenize(text[100:]), "generic"),
        lambda lm, text: scoring.score_answer(lm, text[:-1], lm.tokenize(text[-1:]), "generic"),
    ],
    ids=["perplexity", "score", "answer", "prompt"],
)
def test_logits_of_a_large_vocabulary_are_not_all_there_at_once(lm, monkeypatch, measure):
    text, vocabulary = "the city of gold" * 15, 2**15
    grown = mx.random.normal((vocabulary, 16)) * 0.2
    lm.model.anchor.update(
        {"lm_head": {"weight": grown}, "model": {"embed_tokens": {"weight": grown}}}
    )
    lm.vocabulary = vocabulary
    all_of_them = 4 * vocabulary * (len(text) - 1)
    monkeypatch.setattr(scoring, "LOGITS_BYTES", all_of_them // 16)
    measure(lm, text)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    measure(lm, text)
    assert mx.get_peak_memory() - before < all_of_them // 3


# ---- what goes wrong -------------------------------------------------------------------


def test_nan_names_the_memory_that_gave_it(lm, monkeypatch):
    texts = random_texts(12, seed=6)
    wrong = texts[7]
    fetch = lm.fetch_batch

    def spoilt(memory, some):
        return [
            replace(one, memory=one.memory * mx.nan) if text == wrong else one
            for text, one in zip(some, fetch(memory, some), strict=True)
        ]

    monkeypatch.setattr(lm, "fetch_batch", spoilt)
    ids = lm.route(wrong).ids
    assert sum(lm.route(text).ids == ids for text in texts) < 6
    with pytest.raises(FormatError, match=f"fetched memory on path {','.join(map(str, ids))} the"):
        lm.perplexity(texts)


def test_memory_is_on_or_off_for_all(lm):
    memories = [lm.fetch("generic").memory, None]
    with pytest.raises(InputError, match="on or off for all; split it in two"):
        scoring.score(lm, [("a", "b")] * 2, memories)


@pytest.mark.parametrize(
    "measure",
    [
        lambda lm: lm.score("ab", "c", "none"),
        lambda lm: lm.perplexity(["abc"], "none"),
        lambda lm: scoring.score_answer(lm, "a", [7, 257], "none"),
        lambda lm: scoring.score_answer(lm, "a", [-1], "none"),
    ],
)
def test_tokens_that_the_anchor_has_not(lm, monkeypatch, measure):
    """As where the tokenizer is another model's."""
    real = lm.tokenize
    monkeypatch.setattr(
        lm, "tokenize", lambda text: [*real(text), 257] if "c" in text else real(text)
    )
    with pytest.raises(InputError, match=r"has token (257|-1); expected tokens from 0 to 256"):
        measure(lm)
