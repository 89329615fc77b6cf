"""The runs of training studies: what is trained, what is asked, and what is kept of it."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, replace

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.studies.training import report, runs
from benchmarks.studies.training.parts import Parts, settings
from benchmarks.studies.training.report import Spread
from benchmarks.studies.training.routes import HiddenEncoder, Way, find_encoder, routed_texts
from benchmarks.studies.training.task import Anchor, Result, Score, Task
from benchmarks.studies.training.trained_encoder import of_vectors, train_encoder
from benchmarks.studies.training.worker import Run, make_anchor
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.errors import ConfigError
from mlx_hiermem.memories import GENERIC, attach
from mlx_hiermem.routing.bert import BertEncoder
from mlx_hiermem.routing.embeddings import embedding_table
from mlx_hiermem.training.trainer import Trainer
from tests.corpus.corpora import make_tiny_bert

TASK = Task("a", 3, 1e-2, ranks=(2, 4), questions=12)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return Parts(tmp_path_factory.mktemp("parts"))


def run(task, parts):
    steps = []
    result = Run(task, parts, lambda: steps.append(None)).do()
    return result, len(steps)


# ---- tasks and results -----------------------------------------------------------------


def test_a_task_is_named_by_all_but_its_label():
    assert replace(TASK, label="b").key() == TASK.key()
    others = [
        replace(TASK, seed=1), replace(TASK, ranks=(4, 2)), replace(TASK, anchor=Anchor()),
        replace(TASK, anchor=Anchor(steps=1)), replace(TASK, views="text"),
        replace(TASK, generic=True), replace(TASK, questions=None),
    ]  # fmt: skip
    assert len({one.key() for one in [TASK, *others]}) == 8
    for one in others:
        assert Task.of(asdict(one)) == one


def test_a_result_survives_its_file():
    score = Score(0.5, [0.25, None, 1.0], 7.5)
    task = replace(TASK, anchor=Anchor(), layers=(1, 3))
    one = Result(task, 1, 2, 3, 4, 0.5, {"none": score}, 0.75, 1.5, [(2, 0.5, 0.25)])
    assert Result.of(one.to_json()) == one


def test_options_make_the_runs():
    parser = argparse.ArgumentParser()
    runs.options(parser)
    args = parser.parse_args(["--seed", "4", "--seeds", "2", "--steps", "7", "--limit", "9"])
    args.smoke = False
    lines = [Task("a", 1, 1e-2, anchor=Anchor()), Task("b", 2, 3e-2)]
    found = runs.tasks_of(args, lines)
    assert [(one.label, one.seed) for one in found] == [("a", 4), ("a", 5), ("b", 4), ("b", 5)]
    assert {one.steps for one in found} == {7} and {one.questions for one in found} == {9}
    assert [one.rate for one in found] == [1e-2, 1e-2, 3e-2, 3e-2]
    assert found[0].anchor == Anchor()
    args = parser.parse_args([])
    args.smoke = True
    (one,) = runs.tasks_of(args, lines[:1])
    assert (one.steps, one.anchor.steps, one.seed) == (2, 2, 0)


def test_results_are_kept_and_found_again(tmp_path, monkeypatch):
    task = replace(TASK, steps=1)
    (first,) = runs.run_all([task], 1, tmp_path)
    monkeypatch.setattr(runs, "processes", None)  # nothing is run any more
    relabelled = replace(task, label="other")
    found = runs.run_all([relabelled, task], 1, tmp_path)
    assert [one.task.label for one in found] == ["other", "a"]
    assert [replace(one, task=task) for one in found] == [first, first]
    with pytest.raises(TypeError):
        runs.run_all([replace(task, seed=1)], 1, tmp_path)


# ---- a run -----------------------------------------------------------------------------


def by_hand(task, parts, tmp_path):
    """Train and ask, written out; single answers by greedy decoding."""
    routed = parts.routed(Way())
    anchor = parts.anchor(task.anchor, task.seed)
    own = parts.lm.bank.config
    model = attach(anchor, replace(own, ranks=task.ranks, layers=None, dtype="float32"))
    trainer = Trainer(model, routed.corpus, settings(task, parts.recipe))
    losses = [trainer.step().loss for _ in range(task.steps)]
    levels = model.config.memory_levels
    write_bank(
        tmp_path,
        model.config,
        {
            level: np.stack(list(trainer.rows.values(level, range(model.config.clusters(level)))))
            for level in levels
        },
        np.concatenate([next(trainer.rows.values(level, [GENERIC])) for level in levels]),
    )
    questions, _ = parts.questions
    step = len(questions) // task.questions
    chosen = questions[::step][: task.questions]
    with MemoryBank.open(tmp_path) as bank:
        lm = MemoryLM(model, parts.lm.tokenizer, bank, routed.tree, routed.encoder, {})
        right = {
            memory: [
                lm.generate(one.prompt, memory, 24).lstrip() == one.continuation.lstrip()
                for one in chosen
            ]
            for memory in ("none", "fetched")
        }  # fmt: skip
        texts = [one.prompt + one.continuation for one in chosen]
        perplexity = {memory: lm.perplexity(texts, memory) for memory in right}
    return losses, right, perplexity


@pytest.mark.parametrize(
    "task", [TASK, replace(TASK, rate=3e-2, steps=12, seed=3)], ids=["short", "longer"]
)
def test_a_run_is_what_is_written_out(task, parts, tmp_path):
    losses, right, perplexity = by_hand(task, parts, tmp_path)
    result, steps = run(task, parts)
    assert steps == task.steps
    assert result.loss == losses[-1]
    for memory in ("none", "fetched"):
        score = result.scores[memory]
        assert score.facts == np.mean(right[memory])
        assert score.perplexity == pytest.approx(perplexity[memory], rel=1e-5)
    assert (result.anchor_size, result.fetch_size) == (312_384, 768 * 6)
    assert result.bank_size == 768 * (2 * 16 + 4 * 256)
    assert result.tokens == task.steps * 32 * 64
    assert result.scores["none"] != result.scores["fetched"]


def test_a_run_follows_its_seed(parts):
    first, again = run(TASK, parts)[0], run(TASK, parts)[0]
    assert first == again
    other = run(replace(TASK, seed=1), parts)[0]
    assert other.loss != first.loss and other.scores["none"] == first.scores["none"]


def test_the_generic_memory_is_trained_alone_and_after_the_others(parts):
    plain, _ = run(TASK, parts)
    result, steps = run(replace(TASK, generic=True), parts)
    assert steps == 2 * TASK.steps
    assert result.scores["none"] == plain.scores["none"]
    assert result.scores["fetched"] == plain.scores["fetched"]
    assert result.scores["generic"].perplexity != result.scores["none"].perplexity


def test_an_anchor_is_trained_once_and_for_each_seed(parts, monkeypatch):
    wanted = Anchor(hidden=32, ffn=48, layers=2, steps=2)
    steps, trained = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: steps.append(self) or trained(self))
    first, again, other = (parts.anchor(wanted, seed) for seed in (0, 0, 1))
    noted = []
    make_anchor(str(parts.work), asdict(wanted), 1, lambda: noted.append(None))
    assert len(set(map(id, steps))) == 2 and len(steps) == 2 * wanted.steps == 2 * len(noted)
    a, b, c = (mx.concatenate([p.reshape(-1) for _, p in _flat(one)]) for one in
               (first, again, other))  # fmt: skip
    assert mx.array_equal(a, b) and not mx.array_equal(a, c)
    fresh = parts.anchor(replace(wanted, steps=0), 0)
    assert not mx.array_equal(mx.concatenate([p.reshape(-1) for _, p in _flat(fresh)]), a)
    assert parts.shape(wanted).num_attention_heads == 2


def _flat(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


@pytest.mark.parametrize("regime", ["cotrain", "scratch", "frozen"])
def test_what_a_regime_trains(parts, regime, monkeypatch):
    anchor = Anchor(hidden=32, ffn=48, layers=2, steps=2)
    task = replace(TASK, regime=regime, anchor=anchor, layers=(1,))
    before, make, made = parts.anchor(anchor, 0), Parts.anchor, []
    monkeypatch.setattr(Parts, "anchor", lambda *given: made.append(make(*given)) or made[-1])
    result, _ = run(task, parts)
    tables = [one.model.embed_tokens.weight for one in (before, made[0])]
    assert mx.array_equal(*tables) == (regime != "scratch")
    alone = run(replace(task, regime="anchor", steps=1, rate=1e-12), parts)[0].scores["none"]
    changed = result.scores["none"].perplexity != pytest.approx(alone.perplexity, rel=1e-4)
    assert changed == (regime != "frozen")
    assert before.args.hidden_size == 32


def test_a_curve_ends_where_the_run_does(parts):
    result, _ = run(replace(TASK, steps=5, every=2), parts)
    assert [step for step, *_ in result.curve] == [2, 4, 5]
    assert result.curve[-1][2] == result.scores["fetched"].facts
    bare, _ = run(replace(TASK, steps=4, every=2, regime="anchor"), parts)
    assert [step for step, *_ in bare.curve] == [2, 4]
    assert set(bare.scores) == {"none"} and bare.curve[-1][2] == bare.scores["none"].facts


# ---- ways to route ---------------------------------------------------------------------


def test_what_of_a_document_is_routed():
    from apps.atlas.corpus import fact_documents

    documents = [one for index in (3, 5) for one in fact_documents(index)]
    assert routed_texts("prompt", documents) == [one.prompt for one in documents]
    assert routed_texts("text", documents) == [one.text for one in documents]
    once = routed_texts("once", documents)
    assert once == [documents[0].text] * 6 + [documents[6].text] * 6


def test_ways_lead_to_where_their_documents_lie(parts):
    way = Way(4, 2, views="text")
    routed = parts.routed(way)
    assert (routed.tree.branching, routed.tree.levels) == (4, 2)
    from apps.atlas.corpus import documents

    texts: dict[int, set[str]] = {}
    for document in documents(parts.recipe.corpus):
        texts.setdefault(document.fact_index, set()).add(document.text)
    for fact in range(0, len(texts), len(texts) // 20):
        ids, _ = routed.tree.assign(routed.encoder.encode(sorted(texts[fact])))
        assert routed.leaves[fact] == sorted(set(ids[:, -1].tolist()))
    again = parts.routed(way)
    assert np.array_equal(again.corpus.leaves, routed.corpus.leaves)


def test_a_trained_encoder_brings_wordings_together(parts):
    start, table = find_encoder("sif", parts.lm), embedding_table(parts.lm.model.anchor)
    from apps.atlas.corpus import fact_documents
    from apps.atlas.facts import facts

    views = [
        [(one.prompt, one.text) for one in fact_documents(index)]
        for index in range(0, len(facts()), 40)
    ]

    def met(encoder):
        """The share of prompts that are nearest to a text of their own fact, of another wording."""
        prompts = encoder.encode([view[0][0] for view in views])
        texts = encoder.encode([view[3][1] for view in views])
        return ((prompts @ texts.T).argmax(axis=1) == np.arange(len(views))).mean()

    vectors = train_encoder(start, table, views, steps=20)
    untrained = of_vectors(train_encoder(start, table, views, steps=0), start)
    texts = ["gold is", "Iron, of course", "what is the weight of lead?"]
    np.testing.assert_allclose(untrained.encode(texts), start.encode(texts), atol=1e-5)
    assert met(of_vectors(vectors, start)) > met(start) + 0.05
    assert np.array_equal(train_encoder(start, table, views, steps=20), vectors)
    assert not np.array_equal(train_encoder(start, table, views, seed=1, steps=20), vectors)


def test_a_bert_routes_if_it_is_given(parts, tmp_path):
    folder = make_tiny_bert(tmp_path / "bert")
    way = Way(4, 1, encoder=f"bert:{folder}")
    assert "/" not in way.name
    assert isinstance(find_encoder(way.encoder, parts.lm), BertEncoder)
    with pytest.raises(ConfigError):
        find_encoder("bert:nowhere/to/be/found", parts.lm)


def test_the_hidden_encoder_is_a_mean_over_tokens(parts):
    encoder = HiddenEncoder(parts.lm)
    texts = ["gold is", "the capital of a country", "iron"]
    found = encoder.encode(texts)
    for row, text in zip(found, texts, strict=True):
        ids = parts.lm.tokenizer.encode(text, add_special_tokens=False)
        hidden = np.array(parts.lm.model.anchor.model(mx.array([ids])).astype(mx.float32))
        mean = hidden[0].mean(axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-5)
    assert find_encoder("sif", parts.lm) is parts.lm.encoder
    with pytest.raises(ValueError, match="expected one of sif"):
        find_encoder("none", parts.lm)


# ---- reports ---------------------------------------------------------------------------


def test_seeds_that_agree_have_no_spread(tmp_path):
    assert statistics.fmean([54.3] * 3) < 54.3  # by a bit
    assert Spread.of([54.3] * 3) == Spread(54.3, 54.3, 54.3)
    report.draw_bars(tmp_path / "x.png", {"facts %": {"a": Spread.of([54.3] * 3)}})


def test_lines_show_mean_and_half_range():
    def result(label, seed, facts):
        score = Score(facts, [facts] * 5, 10 * facts)
        task = replace(TASK, label=label, seed=seed)
        return Result(task, 1, 2, 3, 4, facts, {"none": score, "fetched": score})

    found = report.lines(
        [result("a", 0, 0.5), result("a", 1, 0.75), result("b", 0, 0.25), result("a", 2, 0.25)]
    )
    assert [(line.label, len(line.runs)) for line in found] == [("a", 3), ("b", 1)]
    assert found[0].facts() == Spread(50.0, 25.0, 75.0)
    assert found[0].facts().show() == "50.00 ±25.00" and found[1].facts().show() == "25.00"
    assert found[0].perplexity() == Spread(5.0, 2.5, 7.5)
    rows = {row.id: row for row in report.rows("x", found)}
    assert rows["x.facts@a"].value == 0.5 and "25.00 to 75.00 %" in rows["x.facts@a"].detail
    shown = report.show("line", found, report.by_bucket())
    assert "50.00 ±25.00" in shown and "50.0 ±25.0" in shown and "no memory" in shown
