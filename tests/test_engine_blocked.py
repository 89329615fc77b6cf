"""Blocks that are blocked for one fetch, one answer or one conversation, and on for all others."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_hiermem import load
from mlx_hiermem.conversation import Conversation
from mlx_hiermem.errors import PathError
from tests.tiny import make_tiny_model
from tests.topics import A, B, follower, sources, tokens_of

PROMPT = "Oslo lies in"
COUNT = 20


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request, tmp_path_factory):
    """A model of three levels; in float32 it computes from the bank's own buffers."""
    where = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_model(where, ranks=(4, 2, 2), dtype=request.param)


@pytest.fixture(params=["disk", "resident", "cached"])
def lm(request, folder):
    lm = load(folder, tiers=request.param)
    yield lm
    lm.bank.close()


def numbers(fetched):
    """A copy of a memory, which is given back."""
    memory = np.array(fetched.memory.astype(mx.float32))
    fetched.release()
    return memory


def blocked_in_the_bank(lm, blocks):
    """What the bank's own blocking gives: the memory, the answer, what is reported."""
    for block in blocks:
        lm.bank.block(*block)
    try:
        fetched = lm.fetch("fetched", PROMPT)
        return numbers(fetched), lm.generate(PROMPT, max_tokens=COUNT), told(fetched)
    finally:
        for block in blocks:
            lm.bank.unblock(*block)


def told(fetched):
    return [(b.level, b.cluster, b.bytes, b.blocked) for b in fetched.report.blocks]


@pytest.mark.parametrize("levels", [(1,), (3,), (1, 2, 3)])
def test_as_blocked_in_the_bank(lm, levels):
    path = lm.route(PROMPT).ids
    blocks = [(level, path[level - 1]) for level in levels]
    memory, text, report = blocked_in_the_bank(lm, blocks)
    plain = numbers(lm.fetch("fetched", PROMPT))
    answer = lm.generate(PROMPT, max_tokens=COUNT)
    assert answer != text
    for _ in range(2):  # also from buffers that hold what the other has left there
        fetched = lm.fetch("fetched", PROMPT, blocked=blocks)
        assert told(fetched) == report
        np.testing.assert_array_equal(numbers(fetched), memory)
        assert lm.generate(PROMPT, max_tokens=COUNT, blocked=blocks) == text
        np.testing.assert_array_equal(numbers(lm.fetch("fetched", PROMPT)), plain)
        assert lm.generate(PROMPT, max_tokens=COUNT) == answer
    assert lm.bank.blocked == frozenset()


def test_beside_those_of_the_bank(lm):
    path = lm.route(PROMPT).ids
    both, text, report = blocked_in_the_bank(lm, [(1, path[0]), (2, path[1])])
    lm.bank.block(1, path[0])
    fetched = lm.fetch("fetched", PROMPT, blocked=[(2, path[1])])
    assert told(fetched) == report
    np.testing.assert_array_equal(numbers(fetched), both)
    assert lm.generate(PROMPT, max_tokens=COUNT, blocked=[(2, path[1])]) == text
    assert lm.bank.blocked == {(1, path[0])}
    lm.bank.unblock(1, path[0])


def test_blocks_beside_the_path_change_nothing(lm):
    path = lm.route(PROMPT).ids
    beside = [(level, cluster) for level in (1, 2) for cluster in range(3)]
    beside = [(level, cluster) for level, cluster in beside if path[level - 1] != cluster]
    answer = lm.generate(PROMPT, max_tokens=COUNT)
    assert lm.generate(PROMPT, max_tokens=COUNT, blocked=beside) == answer
    for memory in ("generic", "none"):
        answer = lm.generate(PROMPT, memory, COUNT)
        assert lm.generate(PROMPT, memory, COUNT, blocked=[(1, i) for i in range(3)]) == answer


def test_a_batch_is_fetched_without_them(lm):
    texts = [PROMPT, "gold", PROMPT, "a b c d"]
    path = lm.route(PROMPT).ids
    blocks = [(1, path[0]), (3, path[2])]
    expected = [numbers(lm.fetch("fetched", text, blocks)) for text in texts]
    found = lm.fetch_batch("fetched", texts, blocks)
    assert [told(one)[0][3] for one in found][0]
    copies = [np.array(one.memory.astype(mx.float32)) for one in found]
    for one in found:
        one.release()
    for copy, wanted in zip(copies, expected, strict=True):
        np.testing.assert_array_equal(copy, wanted)


def test_buffers_are_given_back(lm):
    blocks = [(1, lm.route(PROMPT).ids[0])]

    def both():
        lm.generate(PROMPT, max_tokens=2)
        lm.generate(PROMPT, max_tokens=2, blocked=blocks)

    both()
    made = lm.bank.slots_made
    for _ in range(5):
        both()
    assert lm.bank.slots_made == made


@pytest.mark.parametrize("memory", ["fetched", "generic", "none"])
@pytest.mark.parametrize("wrong", [[(4, 0)], [(1, 3)], [(1, -1)], [(1,)], [1], [(1, 0.0)]], ids=str)
def test_blocks_that_do_not_exist(lm, wrong, memory):
    with pytest.raises(PathError):
        lm.fetch(memory, PROMPT, blocked=wrong)
    assert not lm.bank.uses


# ---- answers and conversations ---------------------------------------------------------


def test_an_answer_that_changes_its_memory_stays_without_them(lm, monkeypatch):
    blocks = [(1, A[0]), (2, B[1]), (3, B[2])]

    def answer(**options):
        monkeypatch.setattr(lm, "route", follower([], A, B))
        return list(lm.stream(PROMPT, max_tokens=COUNT, refetch="tokens:4", **options))

    for block in blocks:
        lm.bank.block(*block)
    expected = answer()
    for block in blocks:
        lm.bank.unblock(*block)
    pieces = answer(blocked=blocks)
    assert tokens_of(pieces) == tokens_of(expected) != tokens_of(answer())
    assert pieces[-1].refetches == 1
    assert [source == "blocked" for source in sources(pieces[0])] == [True, False, False]
    assert [source == "blocked" for source in sources(pieces[-1])] == [A[0] == B[0], True, True]


def test_an_answer_is_not_fetched_anew_for_the_same_blocks(lm, monkeypatch):
    monkeypatch.setattr(lm, "route", follower([], A))
    pieces = list(lm.stream(PROMPT, max_tokens=9, refetch="tokens:2", blocked=[(1, A[0])]))
    assert pieces[-1].refetches == 0


def test_a_conversation_without_them(lm, monkeypatch):
    """No chat template: each turn is a prompt of its own. With one, see test_conversation."""
    monkeypatch.setattr(lm, "route", follower([], A))
    talk = Conversation(lm, blocked=[(1, A[0])])
    pieces = list(talk.answer(PROMPT, COUNT))
    expected = list(lm.stream(PROMPT, max_tokens=COUNT, blocked=[(1, A[0])]))
    assert tokens_of(pieces) == tokens_of(expected)
    assert sources(pieces[0])[0] == "blocked"
