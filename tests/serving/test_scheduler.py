"""Many requests in one batch, each with a memory of its own, answer as each would alone."""

from __future__ import annotations

import threading
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_hiermem import load
from mlx_hiermem.errors import InputError
from mlx_hiermem.serving.job import Failed, Finished, Started
from mlx_hiermem.serving.memory import MemoryChoice
from tests.serving.serving_lm import WAIT, answers, job, memory, read, running
from tests.tiny import make_tiny_model

PROMPTS = ["gold is", "what is the capital of the country?", "a b c d e f g", "x"]
MEMORIES = ["fetched", "generic", "none", (1, 4), (2, 8)]


def alone(lm, asked, blocked=()) -> str:
    """The answer of a model that does nothing else."""
    choice = asked.memory
    for pair in blocked:
        lm.bank.block(*pair)
    try:
        what = choice.kind if choice.path is None else choice.path
        return lm.generate(asked.tokens, what, asked.max_tokens, route_on=choice.route_on)
    finally:
        for pair in blocked:
            lm.bank.unblock(*pair)


def test_any_mix_of_memories_answers_as_each_alone(lm, scheduler):
    jobs = [
        job(prompt, what, max_tokens=5 + 7 * number)
        for number, (prompt, what) in enumerate((p, m) for m in MEMORIES for p in PROMPTS)
    ]
    jobs = [replace(one, max_tokens=4 + one.max_tokens % 29) for one in jobs]
    expected = [alone(lm, one) for one in jobs]
    assert len(set(expected)) > len(PROMPTS) * 3  # the memories make a difference
    found = answers(scheduler, jobs)
    assert [one.text for one in found] == expected
    for one, asked in zip(found, jobs, strict=True):
        assert one.end == Finished("length", len(asked.tokens), asked.max_tokens, 0)


def test_requests_that_come_and_go(lm, folder):
    """More than there is room for: the others follow one by one, while answers are going on."""
    jobs = [
        job(PROMPTS[number % 4], MEMORIES[number % 5], max_tokens=2 + number * 5 % 17)
        for number in range(30)
    ]
    with running(folder, max_batch=3, prompt_cache_bytes=0) as scheduler:
        found = answers(scheduler, jobs)
    assert [one.text for one in found] == [alone(lm, one) for one in jobs]


def test_no_memory_in_prompts_of_different_lengths_and_then_a_memory(lm, scheduler):
    first = [job("a b c", "none", 60), job("what is the capital of it?", "none", 60)]
    with scheduler._change:  # both come at once, so the shorter prompt is padded
        handles = [scheduler.submit(one) for one in first]
    for handle in handles:
        events = handle.events(WAIT)
        assert isinstance(next(events), Started)
        next(events)
    later = job("gold is", "fetched", 12)
    assert read(scheduler.submit(later)).text == alone(lm, later)
    assert [read(handle).end.reason for handle in handles] == ["length"] * 2


def test_what_is_told_of_the_memory(lm, scheduler):
    found = [read(scheduler.submit(job("gold is", what))).started for what in MEMORIES]
    path = tuple(lm.route("gold is").ids)
    assert [one.memory for one in found] == ["fetched", "generic", "none", "path", "path"]
    assert [one.path for one in found] == [path, None, None, (1, 4), (2, 8)]
    assert [len(one.fetch["blocks"]) for one in found] == [2, 2, 0, 2, 2]
    assert {one.prompt_tokens for one in found} == {7}
    config = lm.bank.config
    assert found[0].fetch["bytes"] == sum(map(config.block_bytes, config.memory_levels))


def test_another_text_is_routed(lm, scheduler):
    other = next(text for text in PROMPTS if lm.route(text).ids != lm.route("gold is").ids)
    asked = job("gold is", memory(route_on=other))
    found = read(scheduler.submit(asked))
    assert found.started.path == tuple(lm.route(other).ids)
    assert found.text == alone(lm, asked) != alone(lm, job("gold is"))


def test_blocks_are_off_for_one_request_alone(lm, scheduler):
    """Also for those on the same path that are being answered, before, meanwhile and after."""
    whole = job("gold is", (1, 4), 60)
    blocked = {(1, 1), (2, 4)}
    expected = {
        pairs: alone(lm, whole, pairs) for pairs in [(), ((1, 1),), ((2, 4),), tuple(blocked)]
    }
    assert len(set(expected.values())) == 4
    jobs = [replace(whole, memory=memory((1, 4), pairs)) for pairs in [*expected, *expected] * 2]
    found = answers(scheduler, jobs)
    assert [one.text for one in found] == [*expected.values()] * 4
    for one, pairs in zip(found, [*expected] * 4, strict=True):
        for block in one.started.fetch["blocks"]:
            off = (block["level"], block["cluster"]) in pairs
            assert block["blocked"] == off
            assert (block["source"] == "blocked") == off
            assert (block["bytes"] == 0) == off


def test_blocks_of_fetched_paths(lm, scheduler):
    ids = lm.route("gold is").ids
    pair = (2, ids[1])
    found = read(scheduler.submit(job("gold is", memory("fetched", {pair}))))
    assert found.text == alone(lm, job("gold is"), [pair]) != alone(lm, job("gold is"))
    # No block of another path is on this one.
    other = read(scheduler.submit(job("gold is", memory("fetched", {(2, (ids[1] + 3) % 9)}))))
    assert other.text == alone(lm, job("gold is"))


@pytest.mark.parametrize("kind", ["generic", "none"])
def test_blocks_do_nothing_to_memories_without_a_path(lm, scheduler, kind):
    found = read(scheduler.submit(job("gold is", memory(kind, {(1, 1)}))))
    assert found.text == alone(lm, job("gold is", kind))


def test_all_requests_share_one_buffer(folder):
    """What is decoded with is a copy, so the buffer is free again before the first token."""
    with running(folder, prompt_cache_bytes=0) as scheduler:
        answers(scheduler, [job("gold is", (n % 3, n % 3 * 3), 30) for n in range(12)])
        assert scheduler.stats()["slots_made"] == 1


def test_a_path_outside_the_tree_ends_alone(lm, scheduler):
    good = job("gold is", max_tokens=30)
    handles = [
        scheduler.submit(one)
        for one in [
            good,
            job("gold is", (1, 8)),
            job("gold is", (1,)),
            job("gold is", memory((1, 4), {(3, 0)})),
            job("gold is", memory((1, 4), {(2, 9)})),
            replace(good, text=" "),
            replace(good, text="\ud800"),
            good,
        ]
    ]
    found = [read(handle) for handle in handles]
    assert found[0].text == found[-1].text == alone(lm, good)
    for one in found[1:-1]:
        assert isinstance(one.end, Failed) and one.end.client_error
        assert one.started is None and "\n" not in one.end.message
    assert "not a child" in found[1].end.message
    assert scheduler.alive


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, "empty"),
        ({"tokens": [1] * 256}, "256 tokens, but the context"),
        ({"tokens": [1, 257]}, "token 257; expected tokens from 0 to 256"),
        ({"tokens": [-1]}, "token -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": ("",)}, "empty text"),
        ({"text": None}, "no text to route"),
        ({"top_logprobs": -1}, "top_logprobs is -1"),
    ],
)
def test_what_no_model_could_answer_is_refused_at_once(scheduler, change, message):
    with pytest.raises(InputError, match=message):
        scheduler.submit(replace(job("gold is"), **change))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "best"},
        {"kind": "path"},
        {"kind": "none", "path": (1, 4)},
        {"kind": "generic", "route_on": "gold"},
    ],
)
def test_choices_that_contradict_themselves(wrong):
    with pytest.raises(InputError, match="memory is"):
        MemoryChoice(**wrong)


def test_an_answer_ends_where_the_context_does(lm, scheduler):
    asked = job("a" * 250, "generic", 1000)
    found = read(scheduler.submit(asked))
    assert found.end == Finished("length", 250, 6, 0)
    assert found.text == alone(lm, asked)


def test_the_facts_and_the_tokenizer(lm, folder):
    with running(folder) as scheduler:
        facts = scheduler._facts
        assert (facts.context_length, facts.vocabulary) == (256, 257)
        assert facts.has_tree and not facts.has_chat_template
        assert str(folder) not in repr(facts)
        texts = ["gold is", "Zürich 🙂", "<b>"] * 20
        found: dict[str, list[int]] = {}

        def tokenize(text: str) -> None:
            found[text] = scheduler.tokenize(text)

        threads = [threading.Thread(target=tokenize, args=(text,)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {text: lm.tokenize(text) for text in texts}
        assert [scheduler.decode(tokens) for tokens in found.values()] == list(found)
        with pytest.raises(InputError, match="Unicode"):
            scheduler.tokenize("a\ud800")


def test_it_answers_also_in_float16_banks(tmp_path):
    """A bank of another dtype than the anchor's is converted, and its buffer given back before."""
    folder = make_tiny_model(tmp_path / "half", dtype="float16")
    lm = load(folder)
    jobs = [job(prompt, what) for prompt in PROMPTS for what in ("fetched", "none", (2, 7))]
    with running(folder) as scheduler:
        found = answers(scheduler, jobs)
    assert [one.text for one in found] == [alone(lm, one) for one in jobs]
    assert lm.dtype == mx.float32
