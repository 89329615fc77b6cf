"""Refetching in the midst of an answer: what comes out, and what is routed."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_sampler

from mlx_hiermem.errors import InputError
from mlx_hiermem.refetch import KV_CACHES, WINDOW, Refetch
from tests.topics import A, B, C, sources, tokens_of

PROMPT = "the gold of the north"
COUNT = 16


def by_hand(lm, path_of, count=COUNT):
    """Greedy decoding by the model alone, each token fed with the memory of its own path."""
    cache, tokens = lm.model.make_cache(None), []
    fed = lm.tokenize(PROMPT)
    for number in range(count):
        # A buffer of its own for each, never given back.
        cache[-1] = lm.model.memory_entry(lm.fetch(path_of(number)).memory)
        tokens.append(lm.model(mx.array([fed]), cache=cache)[0, -1].argmax().item())
        fed = tokens[-1:]
    return tokens


# ---- what it may be --------------------------------------------------------------------


def test_policies_as_text():
    assert Refetch.parse("never") == Refetch() == Refetch("never", 0, "keep", WINDOW)
    assert Refetch.parse("turn", "recompute") == Refetch("turn", 0, "recompute", WINDOW)
    assert Refetch.parse("tokens:32", window=9) == Refetch("tokens", 32, "keep", 9)
    assert Refetch.parse("tokens:008").every == 8
    given = Refetch("tokens", 3, "recompute", 5)
    assert Refetch.parse(given, "keep", 7) is given
    for text in ("never", "turn", "tokens:32"):
        assert str(Refetch.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["sometimes", "", "tokens", "tokens:", "tokens:0", "tokens:00", "tokens:x", "tokens:-1",
     "tokens:1.5", "tokens: 8", "tokens:8 ", "tokens:٣", "Turn", "turn:3", "tokens:" + "9" * 5000,
     None, 8],
)  # fmt: skip
def test_what_is_no_policy_is_refused(lm, text):
    with pytest.raises(InputError, match="expected never, turn, or tokens:N") as error:
        Refetch.parse(text)
    assert len(str(error.value)) < 200
    with pytest.raises(InputError, match="expected never, turn, or tokens:N"):
        next(lm.stream(PROMPT, refetch=text))


def test_values_out_of_range_are_refused(lm):
    for values in (("tokens", 0), ("tokens", -4), ("turn", 3), ("never", 1), ("later", 0)):
        with pytest.raises(InputError, match="expected never, turn, or tokens:N"):
            Refetch(*values)
    with pytest.raises(InputError, match="kv_cache is 'drop'; expected keep or recompute"):
        next(lm.stream(PROMPT, kv_cache="drop"))
    with pytest.raises(InputError, match="window is 0"):
        Refetch("tokens", 3, window=0)
    assert lm.bank.slots_made == 0  # refused before anything was fetched


# ---- what comes out --------------------------------------------------------------------


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("every", [1, 3, 100])
def test_where_the_path_stays_nothing_changes(lm, routes, every, kv_cache):
    routes(A)
    expected = list(lm.stream(PROMPT, max_tokens=COUNT))
    texts = routes(A)
    uses = lm.bank.uses.copy()
    found = list(lm.stream(PROMPT, "fetched", COUNT, refetch=f"tokens:{every}", kv_cache=kv_cache))
    assert tokens_of(found) == tokens_of(expected)
    assert {piece.refetches for piece in found} == {0}
    assert len(texts) == 1 + (COUNT - 2) // every  # not where nothing more would be drawn with it
    assert sum((lm.bank.uses - uses).values()) == 3  # one fetch


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_sampling_goes_on_as_if_nothing_had_happened(lm, routes, kv_cache):
    def sample(refetch):
        routes(A)
        mx.random.seed(7)
        sampler = make_sampler(2.0)
        return lm.generate(PROMPT, "fetched", 40, sampler, refetch=refetch, kv_cache=kv_cache)

    assert sample("tokens:1") == sample("tokens:7") == sample("never")


@pytest.mark.parametrize("every", [1, 4, 7])
def test_recompute_is_a_fresh_run_from_there(lm, routes, every):
    routes(A)
    before = tokens_of(lm.stream(PROMPT, max_tokens=COUNT))
    routes(A, B)
    pieces = list(
        lm.stream(PROMPT, max_tokens=COUNT, refetch=f"tokens:{every}", kv_cache="recompute")
    )
    found, cut = tokens_of(pieces), every + 1  # one token lags
    assert found[:cut] == before[:cut] and found != before
    prompt = lm.tokenize(PROMPT) + found[:cut]
    assert found[cut:] == tokens_of(lm.stream(prompt, B, COUNT - cut))


@pytest.mark.parametrize("every", [1, 4, 7])
def test_keep_is_the_models_own_loop_with_the_memory_replaced(lm, routes, every):
    routes(A, B)
    found = tokens_of(lm.stream(PROMPT, max_tokens=COUNT, refetch=f"tokens:{every}"))
    assert found == by_hand(lm, lambda number: A if number <= every else B)
    assert found != by_hand(lm, lambda number: A if number < every else B)


def test_several_changes_in_one_answer(lm, routes):
    routes(A, B, B, C, A)
    pieces = list(lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:3"))
    # Routed when 3, 6, 9 and 12 tokens had come out; the next one was drawn by then.
    paths = [A] * 4 + [B] * 6 + [C] * 3 + [A] * 3
    assert [piece.path.ids for piece in pieces] == paths
    assert [piece.refetches for piece in pieces] == [0] * 4 + [1] * 6 + [2] * 3 + [3] * 3
    assert {piece.memory for piece in pieces} == {"fetched"}
    assert tokens_of(pieces) == by_hand(lm, lambda number: paths[number])


def test_a_new_memory_at_every_token(lm, routes):
    paths = [A, B, C] * 9
    routes(*paths)
    for kv_cache in KV_CACHES:
        routes(*paths)
        pieces = list(lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:1", kv_cache=kv_cache))
        # The first memory draws two: the second token was drawn when the first came out.
        assert [piece.path.ids for piece in pieces] == [A, *paths[: COUNT - 1]]
        tokens = lm.tokenize(PROMPT) + tokens_of(pieces)
        for number, path in enumerate([A, *paths[: COUNT - 1]] if kv_cache == "recompute" else []):
            prompt = tokens[: len(PROMPT) + number]
            assert tokens_of(lm.stream(prompt, path, 1)) == [tokens[len(prompt)]]
    assert lm.bank.slots_made == 1


def test_the_policy_may_be_given_whole(lm, routes):
    routes(A, B)
    whole = Refetch("tokens", 4, "recompute")
    found = tokens_of(lm.stream(PROMPT, max_tokens=COUNT, refetch=whole, kv_cache="keep"))
    routes(A, B)
    expected = lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:4", kv_cache="recompute")
    assert found == tokens_of(expected)


# ---- what is routed --------------------------------------------------------------------


def test_the_newest_text_is_routed(lm, routes):
    texts = routes(A)
    refetch = Refetch("tokens", 5, window=8)
    answer = "".join(piece.text for piece in lm.stream(PROMPT, max_tokens=COUNT, refetch=refetch))
    assert texts == [PROMPT, *((PROMPT + answer[:n])[-8:] for n in (5, 10))]
    texts = routes(A)
    list(lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:5"))
    assert texts[-1] == (PROMPT + answer[:10])[-WINDOW:]


def test_a_text_to_route_on_stands_for_the_prompt(lm, routes):
    texts = routes(A)
    answer = lm.generate(PROMPT, max_tokens=COUNT, route_on="iron", refetch="tokens:5")
    assert texts == ["iron", "iron" + answer[:5], "iron" + answer[:10]]


def test_without_a_word_the_memory_stays(lm, routes):
    texts = routes(A, B)
    blank = 220  # a space, which mlx-lm's sampler may draw
    assert lm.tokenizer.decode([blank]) == " "
    pieces = list(
        lm.stream(
            PROMPT, "fetched", 9, lambda logprobs: mx.array([blank]),
            refetch=Refetch("tokens", 2, window=2),
        )
    )  # fmt: skip
    assert len(texts) == 1 and {piece.path.ids for piece in pieces} == {A}


def test_special_tokens_are_not_routed(lm, routes):
    texts = routes(A)
    tokens = [256, *lm.tokenize(PROMPT)]
    list(lm.stream(tokens, max_tokens=6, refetch=Refetch("tokens", 2, window=40), route_on=PROMPT))
    answer = texts[-1].removeprefix(PROMPT)
    list(lm.stream(tokens, max_tokens=6, refetch=Refetch("tokens", 2, window=40)))
    assert texts[-1] == PROMPT + answer and len(answer) == 4


@pytest.mark.parametrize("memory", ["generic", "none", A], ids=str)
def test_only_a_fetched_memory_is_routed_again(lm, routes, memory):
    texts = routes(B)
    pieces = list(lm.stream(PROMPT, memory, COUNT, refetch="tokens:1", kv_cache="recompute"))
    assert not texts and {piece.refetches for piece in pieces} == {0}
    assert tokens_of(pieces) == tokens_of(lm.stream(PROMPT, memory, COUNT))


def test_a_block_that_is_blocked_on_the_way_goes(lm, routes):
    routes(A)
    pieces = []
    for piece in lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:4"):
        pieces.append(piece)
        if len(pieces) == 2:
            for level in (1, 2, 3):
                lm.bank.block(level, A[level - 1])
    assert pieces[-1].refetches == 1
    assert sources(pieces[4]) == ["disk"] * 3 and sources(pieces[5]) == ["blocked"] * 3
    cache = lm.model.make_cache(None)
    for level in (1, 2, 3):
        lm.bank.unblock(level, A[level - 1])
    fed, tokens = lm.tokenize(PROMPT), []
    for number in range(COUNT):
        memory = lm.fetch(A).memory if number < 5 else None
        cache[-1] = lm.model.memory_entry(memory)
        tokens.append(lm.model(mx.array([fed]), cache=cache)[0, -1].argmax().item())
        fed = tokens[-1:]
    assert tokens_of(pieces) == tokens


# ---- ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_an_answer_ends_with_the_context(lm, routes, kv_cache):
    prompt = "a" * 246
    routes(A, B, A, B, A, B)
    pieces = list(lm.stream(prompt, max_tokens=100, refetch="tokens:3", kv_cache=kv_cache))
    last = pieces[-1]
    assert (last.prompt_tokens, last.generation_tokens) == (246, 10)
    assert (last.finish_reason, last.refetches) == ("length", 2)


def test_an_answer_stops_at_the_end_of_text(lm, routes):
    texts = routes(A, B)

    def end_fourth(tokens, logits):
        ends = tokens.size >= len(PROMPT) + 3
        return logits + 1e6 * (mx.arange(logits.shape[-1]) == 256) if ends else logits

    pieces = list(
        lm.stream(PROMPT, max_tokens=9, refetch="tokens:3", logits_processors=[end_fourth])
    )
    assert pieces[-1].finish_reason == "stop" and pieces[-1].generation_tokens == 4
    assert pieces[-1].path.ids == A  # the fourth token was drawn when the third came out
    assert len(texts) == 2
