"""RAG against memory: the store, the counted operations, and the answers against single calls."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks.studies import rag as study_rag
from benchmarks.studies.asking import flops as study_flops
from benchmarks.studies.asking.store import Store
from mlx_hiermem.anchors import openlm
from mlx_hiermem.errors import ConfigError, InputError
from mlx_hiermem.evaluation import facts
from mlx_hiermem.evaluation.questions import read_questions
from tests.benchmarks.study_model import rows, run
from tests.tiny import random_texts

TEXTS = sorted(f"{text}." for text in random_texts(30, seed=9))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, TEXTS[0]]))
    return path


# ---- the store -------------------------------------------------------------------------


def test_the_nearest_documents_are_those_of_a_loop(lm):
    store = Store.of(lm.encoder, TEXTS, [i // 3 for i in range(30)])
    asked = random_texts(300, seed=10)
    vectors = lm.encoder.encode(asked)
    found = store.nearest(vectors, 3)
    for text, near in zip(asked, found, strict=True):
        (vector,) = lm.encoder.encode([text])
        alike = [float(vector @ lm.encoder.encode([known])[0]) for known in TEXTS]
        best = sorted(alike, reverse=True)[:3]
        assert [alike[i] for i in near] == pytest.approx(best, abs=1e-6)
    wanted = [i % 10 for i in range(len(asked))]
    for stating in (True, False):
        of = store.nearest_of(vectors, wanted, stating)
        for vector, fact, number in zip(vectors, wanted, of, strict=True):
            allowed = [i for i in range(30) if (i // 3 == fact) == stating]
            assert number in allowed
            top = max(store.vectors[i] @ vector for i in allowed)
            assert store.vectors[number] @ vector == pytest.approx(top, abs=1e-6)
    assert store.nearest(vectors[:2], 99).shape == (2, 30)
    with pytest.raises(InputError, match="no document for question 1"):
        store.nearest_of(vectors[:2], [0, 77], True)
    with pytest.raises(InputError, match="the store holds no document"):
        Store.of(lm.encoder, [])


# ---- operations ------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_those_of_every_product_of_a_matrix(tied, monkeypatch):
    """Counted while the anchor runs token by token, as decoding does, without a cache."""
    args = openlm.ModelArgs(16, 3, 40, 2, 6, vocab_size=50, tie_word_embeddings=tied)
    anchor = openlm.Model(args)
    sizes = study_flops.sizes_of(anchor, fetch_size=100)
    counted = {"body": 0, "head": 0}
    linear, as_linear = nn.Linear.__call__, nn.Embedding.as_linear

    def count_linear(self, x):
        what = "head" if self.weight.shape[0] == 50 else "body"
        counted[what] += 2 * self.weight.size * x.size // x.shape[-1]
        return linear(self, x)

    def count_table(self, x):
        counted["head"] += 2 * self.weight.size * x.size // x.shape[-1]
        return as_linear(self, x)

    monkeypatch.setattr(nn.Linear, "__call__", count_linear)
    monkeypatch.setattr(nn.Embedding, "as_linear", count_table)
    mx.eval(anchor(mx.zeros((1, 1), mx.int32)))
    assert counted == {"body": 2 * sizes.body, "head": 2 * sizes.head}
    prompt, answer, total = 7, 3, 0
    for place in range(1, prompt + answer):  # the last token of the answer is not fed
        total += 2 * sizes.body + 2 * 100
        for _ in range(args.num_hidden_layers * args.num_attention_heads):
            total += place * (2 * args.head_dim + 2 * args.head_dim)  # scores, and sums
        if place >= prompt:
            total += 2 * sizes.head
    assert study_flops.answering(sizes, prompt, answer, True) == total
    without = study_flops.answering(sizes, prompt, answer, False)
    assert total - without == 2 * 100 * (prompt + answer - 1)


def test_finding_is_counted_too():
    routing = sum(3 * 8 for _ in range(5) for _ in range(2))  # -, square, + of 8 numbers each
    assert study_flops.routing(width=8, branching=5, levels=2) == routing
    assert study_flops.searching(width=8, documents=11) == 11 * (8 + 8)


def test_anchors_that_cannot_be_counted_are_told():
    anchor = openlm.Model(openlm.ModelArgs(64, 1, 64, 2, 32, vocab_size=64))
    nn.quantize(anchor, 32, 4)
    assert tree_flatten(anchor.parameters())
    with pytest.raises(ConfigError, match="floating point"):
        study_flops.sizes_of(anchor, 1)


# ---- answers ---------------------------------------------------------------------------


def test_documents_stand_before_the_question_and_the_memory_is_the_questions_own(
    model, lm, corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(study_rag, "_TIMED", 2)
    found = rows(study_rag, model, tmp_path, "--corpus", corpus, "--smoke")
    assert f"{len(TEXTS)} documents" in capsys.readouterr().out
    questions, buckets = read_questions(model / facts.QUESTIONS_FILE)
    control = facts.load_control(lm, model / facts.CONTROL_FILE)
    vectors = lm.encoder.encode(TEXTS)
    sizes = study_flops.sizes_of(lm.model.anchor, lm.bank.config.fetch_size())
    models = {"bare": (control, "none"), "none": (lm, "none"), "memory": (lm, "fetched")}
    base = None
    for model_name, (asked, memory) in models.items():
        for choice, count in (("", 0), ("+rag1", 1), ("+rag3", 3)):
            for suffix, separator in (("", " "), ("-eot", "<|endoftext|>")):
                hits, flops = [], 0
                for question in questions:
                    near = np.argsort(-(vectors @ lm.encoder.encode([question.prompt])[0]))[:count]
                    context = "".join(TEXTS[i] + separator for i in reversed(near))
                    context += question.prompt
                    hits.append(
                        asked.score(context, question.continuation, memory, question.prompt)[1]
                    )
                    flops += study_flops.answering(
                        sizes,
                        len(lm.tokenize(context)),
                        len(question.continuation),  # a token is a byte
                        memory == "fetched",
                    )
                base = base or flops
                name = f"{model_name}{choice}{suffix if count else ''}"
                assert found[f"rag.accuracy@{name}"] == pytest.approx(np.mean(hits)), name
                assert found[f"rag.flops@{name}"] == pytest.approx(flops / base), name
                for bucket in range(len(buckets)):
                    of = [h for h, q in zip(hits, questions, strict=True) if q.bucket == bucket]
                    assert found[f"rag.bucket{bucket}@{name}"] == pytest.approx(np.mean(of))
    assert found["rag.flops_search@bare"] == 1 < found["rag.flops_search@memory"]
    assert found["rag.flops_search@bare+rag1"] > found["rag.flops@bare+rag1"]
    assert found["rag.time@memory+rag3"] > 0
    assert not any("oracle" in name or "retrieved" in name for name in found)


def test_a_store_has_to_be_named(model, capsys):
    assert run(study_rag, "--smoke", "--model", model) == 2
    assert "name the documents that it was trained on with --corpus" in capsys.readouterr().err


def test_a_smoke_run_on_the_atlas_knows_the_right_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(study_rag, "_TIMED", 2)
    path = tmp_path / "rows.json"
    assert run(study_rag, "--smoke", "--limit", 8, "--json", path) == 0
    found = {row["id"]: row["value"] for row in json.loads(path.read_text())["rows"]}
    assert {"rag.accuracy@memory+oracle", "rag.accuracy@bare+misled"} <= set(found)
    assert 0 <= found["rag.retrieved@1"] <= found["rag.retrieved@3"] <= 1
    assert found["rag.loss@bare+oracle"] < found["rag.loss@bare+misled"]
