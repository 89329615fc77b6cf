"""Every public call from 8 threads at once: the answers of one thread, or a clear refusal.

Models and banks belong to the thread that opened them, and refuse any other (``owner``); their own
thread meanwhile gets its answers. What is bound to no thread answers all. ``thread_calls`` lists
both, and a test sees that no public name is missing there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest

import mlx_hiermem
from mlx_hiermem import ClusterTree, Encoder, MemoryBank, MemoryConfig, MemoryLM
from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.prefetch import Prefetch
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.report import FetchedMemory
from mlx_hiermem.conversation import Conversation
from mlx_hiermem.errors import FormatError, ThreadError
from mlx_hiermem.routing.bert import BertEncoder
from mlx_hiermem.serving.job import Handle
from mlx_hiermem.serving.scheduler import Scheduler
from tests.corpus.corpora import make_tiny_bert
from tests.reliability.thread_calls import COSTS, FREE, OWNED, TEXTS, Shared
from tests.serving.serving_lm import job, read, running
from tests.tiny import make_tiny_model

THREADS = 8
WAIT = 600.0


@pytest.fixture(params=["fast", pytest.param("soak", marks=pytest.mark.soak)])
def rounds(request, scaled):
    """How often each thread calls."""
    return 2 if request.param == "fast" else scaled(500)


@pytest.fixture
def note(request, figure):
    """Call with a name and a count; a figure, if this is a long run."""

    def record(name, count, detail):
        if request.node.get_closest_marker("soak"):
            figure(f"threads.{name}", count, detail)

    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("threads") / "tiny", ranks=(4, 2, 2))


@pytest.fixture(scope="module")
def shared(folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("shared")
    bert = make_tiny_bert(home / "bert")
    lm = mlx_hiermem.load(folder, tiers="disk")
    encoder = BertEncoder.load(folder=home, model="bert", max_length=32)
    yield Shared(folder, lm, encoder, bert.parent / "added.safetensors")
    lm.bank.close()


@pytest.fixture(autouse=True)
def small_steps():
    """Threads take turns after every few instructions, not every 5 milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@contextmanager
def together(work, count=THREADS):
    """``work(number)`` in so many threads at once; they end with it, and what they raise is raised.

    Gives a function that says whether some are still at work.
    """
    barrier, faults = threading.Barrier(count), []

    def run(number):
        try:
            barrier.wait(WAIT)
            work(number)
        except BaseException as error:
            faults.append(error)
        finally:
            mx.clear_streams()  # as MLX wants it of a thread that ends

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    yield lambda: any(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads), "they hang"
    if faults:
        raise faults[0]


@contextmanager
def refused():
    with pytest.raises(ThreadError) as error:
        yield
    check_refusal(error.value)


def check_refusal(error):
    text = str(error)
    assert "belongs to the thread that opened it (MainThread), and Thread-" in text, text
    assert text.isprintable()


@pytest.fixture(scope="module")
def expected(shared):
    """What each call gives, for each of two numbers, in one thread."""
    calls = {**OWNED, **FREE}
    return {name: [call(shared, number) for number in range(2)] for name, call in calls.items()}


def ask(name, number, shared, expected):
    """Make a call: whether there was an answer, which is then the one of one thread."""
    call = OWNED.get(name) or FREE[name]
    try:
        got = call(shared, number % 2)
    except ThreadError as error:
        check_refusal(error)
        return False
    assert got == expected[name][number % 2], f"{name}: another answer than in one thread"
    return True


def test_all_calls_from_eight_threads(shared, expected):
    """All at once, each thread in another order."""
    names = [*OWNED, *FREE]
    answered = [[] for _ in range(THREADS)]

    def call(number):
        start = number * len(names) // THREADS
        for name in names[start:] + names[:start]:
            if ask(name, number, shared, expected):
                answered[number].append(name)

    with together(call):
        for name in OWNED:  # their own thread is not disturbed
            assert ask(name, 0, shared, expected)
    for number in range(THREADS):
        assert set(answered[number]) == set(FREE)


@pytest.mark.soak
@pytest.mark.parametrize("calls", [OWNED, FREE], ids=["refused", "answered"])
def test_each_call_from_eight_threads(shared, expected, scaled, calls, note):
    asked = 0
    for name in calls:
        rounds = scaled(max(1, 1000 // COSTS.get(name, 1)))
        answers = [0] * THREADS

        def call(number, name=name, rounds=rounds, answers=answers):
            for turn in range(rounds):
                answers[number] += ask(name, number + turn, shared, expected)

        with together(call) as going_on:
            while going_on():
                assert ask(name, 0, shared, expected)
        assert answers == [rounds if calls is FREE else 0] * THREADS, name
        asked += THREADS * rounds
    outcome = "given the answers of one thread" if calls is FREE else "refused"
    note(
        "answered" if calls is FREE else "refused",
        asked,
        f"calls from {THREADS} threads at once, of {len(calls)} kinds, all {outcome}",
    )


def public(kind):
    return {f"{kind.__name__}.{name}" for name in dir(kind) if not name.startswith("_")}


def test_no_public_name_is_missing():
    kinds = (
        MemoryLM, MemoryBank, ClusterTree, MemoryConfig, Encoder, Conversation, FetchedMemory,
        Prefetch, BlockReader, Scheduler, Handle,
    )  # fmt: skip
    elsewhere = {
        # In the tests below.
        "MemoryLM.stream", "MemoryBank.close", "Conversation.answer", "ClusterTree.save",
        "MemoryConfig.save", "FetchedMemory.release", "Scheduler.start", "Scheduler.submit",
        "Scheduler.alive", "Scheduler.stats", "Scheduler.tokenize", "Scheduler.tokenize_chat",
        "Scheduler.decode", "Handle.events", "Handle.cancel",
        # What makes an error, and parts of what is called there.
        "MemoryLM.not_a_number", "MemoryBank.of", "Handle.put", "Handle.cancelled",
        "Scheduler.close", "Scheduler.failure", "BlockReader.close", "BlockReader.descriptors",
        "BlockReader.head", "BlockReader.open_shard", "BlockReader.read_into",
        "BlockReader.read_rest",
    }  # fmt: skip
    names, called = set.union(*map(public, kinds)), {*OWNED, *FREE}
    assert elsewhere <= names
    assert names - elsewhere <= called
    assert called - names == {"load", "MemoryModel", "EmbeddingEncoder.encode"}
    others = {"ClusterPath", "__version__", "load"}
    assert set(mlx_hiermem.__all__) - {kind.__name__ for kind in kinds} == others


# ---- what goes on for a while ----------------------------------------------------------


@pytest.mark.parametrize("what", ["stream", "conversation"])
def test_a_stream_is_for_one_thread(shared, rounds, what):
    def begin():
        begin = shared.lm.stream if what == "stream" else Conversation(shared.lm).answer
        return begin(TEXTS[0], max_tokens=12)

    def disturb(number):
        for _ in range(rounds * 10):
            with refused():
                next(pieces)

    expected = [piece.token for piece in begin()]
    pieces = begin()
    with together(disturb):
        found = [piece.token for piece in pieces]
    assert found == expected and len(found) == 12


def test_a_stream_in_the_midst_of_a_step_is_not_closed_by_another(shared):
    inside, go_on = threading.Event(), threading.Event()

    def hold(logits):
        inside.set()
        assert go_on.wait(WAIT)
        return mx.argmax(logits, axis=-1)

    def close(number):
        assert inside.wait(WAIT)
        try:
            with refused():
                pieces.close()
        finally:
            go_on.set()

    expected = shared.lm.generate(TEXTS[0], max_tokens=4)
    pieces = shared.lm.stream(TEXTS[0], max_tokens=4, sampler=hold)
    with together(close, 1):
        text = "".join(piece.text for piece in pieces)
    assert text == expected


def test_only_its_own_thread_closes_a_bank_or_gives_a_memory_back(folder, rounds):
    bank = MemoryBank.open(folder / "memory", tiers="disk")
    memory = bank.fetch((0, 0, 0))
    numbers = memory.joined.tolist()

    def end(number):
        for act in (bank.close, memory.release, lambda: bank.__exit__(None, None, None)):
            for _ in range(rounds):
                with refused():
                    act()

    with together(end):
        pass
    assert bank.fetch((2, 8, 26)).joined.tolist() != numbers
    assert memory.joined.tolist() == numbers and memory.lent
    memory.release()
    bank.fetch((1, 3, 9)).release()
    assert bank.slots_made == 2
    bank.close()
    with pytest.raises(FormatError, match="the bank was closed"):
        bank.fetch((0, 0, 0))


def test_a_bank_that_nobody_has_any_more_ends_in_any_thread(folder):
    banks = [MemoryBank.open(folder / "memory", tiers="disk")]
    files = banks[0]._reader.descriptors
    with together(lambda number: banks.clear(), 1):
        pass
    for file in files:
        with pytest.raises(OSError):
            os.fstat(file)


# ---- the scheduler ---------------------------------------------------------------------


def test_a_scheduler_answers_all_threads_alike(folder, shared, rounds, note):
    prompts = [f"{text} {number}" for number in range(4) for text in TEXTS]
    expected = [shared.lm.generate(prompt, max_tokens=6) for prompt in prompts]
    asked = []
    with running(folder, max_waiting=10**6) as scheduler:

        def submit(number):
            assert scheduler.start() is scheduler.start()
            for turn in range(max(1, rounds // 5)):
                at = (number + turn) % len(prompts)
                tokens = scheduler.tokenize(prompts[at])
                assert scheduler.decode(tokens) == prompts[at] and scheduler.alive
                handle = scheduler.submit(job(prompts[at], max_tokens=6))
                scheduler.submit(job(prompts[at])).cancel()
                assert read(handle).text == expected[at]
                with pytest.raises(FormatError, match="chat template"):
                    scheduler.tokenize_chat([{"role": "user", "content": "gold"}])
                asked.append(scheduler.stats()["submitted"])

        with together(submit):
            pass
    note("Scheduler.submit", len(asked), f"requests of {THREADS} threads, all answered alike")


def test_one_thread_reads_an_answer(folder, rounds):
    with running(folder) as scheduler:
        handle = scheduler.submit(job("gold", max_tokens=6))
        events = handle.events(WAIT)
        first = next(events)

        def steal(number):
            for _ in range(rounds):
                with refused():
                    next(events)
                with refused():
                    handle.events(WAIT)

        with together(steal):
            pass
        end = list(events)[-1]
        assert first.path is not None and end.reason == "length"


# ---- what is written -------------------------------------------------------------------


@pytest.mark.parametrize("what", ["tree", "config"])
def test_a_file_that_all_write_at_once_is_whole(shared, rounds, tmp_path, what, monkeypatch):
    """Each writes something else, or is told that another is at it."""
    monkeypatch.setattr(os, "fsync", lambda fd: time.sleep(0))  # somebody else's turn
    path = tmp_path / "file"
    if what == "tree":
        levels = shared.tree.centroids
        mine = [ClusterTree([level + n for level in levels]) for n in range(THREADS)]
        versions = {mine[n].centroids[2].tobytes() for n in range(THREADS)}
    else:
        mine = [MemoryConfig(ranks=[n + 1] * (9 - n), branching=2) for n in range(THREADS)]
        versions = {str(one) for one in mine}
    found = Counter()

    def write(number):
        for _ in range(rounds):
            try:
                mine[number].save(path)
                found["written"] += 1
            except FormatError as error:
                assert "is being written by somebody else now; wait for it" in str(error)
            if path.exists():
                one = type(mine[0]).load(path)
                assert (one.centroids[2].tobytes() if what == "tree" else str(one)) in versions

    with together(write):
        pass
    assert found["written"] and [one.name for one in tmp_path.iterdir()] == ["file"]


def test_one_edit_of_a_bank_at_a_time(tmp_path, rounds):
    memory = make_tiny_model(tmp_path / "model") / "memory"
    found = Counter()

    def edit(number):
        for _ in range(max(1, rounds // 5)):
            try:
                with BankEdit(memory) as bank:
                    bank.set_blocked([(2, number)])
                    bank.replace_blocks(
                        2, {0: np.full(bank.config.block_size(2), number, np.float32)}
                    )
                found["edited"] += 1
            except FormatError as error:
                assert "another process is editing the bank; wait for it" in str(error)
            reader = BlockReader(memory)
            ((level, cluster),) = reader.blocked or [(2, -1)]
            numbers = set(reader.stored(2, 0).tolist())
            assert level == 2 and (cluster == -1 or numbers == {cluster})
            reader.close()

    with together(edit):
        pass
    assert found["edited"]
    with MemoryBank.open(memory) as bank:
        bank.verify()
