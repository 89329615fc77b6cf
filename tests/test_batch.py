"""mlx-lm's own loops, unchanged, with a memory for each sequence of a batch."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mlx_hiermem import load
from tests.tiny import make_tiny_model

COUNT = 16
#: Of different lengths; each is routed to another leaf.
PROMPTS = ["gold is", "what is the capital of the country?", "a b c d e f g"]
MEMORIES = ["fetched", "generic", "none", (1, 4)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load(make_tiny_model(tmp_path_factory.mktemp("model")))


def single(lm, prompt: str, memory="fetched", count: int = COUNT) -> list[int]:
    return [piece.token for piece in lm.stream(prompt, memory, count)]


def collect(generator: BatchGenerator, found: dict[int, list[int]], rounds: int = 10**6) -> None:
    while rounds and (responses := generator.next_generated()):
        for response in responses:
            found.setdefault(response.uid, []).append(response.token)
        rounds -= 1


def test_three_prompts_fetch_three_memories_in_one_batch(lm):
    paths = {lm.route(prompt).ids for prompt in PROMPTS}
    assert len(paths) == len({len(lm.tokenize(prompt)) for prompt in PROMPTS}) == 3
    expected = [single(lm, prompt) for prompt in PROMPTS]
    # Another memory would have given another answer.
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        for other in PROMPTS:
            if other != prompt:
                assert single(lm, prompt, lm.route(other).ids) != answer

    generator = BatchGenerator(lm.model, max_tokens=COUNT)
    uids = generator.insert(
        [lm.tokenize(prompt) for prompt in PROMPTS],
        caches=[lm.prompt_cache("fetched", prompt) for prompt in PROMPTS],
    )
    found: dict[int, list[int]] = {}
    collect(generator, found)
    generator.close()
    assert [found[uid] for uid in uids] == expected


@pytest.mark.parametrize("order", [MEMORIES, MEMORIES[::-1], ["none"] * 4], ids=str)
def test_any_mix_of_memories(lm, order):
    prompts = [*PROMPTS, "gold"]
    answer = batch_generate(
        lm.model,
        lm.tokenizer,
        [lm.tokenize(prompt) for prompt in prompts],
        prompt_caches=[
            lm.prompt_cache(memory, prompt) for memory, prompt in zip(order, prompts, strict=True)
        ],
        max_tokens=COUNT,
        return_token_ids=True,
    )
    expected = [single(lm, prompt, memory) for memory, prompt in zip(order, prompts, strict=True)]
    assert answer.token_ids == expected


def test_without_caches_memory_is_off(lm):
    answer = batch_generate(
        lm.model, lm.tokenizer, [lm.tokenize(p) for p in PROMPTS], max_tokens=COUNT
    )
    assert answer.texts == [lm.generate(p, "none", COUNT) for p in PROMPTS]


def test_sequences_that_come_and_go(lm):
    """Two end early, one comes while others are being decoded; the memories stay with theirs."""
    generator = BatchGenerator(lm.model, prefill_batch_size=2, prefill_step_size=4)
    counts = [3, COUNT, 7]

    def insert(these: list[int]) -> list[int]:
        return generator.insert(
            [lm.tokenize(PROMPTS[i]) for i in these],
            max_tokens=[counts[i] for i in these],
            caches=[lm.prompt_cache("fetched", PROMPTS[i]) for i in these],
        )

    found: dict[int, list[int]] = {}
    uids = insert([0, 1])
    collect(generator, found, rounds=2)
    uids += insert([2])
    collect(generator, found)
    generator.close()
    assert [found[uid] for uid in uids] == [
        single(lm, prompt, count=count) for prompt, count in zip(PROMPTS, counts, strict=True)
    ]


def test_one_with_a_memory_comes_to_several_without(lm):
    """Two prompts of different lengths, no memory; then one that has one."""
    generator = BatchGenerator(lm.model, max_tokens=COUNT)

    def insert(numbers: list[int], memory: str) -> list[int]:
        return generator.insert(
            [lm.tokenize(PROMPTS[i]) for i in numbers],
            caches=[lm.prompt_cache(memory, PROMPTS[i]) for i in numbers],
        )

    found: dict[int, list[int]] = {}
    uids = insert([0, 1], "none")
    collect(generator, found, rounds=3)
    uids += insert([2], "fetched")
    collect(generator, found)
    generator.close()
    assert [found[uid] for uid in uids] == [
        single(lm, PROMPTS[0], "none"),
        single(lm, PROMPTS[1], "none"),
        single(lm, PROMPTS[2]),
    ]


def test_a_batchs_caches_go_on_where_it_stopped(lm):
    first = batch_generate(
        lm.model,
        lm.tokenizer,
        [lm.tokenize(prompt) for prompt in PROMPTS],
        prompt_caches=[lm.prompt_cache("fetched", prompt) for prompt in PROMPTS],
        max_tokens=5,
        return_prompt_caches=True,
        return_token_ids=True,
    )
    for prompt, cache, tokens in zip(PROMPTS, first.caches, first.token_ids, strict=True):
        # The cache holds the last token already; it is given again to see what follows it.
        steps = generate_step(
            mx.array(tokens[-1:]), lm.model, prompt_cache=trimmed(cache, 1), max_tokens=4
        )
        assert tokens + [token for token, _ in steps] == single(lm, prompt, count=9)


def trimmed(cache: list, count: int) -> list:
    for entry in cache[:-1]:
        entry.trim(count)
    return cache


def test_mlx_lms_generate_answers_as_ours(lm):
    for prompt in PROMPTS:
        for memory in MEMORIES:
            theirs = mlx_lm.generate(
                lm.model, lm.tokenizer, prompt, max_tokens=COUNT,
                prompt_cache=lm.prompt_cache(memory, prompt),
            )  # fmt: skip
            assert theirs == lm.generate(prompt, memory, COUNT)


def test_mlx_lms_generate_without_a_cache_is_memory_off(lm):
    theirs = mlx_lm.generate(lm.model, lm.tokenizer, PROMPTS[0], max_tokens=COUNT)
    assert theirs == lm.generate(PROMPTS[0], "none", COUNT)


def test_prompt_cache_with_a_memory_survives_a_file(lm, tmp_path):
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, lm.prompt_cache("fetched", PROMPTS[0]))
    steps = generate_step(
        mx.array(lm.tokenize(PROMPTS[0])), lm.model, max_tokens=COUNT,
        prompt_cache=load_prompt_cache(file),
    )  # fmt: skip
    assert [token for token, _ in steps] == single(lm, PROMPTS[0])


def test_prefill_in_small_steps_keeps_the_memory(lm):
    pieces = lm.stream(PROMPTS[1], "fetched", COUNT, prefill_step_size=3)
    assert [piece.token for piece in pieces] == single(lm, PROMPTS[1])
