"""The adapter against mlx-lm's own and against ``MemoryLM.score``, request by request."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from mlx_lm import evaluate as mlx_lm_evaluate

from mlx_hiermem import load
from mlx_hiermem.anchors import load_anchor, load_anchor_tokenizer
from mlx_hiermem.config import AnchorShape, MemoryConfig
from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.evaluation.lm_eval import model as adapter
from mlx_hiermem.evaluation.lm_eval.model import HierMemLM
from mlx_hiermem.evaluation.lm_eval.routes import Routes
from mlx_hiermem.memories import attach
from mlx_hiermem.models import find_model
from tests.kinds import anchors
from tests.tiny import make_tiny_model, random_texts

TEXTS = random_texts(40, seed=3)
ROUTED = Routes({"t": "{{question}}"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(folder):
    return load(folder)


@pytest.fixture(params=["tiny", "atlas"])
def of_both(request, folder, monkeypatch):
    """A model with memories, and mlx-lm's adapter of its bare anchor, loaded apart."""
    place = folder if request.param == "tiny" else find_model("atlas")
    # mlx-lm does not know the architecture by itself; all else is its own.
    monkeypatch.setattr(mlx_lm_evaluate, "load", lambda *_, **__: _load_bare(place))
    return load(place), mlx_lm_evaluate.MLXLM("given", batch_size=3)


def _load_bare(folder):
    anchor, config = load_anchor(folder)
    return anchor, load_anchor_tokenizer(folder, config)


def requests_of(kind):
    """Requests of several documents, the contexts of different lengths."""
    found = []
    for i in range(7):
        question, doc = TEXTS[i], {"question": TEXTS[i]}
        context = f"Q: {TEXTS[i + 20]} {question}\nA:"
        if kind == "loglikelihood":
            ends = [f" {text}" for text in TEXTS[10 + i : 12 + i + i % 3]]
            arguments = [(context, end) for end in ends]
        elif kind == "loglikelihood_rolling":
            arguments = [(" ".join(TEXTS[i : 2 * i + 1]),)]
        else:
            arguments = [(context, {"until": ["a", "st"], "max_gen_toks": 5 + i})]
        found += [
            Instance(kind, doc, given, j, metadata=("t", i, 1)) for j, given in enumerate(arguments)
        ]
    return found


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_without_a_memory_all_is_mlx_lms_own_to_the_bit(of_both, kind):
    lm, theirs = of_both
    ours = HierMemLM(lm, "none", batch_size=3)
    requests = requests_of(kind)
    expected = getattr(theirs, kind)(requests)
    assert getattr(ours, kind)(requests) == expected
    assert len(set(map(str, expected))) > 3  # they say something


def test_it_is_registered_and_its_weights_are_loaded_once(folder, lm, monkeypatch):
    loads = []
    monkeypatch.setattr(adapter, "load", lambda place: loads.append(place) or lm)
    assert get_model("hiermem") is HierMemLM
    text = f"path_or_hf_repo={folder},memory=generic"
    found = HierMemLM.create_from_arg_string(text, {"batch_size": "4", "device": None})
    assert loads == [str(folder)] and found.lm is lm and found._model is lm.model
    HierMemLM(lm)
    assert len(loads) == 1


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("memory", ["generic", "fetched"])
def test_scores_are_those_of_score(lm, memory, batch_size):
    requests = requests_of("loglikelihood")
    found = HierMemLM(lm, memory, batch_size=batch_size, routes=ROUTED).loglikelihood(requests)
    expected = [lm.score(*r.args, memory, route_on=r.doc["question"]) for r in requests]
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], rtol=2e-5)
    assert [b for _, b in found] == [b for _, b in expected]


@pytest.mark.parametrize("name", anchors.ANCHORS)
def test_contexts_of_different_lengths_share_a_batch_on_every_anchor(name):
    """Their keys and values are computed once, and are those of each context by itself."""
    anchor, config = anchors.make(name), MemoryConfig(ranks=(4, 2), branching=3)
    model = HierMemLM.__new__(HierMemLM)
    model._model, model._batch_size = attach(anchor, config), 4  # nine rows, in three parts
    rng = np.random.default_rng(0)
    size = (3, 1, config.fetch_size(AnchorShape.of(anchor)))
    memories = list(mx.array(0.3 * rng.standard_normal(size, dtype=np.float32)))

    def tokens(count):
        return rng.integers(0, anchors.VOCAB, count).tolist()

    batch = [
        adapter._Question(tokens(length), i, [tokens(end) for end in ends], list(range(len(ends))))
        for i, (length, ends) in enumerate([(1, (3, 1)), (12, (1, 6, 2, 4, 1)), (7, (5, 9))])
    ]
    rows = [(i, j) for i, question in enumerate(batch) for j in range(len(question.places))]
    found = model._score(batch, rows, memories)
    for (i, j), (logprob, _) in zip(rows, found, strict=True):
        text = batch[i].context + batch[i].continuations[j]
        logits = model._model(mx.array([text[:-1]]), memory=memories[i])[0]
        each = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        start = len(batch[i].context)
        expected = sum(each[t - 1, text[t]].item() for t in range(start, len(text)))
        assert logprob == pytest.approx(expected, rel=1e-4)


def test_a_greedy_continuation_is_told_from_others(lm):
    context = "Q: what\nA:"
    best = lm.generate(context, "generic", 3)
    ends = [best, best[:2] + ("x" if best[2] != "x" else "y"), best[:1], "~" + best[1:]]
    requests = [
        Instance("loglikelihood", {}, (context, end), i, metadata=("t", 0, 1))
        for i, end in enumerate(ends)
    ]
    found = HierMemLM(lm, "generic").loglikelihood(requests)
    assert [greedy for _, greedy in found] == [True, False, True, best[0] == "~"]


def test_all_blocks_blocked_is_the_anchor_alone(lm):
    requests = requests_of("loglikelihood")
    blocked = HierMemLM(lm, "blocked", routes=ROUTED).loglikelihood(requests)
    none = HierMemLM(lm, "none").loglikelihood(requests)
    np.testing.assert_allclose([a for a, _ in blocked], [a for a, _ in none], rtol=2e-5)
    assert not lm.bank.blocked


@pytest.mark.parametrize("memory", ["generic", "fetched", "blocked"])
def test_rolling_is_the_perplexity_of_the_document(lm, memory):
    requests = requests_of("loglikelihood_rolling")
    requests.append(Instance("loglikelihood_rolling", {}, ("x",), 0, metadata=("t", 9, 1)))
    found = HierMemLM(lm, memory, batch_size=3).loglikelihood_rolling(requests)
    for request, logprob in zip(requests[:-1], found, strict=False):
        text, tokens = request.args[0], len(request.args[0]) - 1
        used = {"blocked": "none"}.get(memory, memory)
        assert math.exp(-logprob / tokens) == pytest.approx(lm.perplexity([text], used), rel=1e-5)
    assert found[-1] == 0.0  # one token: nothing to predict
    assert HierMemLM(lm, "none").loglikelihood_rolling(requests[-1:]) == [0.0]


@pytest.mark.parametrize("memory", ["generic", "fetched"])
def test_answers_are_those_of_generate(lm, memory):
    requests = requests_of("generate_until")
    found = HierMemLM(lm, memory, batch_size=3, routes=ROUTED).generate_until(requests)
    for request, text in zip(requests, found, strict=True):
        context, options = request.args
        whole = "".join(
            piece.text
            for piece in lm.stream(
                context, memory, options["max_gen_toks"], route_on=request.doc["question"]
            )
        )
        for stop in options["until"]:
            whole = whole.split(stop)[0]
        assert text == whole
    assert len(set(found)) > 3


def test_every_request_of_a_document_has_one_memory_and_each_is_fetched_once(lm, monkeypatch):
    fetched = []
    fetch = lm.fetch
    monkeypatch.setattr(lm, "fetch", lambda m, **k: fetched.append(tuple(m)) or fetch(m, **k))
    requests = requests_of("loglikelihood")
    HierMemLM(lm, "fetched", batch_size=2, routes=ROUTED).loglikelihood(requests)
    paths = {lm.route(request.doc["question"]).ids for request in requests}
    assert sorted(fetched) == sorted(paths) and len(paths) > 1


def test_memories_are_given_back(lm, monkeypatch):
    given, fetch = [], lm.fetch

    def spy(*arguments, **options):
        given.append(fetch(*arguments, **options))
        return given[-1]

    released = []
    monkeypatch.setattr(lm, "fetch", spy)
    monkeypatch.setattr(
        "mlx_hiermem.engine.Fetched.release", lambda self: released.append(id(self))
    )
    HierMemLM(lm, "fetched", routes=ROUTED, batch_size=2).loglikelihood(
        requests_of("loglikelihood")
    )
    assert sorted(released) == sorted(map(id, given))


def test_a_batch_of_memories_stays_below_its_bytes(lm, monkeypatch):
    sizes = []
    score = HierMemLM._score
    monkeypatch.setattr(
        HierMemLM, "_score", lambda s, b, r, m: sizes.append(len(b)) or score(s, b, r, m)
    )
    monkeypatch.setattr(adapter, "BATCH_BYTES", 1)
    requests = requests_of("loglikelihood")
    HierMemLM(lm, "fetched", routes=ROUTED).loglikelihood(requests)
    assert set(sizes) == {1}
    sizes.clear()
    HierMemLM(lm, "generic").loglikelihood(requests)  # one memory for all takes no copies
    assert max(sizes) > 1


@pytest.mark.parametrize("memory", ["none", "generic"])
def test_bounds_and_edges_are_those_of_mlx_lm(lm, memory):
    """An empty context gives -inf, and what is too long for --max-tokens loses its beginning."""
    empty = Instance("loglikelihood", {}, ("", " x"), 0, metadata=("t", 0, 1))
    assert HierMemLM(lm, memory).loglikelihood([empty]) == [(-math.inf, False)]
    context, end = "abcdefghij", " kl"
    long = Instance("loglikelihood", {}, (context, end), 0, metadata=("t", 0, 1))
    (cut,) = HierMemLM(lm, memory, max_tokens=6).loglikelihood([long])
    assert cut[0] == pytest.approx(lm.score(context[6:], end, memory)[0], rel=2e-5)
    assert cut[0] != pytest.approx(lm.score(context, end, memory)[0], rel=2e-5)


def test_what_is_longer_than_the_context_is_told(lm):
    model = HierMemLM(lm, "none")
    for i, length in enumerate((255, 256)):
        request = Instance("loglikelihood", {}, ("x" * length, "y"), 0, metadata=("t", i, 1))
        model.loglikelihood([request])
    assert model.longer == {("t", 1)}


def test_answers_end_where_the_task_does_not_say(lm, monkeypatch):
    monkeypatch.setattr(adapter, "MAX_TOKENS", 4)
    for memory in ("none", "generic"):
        request = Instance("generate_until", {}, ("Q:", {"until": []}), 0, metadata=("t", 0, 1))
        (text,) = HierMemLM(lm, memory).generate_until([request])
        assert len(text) == 4
        request.arguments = ("Q:", {"until": text[2]})
        assert HierMemLM(lm, memory).generate_until([request]) == [text.split(text[2])[0]]


def test_bad_requests(lm, folder):
    with pytest.raises(InputError, match="memory is 'all'; expected one of none, generic"):
        HierMemLM(lm, "all")
    request = Instance("loglikelihood", {}, ("Q:", ""), 0, metadata=("t", 4, 1))
    with pytest.raises(InputError, match="task t, document 4: the continuation ''"):
        HierMemLM(lm, "none").loglikelihood([request])
    request = Instance("generate_until", {}, ("", {"until": ["a"]}), 0, metadata=("t", 4, 1))
    with pytest.raises(InputError, match="task t, document 4: the context is empty"):
        HierMemLM(lm, "none").generate_until([request])


def test_not_a_number_is_told(folder):
    lm = load(folder)
    lm.fetch("generic")
    fetch = lm.fetch

    def broken(*arguments, **options):
        found = fetch(*arguments, **options)
        nan = mx.full(found.memory.shape, math.nan)
        return type(found)(nan, found.kind, found.path, found.report, found.found)

    lm.fetch = broken
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        with pytest.raises(FormatError, match="NaN"):
            getattr(HierMemLM(lm, "generic"), kind)(requests_of(kind))
