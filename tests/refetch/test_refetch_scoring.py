"""``score_answer``: the numbers that ``stream`` would have had, under each policy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_hiermem.conversation import KeptCache
from mlx_hiermem.errors import InputError
from mlx_hiermem.refetch import KV_CACHES
from mlx_hiermem.scoring import score_answer
from tests.topics import NEAR, A, B, C, tokens_of

PROMPT = "the gold of the north"
COUNT = 16


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("refetch", ["never", "turn", "tokens:1", "tokens:4", "tokens:15"])
def test_a_score_is_that_of_the_stream(lm, routes, refetch, kv_cache):
    """The stream itself, with a sampler that says what it is told, gives the same numbers."""
    given = lm.tokenize("nobody knows what lies")[:COUNT]
    plan = (A, B, C, C, NEAR, A)
    seen = []

    def told(logprobs):
        number = len(seen)
        seen.append(logprobs[0, given[min(number, len(given) - 1)]])
        return mx.array([given[min(number, len(given) - 1)]])

    routes(*plan)
    pieces = list(lm.stream(PROMPT, "fetched", COUNT, told, refetch=refetch, kv_cache=kv_cache))
    assert tokens_of(pieces) == given
    routes(*plan)
    scored = score_answer(lm, PROMPT, given, refetch=refetch, kv_cache=kv_cache)
    scores = scored.logprobs
    assert scored.refetches == pieces[-1].refetches
    assert scores.shape == (COUNT,) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, [one.item() for one in seen[:COUNT]], atol=1e-4)
    if refetch == "never":
        whole = lm.score(PROMPT, "nobody knows what lies"[:COUNT], A)[0]
        assert scores.sum() == pytest.approx(whole, abs=1e-3)
    assert lm.bank.slots_made == 1


def test_keeping_and_recomputing_are_not_the_same(lm, routes):
    found = {}
    for kv_cache in KV_CACHES:
        routes(A, B)
        answer = lm.tokenize("abcdefgh")
        found[kv_cache] = score_answer(lm, PROMPT, answer, "fetched", None, "tokens:2", kv_cache)
    differ = np.abs(found["keep"].logprobs - found["recompute"].logprobs)
    assert differ[:3].max() < 1e-5 and differ[3:].min() > 1e-3
    assert found["keep"].prefilled == len(PROMPT)
    assert found["recompute"].prefilled == 2 * len(PROMPT) + 2


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_a_score_takes_over_what_an_earlier_one_has_kept(lm, routes, kv_cache):
    kept, answer = KeptCache(), lm.tokenize("abcdefgh")
    routes(A)
    first = score_answer(lm, PROMPT[:1], lm.tokenize(PROMPT[1:]), kept=kept)
    assert first.prefilled == 1 and len(kept) == len(PROMPT)
    routes(A)
    again = score_answer(lm, PROMPT, answer, kv_cache=kv_cache, kept=kept)
    assert again.prefilled == 1
    whole = score_answer(lm, PROMPT, answer, A)
    np.testing.assert_allclose(again.logprobs, whole.logprobs, atol=1e-4)
    routes(B)
    other = score_answer(lm, PROMPT + "abcdefgh", answer, kv_cache=kv_cache, kept=kept)
    assert other.prefilled == (1 if kv_cache == "keep" else len(PROMPT) + 8)
    fresh = score_answer(lm, PROMPT + "abcdefgh", answer, B).logprobs
    assert (np.abs(other.logprobs - fresh).max() < 1e-4) == (kv_cache == "recompute")


def test_what_cannot_be_scored_is_refused(lm):
    for answer in ([], [1] * 300):
        with pytest.raises(InputError, match=f"the answer has {len(answer)} tokens"):
            score_answer(lm, PROMPT, answer)
    assert lm.generate(PROMPT, max_tokens=3)
