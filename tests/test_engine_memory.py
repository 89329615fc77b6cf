"""MemoryLM and the buffers of its memories: what is given back, and when; reading ahead."""

from __future__ import annotations

import gc
import shutil
import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step

from mlx_hiermem import load
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.errors import FormatError, InputError
from tests.tiny import make_tiny_model

TEXTS = ["the gold of the north", "a city by the sea", "iron gates", "who wrote the book of kings?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # float32, as the anchor: the model computes from the bank's own buffers.
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", ranks=(4, 2, 2))


@pytest.fixture
def lm(folder):
    lm = load(folder, tiers="disk")
    yield lm
    lm.bank.close()


@pytest.fixture(scope="module")
def answers(folder):
    """What each text is answered, each by a model of its own."""
    return {text: load(folder).generate(text, max_tokens=12) for text in TEXTS}


def sources(response):
    return [block.source for block in response.fetch.blocks]


def test_one_buffer_serves_one_answer_after_the_other(lm, answers):
    for _ in range(3):
        for text in TEXTS:
            assert lm.generate(text, max_tokens=12) == answers[text]
    assert lm.bank.slots_made == 1


def test_an_answer_about_the_same_topic_reads_nothing(lm):
    first = next(lm.stream(TEXTS[0], max_tokens=4))
    again = next(lm.stream(TEXTS[0], max_tokens=4))
    assert sources(first) == ["disk"] * 3 and sources(again) == ["kept"] * 3
    ids = again.path.ids
    sibling = ids[-1] + 1 if ids[-1] % 3 == 0 else ids[-1] - 1
    changed = next(lm.stream(TEXTS[0], (*ids[:-1], sibling), max_tokens=4))
    assert sources(changed) == ["kept", "kept", "disk"]


def test_answers_that_take_turns_do_not_meet(lm, answers):
    """Several streams at once, in one thread: each has its buffer, to its end."""
    streams = {text: lm.stream(text, max_tokens=12) for text in TEXTS}
    found = dict.fromkeys(TEXTS, "")
    while streams:
        for text, stream in list(streams.items()):
            piece = next(stream, None)
            if piece is None:
                del streams[text]
                lm.generate(TEXTS[len(streams)], max_tokens=2)  # takes what was given back
            else:
                found[text] += piece.text
    assert found == answers


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_stream_that_is_closed_gives_its_buffer_back(lm, answers, after):
    for text in TEXTS:
        stream = lm.stream(text, max_tokens=12)
        for _ in range(after):
            next(stream)
        stream.close()
        assert lm.generate(text, max_tokens=12) == answers[text]
    assert lm.bank.slots_made == 1


def test_lazy_readers_left_by_an_error_see_their_own_memory(lm):
    """A callback keeps what it was given, unevaluated, and fails: the buffer must not be reused."""
    kept = []

    def keep_and_fail(tokens, logits):
        kept.append(logits * 1)
        if len(kept) == 3:
            raise RuntimeError("no more")
        return logits

    expected = []
    for text in TEXTS:
        kept.clear()
        with pytest.raises(RuntimeError, match="no more"):
            list(lm.stream(text, max_tokens=12, logits_processors=[keep_and_fail]))
        lazy = list(kept)
        again = []

        def keep(tokens, logits, again=again):
            again.append(np.array(logits))
            return logits

        list(load(lm.bank.folder.parent).stream(text, max_tokens=3, logits_processors=[keep]))
        expected.append((lazy, again))
    for other in TEXTS:  # whatever could be overwritten is, by now
        lm.generate(other, max_tokens=3)
    for lazy, again in expected:
        for ours, theirs in zip(lazy, again, strict=False):
            np.testing.assert_array_equal(np.array(ours), theirs)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # MLX's streams
def test_a_stream_that_another_thread_closes_keeps_its_buffer(lm, answers):
    stream = lm.stream(TEXTS[0], max_tokens=12)
    next(stream)
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join()
    for text in TEXTS:
        assert lm.generate(text, max_tokens=12) == answers[text]
    assert lm.bank.slots_made == 2


def test_a_prompt_cache_keeps_its_memory(lm, answers):
    """What is handed out is never taken back, however long it waits."""
    caches = {text: lm.prompt_cache("fetched", text) for text in TEXTS}
    for text in reversed(TEXTS):
        lm.generate(text, max_tokens=3)
    for text, cache in caches.items():
        tokens = mx.array(lm.tokenize(text))
        steps = generate_step(tokens, lm.model, max_tokens=12, prompt_cache=cache)
        assert lm.tokenizer.decode([int(token) for token, _ in steps]) == answers[text]


def test_a_batch_of_different_memories(lm, answers):
    generator = BatchGenerator(lm.model, stop_tokens=[[t] for t in lm.tokenizer.eos_token_ids])
    fetched = lm.fetch_batch("fetched", TEXTS)
    caches = [lm.model.make_cache(one.memory) for one in fetched]
    ids = generator.insert([lm.tokenize(t) for t in TEXTS], max_tokens=[12] * 4, caches=caches)
    tokens = {uid: [] for uid in ids}
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
    generator.close()
    for one in fetched:
        one.release()
    assert lm.fetch_batch("fetched", []) == []
    found = [lm.tokenizer.decode(tokens[uid]) for uid in ids]
    assert found == [answers[text] for text in TEXTS]


def test_scores_and_perplexity_reuse_buffers(lm, folder):
    fresh = load(folder)
    for text in TEXTS * 2:
        assert lm.score(text, " gold")[0] == pytest.approx(fresh.score(text, " gold")[0])
    assert lm.bank.slots_made == 1
    for _ in range(3):
        assert lm.perplexity(TEXTS) == pytest.approx(fresh.perplexity(TEXTS))
    assert lm.bank.slots_made <= 1 + 2 * len(TEXTS)


# ---- prefetch --------------------------------------------------------------------------


def test_prefetch_by_text(lm, answers):
    for text in TEXTS:
        path = lm.prefetch(text)
        assert path == lm.route(text)
        assert lm.bank.prefetch(path.ids).wait(10)
        first = next(lm.stream(text, max_tokens=4))
        assert set(sources(first)) <= {"prefetched", "kept"}
        assert "prefetched" in sources(first)
        assert lm.generate(text, max_tokens=12) == answers[text]
    assert lm.prefetch("  ") is None
    with pytest.raises(InputError, match="not valid Unicode"):
        lm.prefetch("\ud800")


def test_prefetch_waits_for_a_running_answer_and_does_not_change_it(lm, answers, monkeypatch):
    begun = []
    prefetch = lm.bank.prefetch
    monkeypatch.setattr(lm.bank, "prefetch", lambda ids: begun.append(ids) or prefetch(ids))
    answer = ""
    for number, piece in enumerate(lm.stream(TEXTS[0], max_tokens=12)):
        answer += piece.text
        lm.prefetch(TEXTS[1 + number % 3])  # somebody types
        assert not begun
    assert answer == answers[TEXTS[0]]
    assert begun == [lm.route(TEXTS[1 + number % 3]).ids]
    assert lm.generate(TEXTS[1 + number % 3], max_tokens=12) == answers[TEXTS[1 + number % 3]]


def test_prefetch_after_an_answer_that_was_stopped(lm):
    stream = lm.stream(TEXTS[0], max_tokens=12)
    next(stream)
    lm.prefetch(TEXTS[1])
    stream.close()
    assert lm.bank.prefetch(lm.route(TEXTS[1]).ids).wait(10)
    assert "prefetched" in sources(next(lm.stream(TEXTS[1], max_tokens=1)))


# ---- NaN -------------------------------------------------------------------------------


def test_a_block_of_nan_is_told_and_not_answered_with(tmp_path, folder):
    lm = load(folder)
    config, memory = lm.bank.config, tmp_path / "memory"
    shutil.copytree(folder / "memory", memory)
    levels = {
        level: np.full((config.clusters(level), config.block_size(level)), np.nan, np.float32)
        for level in config.memory_levels
    }
    write_bank(memory, config, levels, np.zeros(config.fetch_size(), np.float32))
    broken = load(folder, bank=memory)
    says = "NaN in place of probabilities; `mlx_hiermem bank verify` finds"
    with pytest.raises(FormatError, match=says):
        broken.generate(TEXTS[0])
    with pytest.raises(FormatError, match=says):
        broken.score(TEXTS[0], " gold")
    with pytest.raises(FormatError, match=says):
        broken.perplexity(TEXTS)
    assert broken.generate(TEXTS[0], "generic", max_tokens=3)
    checked = load(folder, bank=memory, check_blocks=True, tiers="disk")
    with pytest.raises(FormatError, match="block .* of level 1 holds NaN or infinite numbers"):
        checked.generate(TEXTS[0])
    with pytest.raises(FormatError, match="block 0 of level 1 holds NaN or infinite numbers"):
        broken.bank.verify()


def test_nothing_is_left_of_many_answers(lm):
    gc.collect()
    before = mx.get_active_memory()
    for number in range(40):
        lm.generate(TEXTS[number % 4], max_tokens=2)
    gc.collect()
    assert mx.get_active_memory() - before < 2 * 4 * lm.bank.config.fetch_size()
