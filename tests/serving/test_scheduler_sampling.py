"""Seeds, stop words, log-probabilities, penalties: mlx-lm's, each request's own."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_hiermem.errors import InputError
from mlx_hiermem.serving.job import Finished, Sampling
from mlx_hiermem.serving.pieces import StopWords
from tests.serving.serving_lm import answers, ids, job, read

SEEDED = Sampling(temperature=0.9, top_p=0.95, seed=7)


# ---- seeds -----------------------------------------------------------------------------


def test_a_seed_gives_the_same_answer_in_any_company(scheduler):
    asked = job("gold is", max_tokens=30, sampling=SEEDED)
    first = read(scheduler.submit(asked)).text
    company = [
        job("what is it", (1, 4), 9, sampling=Sampling(seed=1)),
        job("a b c", "none", 20),
        job("a b c", "generic", 25, sampling=Sampling()),
    ]
    for number in range(4):
        found = answers(scheduler, [*company[:number], asked, *company[number:]])
        assert found[number].text == first
    twins = answers(scheduler, [asked, asked])
    assert [one.text for one in twins] == [first, first]


def test_other_seeds_and_no_seed_give_other_answers(scheduler):
    drawn = [SEEDED, *[Sampling(temperature=0.9, top_p=0.95, seed=s) for s in (8, -7, None, None)]]
    jobs = [job("gold is", max_tokens=30, sampling=one) for one in drawn]
    texts = [one.text for one in answers(scheduler, jobs)]
    assert len(set(texts)) == len(texts)


def test_the_sampler_is_mlx_lms(scheduler):
    """What is drawn is drawn from what top_k and top_p leave."""
    one = [
        Sampling(temperature=1.0, top_k=1, seed=3),
        Sampling(temperature=1.0, top_p=1e-6, seed=3),
        Sampling(temperature=1.0, min_p=1.0, seed=3),
        Sampling(temperature=1e-300, seed=3),
        Sampling(temperature=0.0),
    ]
    found = answers(scheduler, [job("gold is", max_tokens=20, sampling=s) for s in one])
    assert len({answer.text for answer in found}) == 1
    every = job("gold is", max_tokens=20, sampling=Sampling(seed=3, top_k=10**6))
    all_of_them = job("gold is", max_tokens=20, sampling=Sampling(seed=3))
    texts = [answer.text for answer in answers(scheduler, [every, all_of_them])]
    assert texts[0] == texts[1] != found[0].text


def test_draws_follow_the_probabilities(scheduler):
    """First tokens of many seeds against the softmax of the model."""
    top = read(scheduler.submit(job("gold is", max_tokens=1, top_logprobs=257))).tokens[0].top
    share = {one.token: math.exp(one.logprob) for one in top}
    assert sum(share.values()) == pytest.approx(1, abs=1e-4)
    count = 400
    jobs = [
        job("gold is", max_tokens=1, sampling=Sampling(seed=s), top_logprobs=0)
        for s in range(count)
    ]
    drawn = [
        one.tokens[0].token
        for start in range(0, count, 50)
        for one in answers(scheduler, jobs[start : start + 50])
    ]
    likeliest = top[0].token
    p = share[likeliest]
    assert abs(drawn.count(likeliest) / count - p) < 5 * math.sqrt(p * (1 - p) / count)
    assert len(set(drawn)) > 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": -1.0},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {-3: 1.0}},
    ],
)
def test_numbers_out_of_range(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_bias_and_penalties(lm, scheduler):
    (letter,) = ids("Q")
    biased = Sampling(temperature=0.0, logit_bias={letter: 100.0})
    assert read(scheduler.submit(job("gold is", sampling=biased))).text == "Q" * 16
    with pytest.raises(InputError, match="logit_bias has token 257"):
        scheduler.submit(job("gold is", sampling=Sampling(logit_bias={257: 1.0})))
    plain = read(scheduler.submit(job("gold is", "none", 20))).text
    assert len(set(plain)) < 10
    for name in ("presence_penalty", "frequency_penalty"):
        held = Sampling(temperature=0.0, **{name: 100.0})
        text = read(scheduler.submit(job("gold is", "none", 20, sampling=held))).text
        assert len(set(text)) == 20
    off = Sampling(temperature=0.0, repetition_penalty=1.0)
    assert read(scheduler.submit(job("gold is", "none", 20, sampling=off))).text == plain


# ---- stop words ------------------------------------------------------------------------


def test_stop_words_are_never_shown(lm, scheduler):
    whole = read(scheduler.submit(job("gold is", max_tokens=24))).text
    for start, end in [(3, 4), (5, 9), (0, 2), (22, 24)]:
        word = whole[start:end]
        start = whole.find(word)
        found = read(scheduler.submit(job("gold is", max_tokens=24, stop=(word, "never"))))
        assert found.text == whole[:start]
        assert found.end == Finished("stop", 7, start + len(word), 0)
        # Whatever was shown before was no beginning of it.
        shown = ""
        for piece in found.pieces:
            shown += piece.text
            assert whole[:start].startswith(shown)


def test_what_only_begins_like_a_stop_word_is_shown_in_the_end(scheduler):
    whole = read(scheduler.submit(job("gold is", max_tokens=12))).text
    found = read(scheduler.submit(job("gold is", max_tokens=12, stop=(whole[-3:] + "~~",))))
    assert found.text == whole and found.end.reason == "length"


def test_an_answer_that_goes_on_is_not_disturbed_by_one_that_stops(lm, scheduler):
    whole = read(scheduler.submit(job("gold is", max_tokens=40))).text
    jobs = [
        job("gold is", max_tokens=40, stop=(whole[n : n + 2],) if n else ()) for n in (0, 6, 0, 13)
    ]
    found = [one.text for one in answers(scheduler, jobs)]
    ends = [40, whole.find(whole[6:8]), 40, whole.find(whole[13:15])]
    assert found == [whole[:end] for end in ends]


def test_the_end_of_the_text(lm, scheduler):
    """The model never ends by itself; a bias makes it."""
    end = Sampling(temperature=0.0, logit_bias={256: 1000.0})
    found = read(scheduler.submit(job("gold is", sampling=end, top_logprobs=1)))
    assert found.text == "" and found.tokens == []
    assert found.end == Finished("stop", 7, 1, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("words", "text", "shown"),
    [
        (["abc"], "xxabcyy", "xx"),
        (["abc"], "ababxabc", "ababx"),
        (["aab"], "aaaaab", "aaa"),
        (["bc", "abcd"], "xabcd", "xa"),
        (["cd", "abcd"], "xabcd", "x"),
        (["🙂!"], "a🙂🙂!b", "a🙂"),
        (["abc"], "xxab", "xxab"),
        ([], "xx", "xx"),
    ],
)
def test_stop_words_in_pieces_of_any_size(words, text, shown, size):
    stop = StopWords(words)
    out = ""
    for start in range(0, len(text), size):
        if not stop.found:
            out += stop.feed(text[start : start + size])
            assert shown.startswith(out)
    assert out + stop.flush() == shown
    assert stop.found == any(word in text for word in words)


# ---- log-probabilities -----------------------------------------------------------------


def test_logprobs_are_the_models(lm, scheduler):
    asked = job("gold is", max_tokens=10, top_logprobs=4)
    found = read(scheduler.submit(asked))
    fetched = lm.fetch("fetched", "gold is")
    tokens = asked.tokens + [one.token for one in found.tokens]
    logits = lm.model(mx.array([tokens[:-1]]), memory=fetched.memory)[0, 6:]
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert len(found.tokens) == 10
    assert "".join(one.text for one in found.tokens) == found.text
    for one, expected in zip(found.tokens, logprobs, strict=True):
        assert one.logprob == pytest.approx(expected[one.token], abs=1e-4)
        best = sorted(range(257), key=lambda token: -expected[token])[:4]
        assert [top.token for top in one.top] == best
        assert one.top[0].token == one.token
        assert [top.text for top in one.top] == [lm.tokenizer.decode([token]) for token in best]
        assert [top.logprob for top in one.top] == pytest.approx(expected[best], abs=1e-4)
    fetched.release()


def test_logprobs_of_what_is_shown_and_nothing_else(scheduler):
    whole = read(scheduler.submit(job("gold is", max_tokens=24))).text
    word = whole[5:9]
    asked = job("gold is", max_tokens=24, stop=(word,), top_logprobs=0)
    found = read(scheduler.submit(asked))
    assert "".join(one.text for one in found.tokens) == found.text
    assert all(one.top == () for one in found.tokens)
    for piece in found.pieces:
        assert "".join(one.text for one in piece.tokens) == piece.text
    silent = read(scheduler.submit(job("gold is", max_tokens=24)))
    assert silent.tokens == []


def test_what_cannot_be_drawn_has_a_number_all_the_same(scheduler):
    (letter,) = ids("Q")
    cold = Sampling(temperature=0.0, logit_bias={letter: 30000.0})
    found = read(scheduler.submit(job("gold is", max_tokens=2, sampling=cold, top_logprobs=257)))
    assert min(one.logprob for one in found.tokens[0].top) == -9999.0
