"""MemoryLM: routing, fetching, streaming and scoring through the public API."""

from __future__ import annotations

import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

from mlx_hiermem import ClusterTree, load
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import ConfigError, FormatError, InputError, PathError
from mlx_hiermem.models import find_model, shipped_models
from tests.tiny import make_tiny_model

PROMPT = "what is the capital of the country?"
KINDS = ["fetched", "generic", "none", (1, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def shared(folder):
    return load(folder)


@pytest.fixture
def lm(shared):
    yield shared
    for level, cluster in shared.bank.blocked:
        shared.bank.unblock(level, cluster)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def logits(lm, text: str, memory) -> mx.array:
    return lm.model(mx.array([lm.tokenize(text)]), memory=lm.fetch(memory, text).memory)


# ---- routing and fetching --------------------------------------------------------------


def test_route_is_the_trees_route_of_the_encoders_vector(lm, folder):
    tree = ClusterTree.load(folder / "memory" / "tree.safetensors")
    expected = tree.route(lm.encoder.encode([PROMPT])[0])[0]
    assert lm.route(PROMPT) == expected
    assert len(expected.ids) == len(expected.distances) == 2
    assert len({lm.route(word).ids for word in "the city of gold has an iron gate".split()}) > 2


def test_fetched_is_what_the_bank_gives_for_the_route(lm):
    fetched = lm.fetch("fetched", PROMPT)
    assert fetched.kind == "fetched" and fetched.path == lm.route(PROMPT)
    blocks = [block[None] for block in lm.bank.fetch(fetched.path.ids).blocks]
    assert fetched.memory.shape == (1, 2 * 3 * 6 * 16)
    np.testing.assert_array_equal(np.array(fetched.memory), np.array(lm.model.join(blocks)))
    sizes = [lm.bank.config.block_bytes(level) for level in (1, 2)]
    assert [block.bytes for block in fetched.report.blocks] == sizes
    assert [block.cluster for block in fetched.report.blocks] == list(fetched.path.ids)


def test_generic_none_and_a_path(lm):
    generic = lm.fetch("generic")
    assert generic.kind == "generic" and generic.path is None
    blocks = [block[None] for block in lm.bank.generic().blocks]
    np.testing.assert_array_equal(np.array(generic.memory), np.array(lm.model.join(blocks)))
    none = lm.fetch("none")
    assert none.memory is None and none.kind == "none" and none.report.to_dict()["blocks"] == []
    for path in ((1, 4), [1, 4], np.array([1, 4])):
        given = lm.fetch(path)
        assert given.kind == "path" and given.path.ids == (1, 4)
        json.dumps(given.path.ids)
    assert mx.abs(given.memory - generic.memory).max() > 0.1


def test_each_memory_answers_differently(lm):
    answers = {lm.generate(PROMPT, memory, 12) for memory in KINDS}
    assert lm.route(PROMPT).ids != (1, 4)
    assert len(answers) == len(KINDS)


def test_with_all_its_blocks_blocked_a_memory_is_off(lm):
    path = lm.route(PROMPT).ids
    off = logits(lm, PROMPT, "none")
    assert mx.abs(logits(lm, PROMPT, "fetched") - off).max() > 0.1
    lm.bank.block(1, path[0])
    half = logits(lm, PROMPT, "fetched")
    assert mx.abs(half - off).max() > 0.1
    lm.bank.block(2, path[1])
    np.testing.assert_array_equal(np.array(logits(lm, PROMPT, "fetched")), np.array(off))
    report = lm.fetch("fetched", PROMPT).report
    assert report.bytes == 0 and all(block.blocked for block in report.blocks)
    lm.bank.unblock(2, path[1])
    np.testing.assert_array_equal(np.array(logits(lm, PROMPT, "fetched")), np.array(half))


def test_a_bank_elsewhere(lm, folder, tmp_path, monkeypatch):
    """``bank`` names a memory folder; that of the model folder is then not looked at."""
    config = lm.bank.config
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    for name in ("tree.safetensors", "encoder.safetensors"):
        shutil.copy(folder / "memory" / name, elsewhere)
    zeros = {
        level: np.zeros((config.clusters(level), config.block_size(level)), np.float32)
        for level in config.memory_levels
    }
    write_bank(elsewhere, config, zeros, np.zeros(config.fetch_size(), np.float32))
    monkeypatch.setenv("HOME", str(tmp_path))
    other = load(folder, bank="~/other")
    assert other.bank.folder == elsewhere
    assert other.generate(PROMPT, "fetched", 12) == lm.generate(PROMPT, "none", 12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_bank_in_half_precision_computes_in_the_anchors_dtype(tmp_path, lm, dtype):
    half = load(make_tiny_model(tmp_path / "half", dtype=dtype))
    memory = half.fetch("fetched", PROMPT)
    assert memory.memory.dtype == half.dtype == mx.float32
    assert memory.report.bytes == lm.fetch("fetched", PROMPT).report.bytes // 2
    near = mx.abs(memory.memory - lm.fetch("fetched", PROMPT).memory).max()
    assert 0 < near < 0.01


def test_budget_reaches_the_bank(folder):
    lm = load(folder, memory_budget=2000)
    assert lm.bank.memory_budget == 2000 and lm.bank.resident_levels == ()


# ---- generation ------------------------------------------------------------------------


def test_stream_tells_what_it_did(lm):
    pieces = list(lm.stream(PROMPT, max_tokens=7))
    assert [piece.generation_tokens for piece in pieces] == list(range(1, 8))
    assert {piece.finish_reason for piece in pieces[:-1]} == {None}
    last = pieces[-1]
    assert last.finish_reason == "length"
    assert last.memory == "fetched" and last.path == lm.route(PROMPT)
    assert last.fetch.bytes == 2304 and last.prompt_tokens == len(PROMPT)
    assert last.prompt_tps > 0 and last.tokens_per_second > 0 and last.peak_memory > 0
    text = "".join(piece.text for piece in pieces)
    assert lm.tokenize(text) == [piece.token for piece in pieces]
    assert lm.generate(PROMPT, max_tokens=7) == text


@pytest.mark.parametrize("memory", KINDS, ids=str)
def test_greedy_decoding_equals_the_models_own_logits(lm, memory):
    fetched = lm.fetch(memory, PROMPT).memory
    tokens = lm.tokenize(PROMPT)
    for _ in range(8):
        tokens.append(lm.model(mx.array([tokens]), memory=fetched)[0, -1].argmax().item())
    given = [piece.token for piece in lm.stream(PROMPT, memory, 8)]
    assert given == tokens[-8:]


def test_a_prompt_of_tokens_is_that_of_its_text(lm):
    assert lm.generate(lm.tokenize(PROMPT), max_tokens=9) == lm.generate(PROMPT, max_tokens=9)


def elsewhere(lm, text: str) -> str:
    """A text with another path than ``text``."""
    path = lm.route(text).ids
    return next(one for one in ("iron", "gold", "a", "x y") if lm.route(one).ids != path)


def test_route_on_another_text(lm):
    other = elsewhere(lm, PROMPT)
    last = list(lm.stream(PROMPT, max_tokens=4, route_on=other))[-1]
    assert last.path == lm.route(other)
    assert last.prompt_tokens == len(PROMPT)


def test_sampler_and_seed(lm):
    def sample(seed: int) -> str:
        mx.random.seed(seed)
        return lm.generate(PROMPT, max_tokens=20, sampler=make_sampler(2.0))

    assert sample(1) == sample(1) != sample(2)


def test_an_answer_stops_at_the_end_of_text(lm):
    end = 256

    def end_third(tokens: mx.array, logits: mx.array) -> mx.array:
        third = tokens.size >= len(PROMPT) + 2
        return logits + 1e6 * (mx.arange(logits.shape[-1]) == end) if third else logits

    pieces = list(lm.stream(PROMPT, max_tokens=9, logits_processors=[end_third]))
    assert pieces[-1].finish_reason == "stop" and pieces[-1].token == end
    assert "endoftext" not in "".join(piece.text for piece in pieces)
    assert pieces[-1].generation_tokens == 3


def test_an_answer_stops_at_the_end_of_the_context(lm):
    assert lm.context_length == 256
    last = list(lm.stream("a" * 250, max_tokens=100))[-1]
    assert (last.prompt_tokens, last.generation_tokens, last.finish_reason) == (250, 6, "length")
    assert list(lm.stream("a" * 255))[-1].generation_tokens == 1


# ---- scoring ---------------------------------------------------------------------------


def reference_logprobs(lm, text: str, memory) -> np.ndarray:
    """log p(token t | tokens before) for each token but the first."""
    given = np.array(logits(lm, text, memory)[0].astype(mx.float32)).astype(np.float64)
    given -= np.log(np.exp(given).sum(-1, keepdims=True))
    tokens = lm.tokenize(text)
    return np.array([given[t - 1, tokens[t]] for t in range(1, len(tokens))])


@pytest.mark.parametrize("memory", ["generic", "none", (1, 4)], ids=str)
def test_score(lm, memory):
    logprob, greedy = lm.score(PROMPT, " It is gold.", memory)
    expected = reference_logprobs(lm, PROMPT + " It is gold.", memory)[-12:].sum()
    assert logprob == pytest.approx(expected, abs=1e-3)
    assert not greedy


def test_score_of_the_greedy_answer(lm):
    answer = lm.generate(PROMPT, max_tokens=5)
    logprob, greedy = lm.score(PROMPT, answer)
    assert greedy
    assert logprob > lm.score(PROMPT, answer[:-1] + "~")[0]
    assert not lm.score(PROMPT, answer[:-1] + "~")[1]


def test_score_routes_on_the_context_or_on_what_is_given(lm):
    context, continuation = "gold", " is what is the capital"
    as_context = lm.score(context, continuation, lm.route(context).ids)
    assert lm.score(context, continuation) == as_context
    other = elsewhere(lm, context)
    expected = lm.score(context, continuation, lm.route(other).ids)
    assert lm.score(context, continuation, route_on=other) == expected != as_context


def test_perplexity_is_that_of_all_tokens_together(lm):
    texts = [PROMPT, "gold", "the city of gold has an iron gate"]
    for memory in ("fetched", "generic", "none"):
        every = np.concatenate([reference_logprobs(lm, text, memory) for text in texts])
        assert lm.perplexity(texts, memory) == pytest.approx(math.exp(-every.mean()), rel=1e-4)
    assert lm.perplexity(texts, "fetched") != lm.perplexity(texts, "none")


def test_perplexity_of_many_texts_of_any_length(lm):
    texts = [PROMPT[: 3 + i] for i in range(30)]
    every = np.concatenate([reference_logprobs(lm, text, "fetched") for text in texts])
    assert lm.perplexity(texts) == pytest.approx(math.exp(-every.mean()), rel=1e-4)


def test_perplexity_of_a_text_longer_than_the_context(lm):
    long = "the city of gold " * 20
    assert len(long) == 340
    windows = [reference_logprobs(lm, part, "generic") for part in (long[:256], long[256:])]
    expected = math.exp(-np.concatenate(windows).mean())
    assert lm.perplexity([long], "generic") == pytest.approx(expected, rel=1e-4)


# ---- errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda lm: lm.route(" \n"), "text to route is empty"),
        (lambda lm: lm.route("a\udcff"), r"not valid Unicode \(character 2\)"),
        (lambda lm: lm.fetch("fetched"), "no text to route"),
        (lambda lm: lm.fetch("all", PROMPT), "memory is 'all'; expected one of fetched, generic"),
        (lambda lm: lm.generate(""), "prompt is empty"),
        (lambda lm: lm.generate([]), "prompt is empty"),
        (lambda lm: lm.generate([5, 257], "none"), "token 257; expected tokens from 0 to 256"),
        (lambda lm: lm.generate([5, -1], "none"), "token -1; expected tokens from 0 to 256"),
        (lambda lm: lm.generate([1 << 40]), "token 1099511627776; expected"),
        (lambda lm: lm.generate("\udcff", "none"), "not valid Unicode"),
        (lambda lm: lm.generate("a" * 256), "prompt has 256 tokens, .* ends at 256"),
        (lambda lm: lm.generate("a", max_tokens=0), "max_tokens is 0; expected at least 1"),
        (lambda lm: lm.score("", "a"), "empty"),
        (lambda lm: lm.score("", "a", "none"), "each needs at least one token"),
        (lambda lm: lm.score("a", "", "none"), "each needs at least one token"),
        (lambda lm: lm.score("a" * 200, "b" * 57, "none"), "have 257 tokens.* ends at 256"),
        (lambda lm: lm.perplexity([]), "no text"),
        (lambda lm: lm.perplexity(["a"], "none"), "no two tokens"),
    ],
)
def test_input_that_cannot_be_used(lm, call, says):
    with pytest.raises(InputError, match=says) as error:
        call(lm)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", [(3, 9), (0, 3), (0,), (0, 1, 2), (-1, 0), ("a", 0)], ids=str)
def test_paths_outside_of_the_tree(lm, path):
    with pytest.raises(PathError):
        lm.generate(PROMPT, path)


def test_a_tree_of_another_size_does_not_fit(copy):
    centroids = [np.eye(4, 16, dtype=np.float32), np.ones((16, 16), np.float32)]
    rewrite(copy, ClusterTree(centroids))
    with pytest.raises(ConfigError, match="branching 4, levels 2; config.json says 3 and 2"):
        load(copy)


def test_a_tree_of_another_width_does_not_fit(copy):
    rewrite(copy, ClusterTree([np.eye(3, 8, dtype=np.float32), np.ones((9, 8), np.float32)]))
    with pytest.raises(ConfigError, match="vectors 8 wide, the encoder .* gives 16"):
        load(copy)


def rewrite(folder, tree: ClusterTree) -> None:
    """Another tree in a bank whose manifest is right."""
    memory = folder / "memory"
    tree.save(memory / "tree.safetensors")
    config = MemoryConfig.load(memory / "config.json")
    rows = {
        level: np.zeros((config.clusters(level), config.block_size(level)), np.float32)
        for level in config.memory_levels
    }
    write_bank(memory, config, rows, np.zeros(config.fetch_size(), np.float32))


def test_a_damaged_tokenizer(copy):
    for text in ("{}", "no JSON", '{"model": {"type": "Unknown"}}'):
        (copy / "tokenizer.json").write_text(text)
        with pytest.raises(FormatError, match="tokenizer cannot be loaded") as error:
            load(copy)
        assert "\n" not in str(error.value)


def test_no_memory_folder(copy):
    shutil.rmtree(copy / "memory")
    with pytest.raises(ConfigError, match="memory: no such folder; expected a memory bank"):
        load(copy)


# ---- where models are ------------------------------------------------------------------


def test_a_shipped_model_is_found_by_name(tmp_path, monkeypatch, folder):
    monkeypatch.setattr("mlx_hiermem.models._ASSETS", tmp_path)
    monkeypatch.chdir(tmp_path)  # where no folder has the name
    shutil.copytree(folder, tmp_path / "sub" / "nothing")
    assert shipped_models() == []
    with pytest.raises(ConfigError, match=r"^small: no such folder; .*shipped models \(none\)"):
        find_model("small")
    monkeypatch.chdir(folder)
    shutil.copytree(folder, tmp_path / "small")
    assert shipped_models() == ["small"]
    assert find_model("small") == tmp_path / "small"
    assert load("small").generate("gold", max_tokens=2)


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/none-such", "a/b/c", ""])
def test_no_such_folder(name):
    with pytest.raises(ConfigError, match="no such folder"):
        find_model(name)


def test_no_such_repository():
    # The tests run without a network.
    with pytest.raises(ConfigError, match="^someone/none: no such folder, and the Hub") as error:
        find_model("someone/none")
    assert "\n" not in str(error.value)
