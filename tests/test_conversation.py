"""Conversation: which memory a turn has, and how much of the KV cache it takes over."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_hiermem import load
from mlx_hiermem.conversation import Conversation, chat_tokens
from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.refetch import DEFAULT_KV_CACHE, KV_CACHES, Refetch
from mlx_hiermem.routing.tree import ClusterPath
from tests.topics import A, B, make_chat_models

COUNT = 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_chat_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def lm(folders, request, monkeypatch):
    """Texts with a b in them lead to B, all others to A."""
    lm = load(folders[getattr(request, "param", "chat")], tiers="disk")
    monkeypatch.setattr(lm, "route", lambda text: ClusterPath(B if "b" in text else A, ()))
    yield lm
    lm.bank.close()


@pytest.fixture
def fed(lm, monkeypatch):
    """How many tokens each call of the model was given."""
    lengths, call = [], type(lm.model).__call__

    def counted(self, inputs, *arguments, **options):
        lengths.append(inputs.shape[1])
        return call(self, inputs, *arguments, **options)

    monkeypatch.setattr(type(lm.model), "__call__", counted)
    return lengths


def say(conversation, text, count=COUNT, **options):
    """The tokens of an answer, and its last piece."""
    pieces = list(conversation.answer(text, count, **options))
    return [piece.token for piece in pieces], pieces[-1]


def scratch(lm, conversation, text, memory):
    """The same turn from an empty cache."""
    prompt = chat_tokens(lm, [*conversation.messages, {"role": "user", "content": text}])
    return [piece.token for piece in lm.stream(prompt, memory, COUNT)]


def by_hand(lm, turns):
    """Greedy decoding through a conversation in which no key or value is ever made anew.

    Args:
        turns: per turn the path of its memory, and the tokens that it adds before its answer.
    """
    cache, answers = lm.model.make_cache(None), []
    for path, tokens in turns:
        cache[-1] = lm.model.memory_entry(lm.fetch(path).memory)
        answers.append([])
        for _ in range(COUNT):
            logits = lm.model(mx.array([tokens]), cache=cache)
            tokens = [logits[0, -1].argmax().item()]
            answers[-1] += tokens
        lm.model(mx.array([tokens]), cache=cache)
    return answers


# ---- what is taken over ----------------------------------------------------------------


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("when", ["turn", "never", "tokens:3"])
def test_with_one_topic_only_new_tokens_are_fed(lm, fed, when, kv_cache):
    # So that what is said stays on the topic, whatever it is.
    lm.route = lambda text: ClusterPath(A, ())
    conversation = Conversation(lm, refetch=Refetch.parse(when, kv_cache))
    known = 0
    for text in ("gold", "iron", "of the north", "x"):
        expected = scratch(lm, conversation, text, A)
        fed.clear()
        tokens, last = say(conversation, text)
        assert tokens == expected
        assert last.path.ids == A and last.memory == "fetched"
        assert last.cached_tokens == known
        assert last.prompt_tokens == len(chat_tokens(lm, conversation.messages[:-1]))
        assert sum(fed) == last.prompt_tokens - known + COUNT
        known = last.prompt_tokens + COUNT
        assert len(conversation.kept) == known
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 4


def test_a_new_topic_recomputed_is_a_run_from_scratch(lm, fed):
    conversation = Conversation(lm, refetch=Refetch("turn", kv_cache="recompute"))
    for text, path, reused in (("gold", A, 0), ("book", B, 0), ("by", B, 1), ("iron", A, 0)):
        expected = scratch(lm, conversation, text, path)
        fed.clear()
        tokens, last = say(conversation, text)
        assert tokens == expected and last.path.ids == path
        assert bool(last.cached_tokens) == reused
        assert sum(fed) == last.prompt_tokens - last.cached_tokens + COUNT


def test_a_new_topic_with_what_is_kept(lm, fed):
    conversation = Conversation(lm, refetch=Refetch("turn", kv_cache="keep"))
    assert DEFAULT_KV_CACHE == "keep" and Conversation(lm).refetch == conversation.refetch
    texts, paths = ("gold", "book", "iron"), (A, B, A)
    turns = [(A, lm.tokenize("u:gold\na:"))]
    turns += [(path, lm.tokenize(f"\nu:{text}\na:")) for text, path in zip(texts[1:], paths[1:],
                                                                        strict=True)]  # fmt: skip
    expected = by_hand(lm, turns)
    found, fresh = [], []
    for text, path, (_, new) in zip(texts, paths, turns, strict=True):
        fresh.append(scratch(lm, conversation, text, path))
        fed.clear()
        tokens, last = say(conversation, text)
        found.append(tokens)
        assert last.path.ids == path and sum(fed) == len(new) + COUNT
    assert found == expected
    assert found[0] == fresh[0] and found[1:] != fresh[1:]  # a mixed state is not a fresh one


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_never_keeps_the_first_memory(lm, kv_cache):
    conversation = Conversation(lm, refetch=Refetch("never", kv_cache=kv_cache))
    for number, text in enumerate(("gold", "book", "by")):
        expected = scratch(lm, conversation, text, A)
        tokens, last = say(conversation, text)
        assert tokens == expected
        assert last.path.ids == A and last.memory == "fetched"
        assert bool(last.cached_tokens) == (number > 0)
    conversation.reset()
    assert conversation.messages == [] and len(conversation.kept) == 0
    assert say(conversation, "book")[1].path.ids == B


def test_a_mixed_state_is_recomputed_once_that_is_asked_for(lm):
    conversation = Conversation(lm)
    say(conversation, "gold")
    assert say(conversation, "book")[1].cached_tokens
    conversation.refetch = Refetch("turn", kv_cache="recompute")
    expected = scratch(lm, conversation, "by", B)
    tokens, last = say(conversation, "by")
    assert tokens == expected and last.cached_tokens == 0
    assert say(conversation, "bee")[1].cached_tokens


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_topics_that_change_within_answers(lm, monkeypatch, kv_cache):
    """What an answer has changed counts for the next turn."""
    ahead = []
    monkeypatch.setattr(lm, "route", lambda text: ClusterPath(ahead.pop(0), ()))
    conversation = Conversation(lm, refetch=Refetch("tokens", 4, kv_cache))
    ahead[:] = [A, B, B]
    last = say(conversation, "gold")[1]
    assert (last.path.ids, last.refetches) == (B, 1)
    ahead[:] = [B, B, B]
    expected = scratch(lm, conversation, "iron", B)
    tokens, last = say(conversation, "iron")
    assert last.cached_tokens and last.refetches == 0
    assert (tokens == expected) == (kv_cache == "recompute")
    ahead[:] = [A, A, A]
    expected = scratch(lm, conversation, "x", A)
    tokens, last = say(conversation, "x")
    assert (tokens == expected) == (last.cached_tokens == 0) == (kv_cache == "recompute")


def test_what_an_answer_has_mixed_is_recomputed_too(lm, monkeypatch):
    ahead = [A, B, B, A]
    monkeypatch.setattr(lm, "route", lambda text: ClusterPath(ahead.pop(0), ()))
    conversation = Conversation(lm, refetch="tokens:4")
    say(conversation, "gold")
    conversation.refetch = Refetch("turn", kv_cache="recompute")
    expected = scratch(lm, conversation, "iron", A)
    tokens, last = say(conversation, "iron")
    assert tokens == expected and last.cached_tokens == 0


@pytest.mark.parametrize("lm", ["rewriting"], indirect=True)
def test_a_template_that_rewrites_answers(lm, fed):
    conversation = Conversation(lm)
    for number, text in enumerate(("gold", "iron", "x")):
        expected = scratch(lm, conversation, text, A)
        fed.clear()
        tokens, last = say(conversation, text)
        assert tokens == expected
        assert sum(fed) == last.prompt_tokens - last.cached_tokens + COUNT
        if number == 1:
            assert last.cached_tokens == len("u:gold\na:") + 2


@pytest.mark.parametrize("lm", ["chat", "rewriting"], indirect=True)
def test_caches_that_cannot_be_trimmed(lm, monkeypatch):
    from mlx_lm.models.cache import KVCache

    monkeypatch.setattr(KVCache, "is_trimmable", lambda self: False)
    conversation = Conversation(lm)
    say(conversation, "gold")
    expected = scratch(lm, conversation, "iron", A)
    tokens, last = say(conversation, "iron")
    assert tokens == expected
    # Where the turn goes on from the very end of the last one, nothing has to be trimmed.
    assert bool(last.cached_tokens) == ("~" not in lm.tokenizer.chat_template)


def test_a_block_that_is_blocked_between_turns(lm):
    for when, kv_cache in (("turn", "recompute"), ("never", "recompute")):
        conversation = Conversation(lm, refetch=Refetch(when, kv_cache=kv_cache))
        say(conversation, "gold")
        lm.bank.block(1, A[0])
        expected = scratch(lm, conversation, "iron", A)
        tokens, last = say(conversation, "iron")
        assert tokens == expected and last.cached_tokens == 0
        assert last.fetch.blocks[0].source == "blocked"
        assert say(conversation, "iron")[1].cached_tokens
        lm.bank.unblock(1, A[0])


def test_a_block_that_one_conversation_does_without(lm):
    conversation = Conversation(lm, refetch=Refetch("turn", kv_cache="recompute"))
    say(conversation, "gold")
    conversation.blocked = [(1, A[0])]
    lm.bank.block(1, A[0])
    expected = scratch(lm, conversation, "iron", A)
    lm.bank.unblock(1, A[0])
    assert scratch(lm, conversation, "iron", A) != expected
    tokens, last = say(conversation, "iron")
    assert tokens == expected and last.cached_tokens == 0
    assert last.fetch.blocks[0].source == "blocked"
    assert say(conversation, "iron")[1].cached_tokens


def test_another_memory_between_turns(lm):
    conversation = Conversation(lm, refetch=Refetch("never", kv_cache="recompute"))
    say(conversation, "gold")
    for memory in ("generic", "none", "fetched"):
        conversation.memory = memory
        expected = scratch(lm, conversation, "book", A if memory == "fetched" else memory)
        tokens, last = say(conversation, "book")
        assert tokens == expected and last.cached_tokens == 0 and last.memory == memory


# ---- what goes wrong -------------------------------------------------------------------


def test_another_refetch_between_turns(lm):
    """By its words too; wrong ones are told at once, and change nothing."""
    conversation = Conversation(lm, refetch="never")
    say(conversation, "aaa")
    conversation.refetch = "turn"
    assert conversation.refetch == Refetch("turn")
    assert say(conversation, "bbb")[1].path.ids == B
    with pytest.raises(InputError, match="refetch"):
        conversation.refetch = "sometimes"
    assert conversation.refetch == Refetch("turn")


def test_an_answer_that_is_broken_off_was_never_said(lm):
    conversation = Conversation(lm)
    say(conversation, "gold")
    messages = list(conversation.messages)
    stream = conversation.answer("iron", COUNT)
    for _ in range(3):
        next(stream)
    stream.close()
    assert conversation.messages == messages
    for text in ("iron", "x"):
        expected = scratch(lm, conversation, text, A)
        assert say(conversation, text)[0] == expected
    assert lm.bank.slots_made == 1


def test_the_last_piece_is_enough(lm):
    """Who stops at the finish reason, without running off the end, has the whole turn."""
    conversation = Conversation(lm)
    stream = conversation.answer("gold", COUNT)
    while next(stream).finish_reason is None:
        pass
    assert len(conversation.messages) == 2
    stream.close()
    expected = scratch(lm, conversation, "iron", A)
    tokens, last = say(conversation, "iron")
    assert tokens == expected and last.cached_tokens


def test_two_answers_at_once_do_not_share_a_cache(lm):
    conversation = Conversation(lm)
    say(conversation, "gold")
    expected = [scratch(lm, conversation, text, A) for text in ("iron", "x")]
    streams = [conversation.answer(text, COUNT) for text in ("iron", "x")]
    found = [[], []]
    for _ in range(COUNT):
        for tokens, stream in zip(found, streams, strict=True):
            tokens.append(next(stream).token)
    assert found == expected


def test_an_error_leaves_nothing_behind(lm):
    conversation = Conversation(lm)
    say(conversation, "gold")
    messages = list(conversation.messages)

    def fails(tokens, logits):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        say(conversation, "iron", logits_processors=[fails])
    with pytest.raises(InputError, match="ends at 256"):
        say(conversation, "b" * 300)
    assert conversation.messages == messages and len(conversation.kept) == 0
    expected = scratch(lm, conversation, "iron", A)
    assert say(conversation, "iron")[0] == expected


def test_a_message_that_is_too_long_costs_nothing(lm):
    conversation = Conversation(lm)
    say(conversation, "gold")
    with pytest.raises(InputError, match="ends at 256"):
        say(conversation, "b" * 300)
    assert say(conversation, "iron")[1].cached_tokens


@pytest.mark.parametrize("lm", ["plain"], indirect=True)
@pytest.mark.parametrize("when", ["turn", "never", "tokens:3"])
def test_without_a_template_each_text_is_a_prompt_of_its_own(lm, when):
    # By its length: prompts of four letters lead to A, of five to B, and what is answered to A.
    lm.route = lambda text: ClusterPath(B if len(text) == 5 else A, ())
    conversation = Conversation(lm, refetch=when)
    assert not conversation.is_kept
    for text, path in (("gold", A), ("books", B)):
        tokens, last = say(conversation, text)
        expected = lm.stream(text, max_tokens=COUNT, refetch=when)
        assert tokens == [piece.token for piece in expected]
        assert last.cached_tokens == 0 and last.prompt_tokens == len(text)
        assert last.path.ids == (A if when == "tokens:3" else path)
        assert last.refetches == (when == "tokens:3" and path == B)
    assert conversation.messages == [] and len(conversation.kept) == 0


def test_a_template_that_fails(lm):
    lm.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(FormatError, match="cannot be applied .*no system"):
        say(Conversation(lm), "gold")
    with pytest.raises(InputError, match="expected never, turn, or tokens:N"):
        Conversation(lm, refetch="often")
