"""Blocks that are off for one visitor: as if blocked in the bank, and on for all others."""

from __future__ import annotations

import mlx.core as mx
import pytest

from apps.demo.own_blocks import OwnBlocksLM
from mlx_hiermem import load
from tests.tiny import make_tiny_model

PROMPT = "Oslo lies in"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def lm(request, tmp_path_factory):
    return load(make_tiny_model(tmp_path_factory.mktemp("model"), dtype=request.param))


def blocked(lm, *blocks):
    for block in blocks:
        lm.bank.block(*block)
    try:
        fetched = lm.fetch("fetched", PROMPT)
        memory = mx.array(fetched.memory)
        mx.eval(memory)
        fetched.release()
        return memory, lm.generate(PROMPT, max_tokens=20), fetched.report
    finally:
        for block in blocks:
            lm.bank.unblock(*block)


@pytest.mark.parametrize("levels", [(1,), (2,), (1, 2)])
def test_as_blocked_in_the_bank(lm, levels):
    path = lm.route(PROMPT).ids
    blocks = [(level, path[level - 1]) for level in levels]
    plain = lm.generate(PROMPT, max_tokens=20)
    memory, text, report = blocked(lm, *blocks)
    own = OwnBlocksLM(lm, blocks)
    fetched = own.fetch("fetched", PROMPT)
    assert mx.array_equal(fetched.memory, memory)
    assert own.generate(PROMPT, max_tokens=20) == text != plain
    assert [(b.level, b.cluster, b.bytes, b.blocked) for b in fetched.report.blocks] == [
        (b.level, b.cluster, b.bytes, b.blocked) for b in report.blocks
    ]
    assert lm.bank.blocked == frozenset()
    assert lm.generate(PROMPT, max_tokens=20) == plain


def test_blocks_that_are_not_on_the_path_change_nothing(lm):
    path = lm.route(PROMPT).ids
    own = OwnBlocksLM(lm, [(1, (path[0] + 1) % 3), (2, (path[1] + 1) % 9)])
    assert own.generate(PROMPT, max_tokens=20) == lm.generate(PROMPT, max_tokens=20)
    for memory in ("generic", "none"):
        every = OwnBlocksLM(lm, [(level, i) for level in (1, 2) for i in range(9)])
        assert every.generate(PROMPT, memory, 20) == lm.generate(PROMPT, memory, 20)


def test_its_buffers_are_given_back(lm):
    lm.generate(PROMPT, max_tokens=2)
    own = OwnBlocksLM(lm, [(1, lm.route(PROMPT).ids[0])])
    own.generate(PROMPT, max_tokens=2)
    made = lm.bank.slots_made
    for _ in range(5):
        own.generate(PROMPT, max_tokens=2)
    assert lm.bank.slots_made == made
