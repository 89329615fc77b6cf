"""Prefixes are reused under the very same memory, and under no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_hiermem import load
from mlx_hiermem.serving.job import Sampling
from mlx_hiermem.serving.prompts import PromptCache
from mlx_hiermem.serving.scheduler import Scheduler
from tests.serving.serving_lm import WAIT, answers, ids, job, memory, read, running

PROMPT = "gold is what the people of old cities wanted"

#: Every one is asked for otherwise. Two pairs have the same numbers: "another text" is on the path
#: of "another branch", and with both blocks off there is no memory left.
CHOICES = {
    "fetched": memory(route_on="gold is"),
    "another text": memory(route_on="what is the capital of the country?"),
    "generic": memory("generic"),
    "none": memory("none"),
    "path": memory((1, 4)),
    "another leaf": memory((1, 5)),
    "another branch": memory((2, 8)),
    "one block": memory((1, 4), {(1, 1)}),
    "another block": memory((1, 4), {(2, 4)}),
    "both blocks": memory((1, 4), {(1, 1), (2, 4)}),
}


@pytest.fixture(scope="module")
def fresh(folder):
    """The answers of a scheduler that keeps nothing."""
    with running(folder, prompt_cache_bytes=0) as scheduler:
        found = {
            name: read(scheduler.submit(job(PROMPT, choice, 20)))
            for name, choice in CHOICES.items()
        }
        assert scheduler.stats()["prompt_cache_entries"] == 0
    assert len({one.text for one in found.values()}) == len(CHOICES) - 2
    assert {one.started.cached_tokens for one in found.values()} == {0}
    return {name: one.text for name, one in found.items()}


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
def test_another_memory_never_reuses_and_the_same_does(folder, fresh, order):
    names = [*CHOICES][::order]
    with running(folder) as scheduler:
        first, again = (
            {name: read(scheduler.submit(job(PROMPT, CHOICES[name], 20))) for name in names}
            for _ in range(2)
        )
    # Whatever was asked before, with each of the others.
    assert {one.started.cached_tokens for one in first.values()} == {0}
    # One token is left to be fed.
    assert {one.started.cached_tokens for one in again.values()} == {len(PROMPT) - 1}
    assert {one.end.cached_tokens for one in again.values()} == {len(PROMPT) - 1}
    for found in (first, again):
        assert {name: one.text for name, one in found.items()} == fresh


def with_bank(folder) -> tuple[Scheduler, Any]:
    """A scheduler that was started, and its bank."""
    banks = []

    def loaded():
        lm = load(folder)
        banks.append(lm.bank)
        return lm

    scheduler = Scheduler(loaded)
    scheduler.start()
    return scheduler, banks[0]


def test_another_revision_never_reuses(folder, fresh):
    scheduler, bank = with_bank(folder)
    asked = job(PROMPT, CHOICES["path"], 20)
    found = []
    for revision in ("a", "a", "b", "b", "a"):
        bank.revision = revision
        found.append(read(scheduler.submit(asked)))
    scheduler.close()
    left = len(PROMPT) - 1
    assert [one.started.cached_tokens for one in found] == [0, left, 0, left, left]
    assert {one.text for one in found} == {fresh["path"]}


def test_a_block_that_is_switched_off_for_all_never_reuses(folder, fresh):
    scheduler, bank = with_bank(folder)
    asked = job(PROMPT, CHOICES["path"], 20)
    assert read(scheduler.submit(asked)).text == fresh["path"]
    bank_fetch = bank.fetch

    def switched_off(*args, **options):  # in the thread of the bank, which alone may do it
        bank.block(2, 4)
        return bank_fetch(*args, **options)

    bank.fetch = switched_off
    found = read(scheduler.submit(asked))
    scheduler.close()
    assert found.started.cached_tokens == 0 and found.text == fresh["another block"]


def test_a_conversation_goes_on_where_it_was(folder):
    choice = CHOICES["path"]
    with running(folder) as scheduler, running(folder, prompt_cache_bytes=0) as anew:
        first = read(scheduler.submit(job(PROMPT, choice, 20)))
        longer = job(PROMPT + first.text + " and why", choice, 20)
        second = read(scheduler.submit(longer))
        # All of the answer was fed but for what the new text differs in.
        assert second.started.cached_tokens == len(PROMPT) + 20
        deeper = replace(longer, tokens=longer.tokens + list(ids(second.text + "!")))
        fourth = read(scheduler.submit(deeper))
        assert fourth.started.cached_tokens == len(longer.tokens) + 20
        same = job(PROMPT + first.text, choice, 20)
        with running(folder) as other:  # the very text that is kept, one of which is left to be fed
            read(other.submit(job(PROMPT, choice, 20)))
            again = read(other.submit(same))
        assert again.started.cached_tokens == len(same.tokens) - 1
        branch = job(PROMPT[:20] + "never", choice, 20)
        third = read(scheduler.submit(branch))
        assert third.started.cached_tokens == 20
        expected = [one.text for one in answers(anew, [longer, deeper, same, branch])]
        assert [second.text, fourth.text, again.text, third.text] == expected


def test_penalties_see_what_is_reused(folder):
    asked = job(PROMPT, CHOICES["path"], 20)
    held = replace(asked, sampling=Sampling(temperature=0.0, presence_penalty=100.0))
    with running(folder) as scheduler, running(folder, prompt_cache_bytes=0) as anew:
        read(scheduler.submit(asked))
        found = read(scheduler.submit(held))
        assert found.started.cached_tokens == len(PROMPT) - 1
        assert found.text == read(anew.submit(held)).text
    assert not set(found.text[:3]) & set(PROMPT[-15:])


def test_what_is_reused_by_many_at_once(folder, fresh):
    """Copies: requests that begin alike do not write into each other's keys and values."""
    with running(folder) as scheduler:
        read(scheduler.submit(job(PROMPT, CHOICES["path"], 20)))
        jobs = [job(PROMPT, CHOICES["path"], 20), job(PROMPT + "!", CHOICES["path"], 20)] * 3
        jobs += [job(PROMPT, CHOICES["generic"], 20)]
        found = answers(scheduler, jobs)
    assert {one.text for one in found[:-1:2]} == {fresh["path"]}
    assert len({one.text for one in found[1:-1:2]}) == 1
    assert found[-1].text == fresh["generic"]
    assert [bool(one.started.cached_tokens) for one in found] == [True] * 6 + [False]


def test_a_stopped_answer_is_kept_and_a_cancelled_one_is_not(folder, fresh):
    asked = job(PROMPT, CHOICES["path"], 20)
    with running(folder) as scheduler:
        handle = scheduler.submit(replace(asked, max_tokens=200))
        events = handle.events(WAIT)
        next(events), next(events)
        handle.cancel()
        assert list(events)[-1].reason == "cancelled"
        assert scheduler.stats()["prompt_cache_entries"] == 0
        stopped = read(scheduler.submit(replace(asked, stop=(fresh["path"][4:7],))))
        assert stopped.end.reason == "stop"
        again = read(scheduler.submit(asked))
        assert again.started.cached_tokens == len(PROMPT) - 1
        assert again.text == fresh["path"]


def test_the_budget_of_bytes_holds(folder):
    per_token = 2 * 2 * 16 * 4  # keys and values, layers, width, float32
    budget = 100 * per_token
    with running(folder, prompt_cache_bytes=budget) as scheduler:
        for number in range(12):
            read(scheduler.submit(job(f"{number:x} is a number", CHOICES["path"], 10)))
            assert 0 < scheduler.stats()["prompt_cache_bytes"] <= budget
        assert scheduler.stats()["prompt_cache_entries"] == 4
        old = read(scheduler.submit(job("0 is a number", CHOICES["path"], 10)))
        assert old.started.cached_tokens == 0
        # What alone is more than the budget is not kept, and drives nothing out.
        read(scheduler.submit(job("x" * 120, CHOICES["path"], 10)))
        new = read(scheduler.submit(job("0 is a number", CHOICES["path"], 10)))
        assert new.started.cached_tokens == 12


def test_memories_that_are_gone_leave_nothing_behind(folder):
    lm = load(folder)
    kept = PromptCache(max_bytes=1 << 20, max_entries=2)
    for number in range(50):
        cache = lm.model.make_cache()
        lm.model(mx.array([list(ids("gold"))]), cache=cache)
        kept.put(("key", number), list(ids("gold")), cache[:-1])
    assert len(kept) == 2
    assert sum(len(tree) for tree in kept._lru._trie._trie.values()) == 2
