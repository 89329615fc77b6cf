"""The leakage test against single calls of ``lm.score``, and what its sentences say."""

from __future__ import annotations

import json
from dataclasses import replace
from shutil import copytree

import numpy as np
import pytest

from mlx_hiermem import cli, load
from mlx_hiermem.bank.remove import remove, subtree
from mlx_hiermem.commands import evaluate
from mlx_hiermem.errors import ConfigError, InputError, PathError
from mlx_hiermem.evaluation import leakage
from mlx_hiermem.evaluation.leakage import Known, Leakage
from mlx_hiermem.evaluation.questions import Question, write_questions
from tests.tiny import make_tiny_model, random_texts, write_tiny_anchor

LEAF = (3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), ranks=(4, 0, 2))


@pytest.fixture(scope="module")
def other(folder, tmp_path_factory):
    """The same tree and bank under another anchor."""
    copy = copytree(folder, tmp_path_factory.mktemp("other") / "model")
    write_tiny_anchor(copy, seed=7)
    return copy


@pytest.fixture(scope="module")
def lm(folder):
    return load(folder)


@pytest.fixture(scope="module")
def questions(lm):
    """Questions of two families; each is what some condition writes."""
    made = []
    for i, prompt in enumerate(random_texts(60, seed=3)):
        memory = ("none", "generic", "fetched")[i % 3]
        text = lm.generate(prompt, memory, 1 + i % 3)
        leaf = lm.route(prompt).ids[-1]
        made.append(Question(prompt, text, text, "ab"[i % 2], 1, 0, [leaf]))
    return made


def _topic(lm, questions, removed):
    return leakage.of_topic(lm, questions, removed)


def _expected(lm, question, candidates, memory, blocked=()):
    """(exact, rank, loss) by single calls."""
    for pair in blocked:
        lm.bank.block(*pair)
    try:
        logprob, exact = lm.score(question.prompt, question.continuation, memory)
        others = [lm.score(question.prompt, text, memory)[0] for text in candidates]
    finally:
        for pair in blocked:
            lm.bank.unblock(*pair)
    tokens = len(lm.tokenizer.encode(question.continuation, add_special_tokens=False))
    return exact, 1 + sum(other > logprob for other in others), -logprob / tokens


def _is(known, expected):
    exact, ranks, losses = zip(*expected, strict=True)
    assert known.exact.tolist() == list(exact)
    assert known.ranks.tolist() == list(ranks)
    np.testing.assert_allclose(known.losses, losses, rtol=2e-4)


def test_only_questions_that_are_routed_through_a_removed_block(lm, questions):
    removed = {(1, 1), (3, 20)}
    found = _topic(lm, questions, removed)
    paths = {q.prompt: lm.route(q.prompt).ids for q in questions}
    assert {q.prompt for q in found} == {
        prompt for prompt, path in paths.items() if path[0] == 1 or path[2] == 20
    }
    assert 0 < len(found) < len(questions)
    with pytest.raises(InputError, match="no question is routed through a removed block"):
        _topic(lm, questions[:1], {(3, (paths[questions[0].prompt][2] + 1) % 27)})


@pytest.mark.parametrize("batch, batch_bytes", [(64, 2**29), (5, 2**29), (64, 3 * 576 * 4)])
def test_each_condition_is_what_single_calls_say(lm, questions, monkeypatch, batch, batch_bytes):
    monkeypatch.setattr(leakage, "BATCH", batch)
    monkeypatch.setattr(leakage, "BATCH_BYTES", batch_bytes)
    leaf = max(range(27), key=[lm.route(q.prompt).ids[2] for q in questions].count)
    removed = {(3, leaf)}
    asked = _topic(lm, questions, removed)
    assert len(asked) > 2
    candidates = leakage.family_candidates(asked, questions, most=4)
    found = leakage.measure(lm, asked, removed, candidates=candidates)
    assert tuple(found.known) == leakage.CONDITIONS and found.never is None
    path = lm.route(asked[0].prompt).ids
    near = _siblings(lm, asked, path)
    plan = {
        "before": ["fetched"] * len(asked),
        "anchor": ["none"] * len(asked),
        "generic": ["generic"] * len(asked),
        "sibling": [paths[0] for paths in near],
    }
    for name, memories in plan.items():
        pairs = zip(asked, candidates, memories, strict=True)
        _is(found.known[name], [_expected(lm, *one) for one in pairs])
    for name, blocked in (("after", removed), ("parent", removed)):
        pairs = zip(asked, candidates, plan["before"], strict=True)
        _is(found.known[name], [_expected(lm, *one, blocked) for one in pairs])
    some = [
        any(lm.score(q.prompt, q.continuation, path)[1] for path in paths)
        for q, paths in zip(asked, near, strict=True)
    ]
    assert found.known["any sibling"].exact.tolist() == some
    assert found.known["any sibling"].ranks is None
    assert lm.bank.blocked == frozenset()


def _siblings(lm, asked, path):
    """For each question the other leaves under the parent, the nearest first."""
    leaves = [leaf for leaf in range(3 * path[1], 3 * path[1] + 3) if leaf != path[2]]
    near = []
    for vector in lm.encoder.encode([q.prompt for q in asked]):
        far = {leaf: float(np.linalg.norm(lm.tree.centroids[2][leaf] - vector)) for leaf in leaves}
        near.append([(*path[:2], leaf) for leaf in sorted(leaves, key=far.__getitem__)])
    return near


def test_a_subtree_has_siblings_with_children_and_no_parent(lm, questions):
    removed = {pair for pair in subtree(lm.bank.config, 1) if pair[0] != 2}
    asked = _topic(lm, questions, removed)[:8]
    found = leakage.measure(lm, asked, removed)
    assert "parent" not in found.known and "sibling" in found.known
    candidates = leakage.family_candidates(asked, asked)
    pairs = list(zip(asked, candidates, strict=True))
    _is(found.known["after"], [_expected(lm, *one, "none") for one in pairs])
    expected = []
    for (question, wrong), vector in zip(
        pairs, lm.encoder.encode([q.prompt for q in asked]), strict=True
    ):
        path, choice = [], [0, 2]
        for level in lm.tree.centroids:
            path.append(min(choice, key=lambda c: float(np.linalg.norm(level[c] - vector))))
            choice = range(3 * path[-1], 3 * path[-1] + 3)
        expected.append(_expected(lm, question, wrong, path))
    _is(found.known["sibling"], expected)


def test_removed_blocks_on_the_sibling_s_path_are_zeros_too(lm, questions):
    removed = {(1, 1)} | {(3, leaf) for leaf in range(27) if leaf // 9 != 1}
    asked = [q for q in questions if lm.route(q.prompt).ids[0] == 1][:3]
    found = leakage.measure(lm, asked, removed, candidates=[[]] * len(asked))
    for question, exact, loss in zip(
        asked, found.known["any sibling"].exact, found.known["sibling"].losses, strict=True
    ):
        paths = [(root, 3 * root, 9 * root) for root in (0, 2)]  # of which only the root counts
        known = [_expected(lm, question, [], path, [(3, path[2])]) for path in paths]
        assert exact == any(one[0] for one in known)
        assert min(abs(loss - one[2]) for one in known) < 1e-3


def test_one_sibling_that_answers_is_enough(lm, questions):
    for question in questions:
        path = lm.route(question.prompt).ids
        near = _siblings(lm, [question], path)[0]
        texts = [lm.generate(question.prompt, one, 3) for one in near]
        if texts[0] != texts[1]:
            break
    for text in texts:
        asked = [replace(question, continuation=text, answer=text)]
        found = leakage.measure(lm, asked, {(3, path[2])})
        assert found.known["any sibling"].exact.tolist() == [True]
        assert found.known["sibling"].exact.tolist() == [text == texts[0]]


def test_the_parent_is_the_block_above_and_no_other(tmp_path):
    lm = load(make_tiny_model(tmp_path / "deep", ranks=(4, 2, 2)))
    prompt = random_texts(1, seed=3)[0]
    path = lm.route(prompt).ids
    question = Question(prompt, "72", "72", "a", 1, 0, [])
    found = leakage.measure(lm, [question], {(3, path[2])}, candidates=[["Hf", "72", "Cd"]])
    blocked = [(1, path[0]), (3, path[2])]
    exact, rank, loss = _expected(lm, question, ["Hf", "Cd"], "fetched", blocked)
    known = found.known["parent"]
    assert known.exact[0] == exact and abs(known.losses[0] - loss) < 1e-3
    assert known.ranks[0] == rank + 0.5  # the true answer itself is a tie


def test_siblings_that_are_removed_are_not_asked(lm, questions):
    cluster = lm.route(questions[0].prompt).ids[1]
    removed = {(3, leaf) for leaf in range(3 * cluster, 3 * cluster + 3)}
    asked = _topic(lm, questions, removed)[:2]
    found = leakage.measure(lm, asked, removed)
    assert "sibling" not in found.known and "any sibling" not in found.known


def test_after_a_removal_it_is_the_same_but_for_before(folder, lm, questions, other, tmp_path):
    asked = _topic(lm, questions, {(1, 0)})[:6]
    whole = leakage.measure(lm, asked, {(1, 0)}, never=load(other))
    copy = copytree(folder, tmp_path / "copy")
    remove(copy / "memory", [(1, 0)])
    gone = load(copy)
    found = leakage.measure(gone, asked, gone.bank.removed)
    assert set(whole.known) - set(found.known) == {"before"}
    again = leakage.measure(gone, asked, {(1, 0)}, before=lm, never=load(other))
    assert again.to_dict() == whole.to_dict()
    for name, known in found.known.items():
        assert known.to_dict() == whole.known[name].to_dict()
    never = load(other)
    first = asked[0]
    logprob, exact = never.score(first.prompt, first.continuation, "none")
    assert whole.never["anchor"].exact[0] == exact
    assert whole.never["anchor"].to_dict() != whole.known["anchor"].to_dict()


def test_documents_elsewhere_are_counted(lm, questions):
    asked, leaves = _topic(lm, questions, {(1, 0)})[:4], ([0], [0, 9], [26], [0])
    asked = [replace(q, leaves=given) for q, given in zip(asked, leaves, strict=True)]
    assert leakage.measure(lm, asked, {(1, 0)}).elsewhere == 2


def test_candidates_are_others_of_the_family(questions):
    chosen = leakage.family_candidates(questions, questions, most=5)
    texts = {
        q.family: {o.continuation for o in questions if o.family == q.family} for q in questions
    }
    for question, others in zip(questions, chosen, strict=True):
        assert len(others) == len(set(others)) == 4
        assert set(others) <= texts[question.family] - {question.continuation}
    assert chosen == leakage.family_candidates(questions, questions, most=5)
    assert chosen != leakage.family_candidates(questions, questions, most=5, seed=1)
    assert leakage.family_candidates(questions[:1], questions[:1]) == [[]]


def test_what_is_refused(lm, questions, folder, tmp_path):
    asked = _topic(lm, questions, {(1, 0)})
    with pytest.raises(InputError, match="there are no questions"):
        leakage.measure(lm, [], {(1, 0)})
    with pytest.raises(InputError, match="no removed block is on its path"):
        leakage.measure(lm, asked, {(1, 1)})
    with pytest.raises(PathError, match="level '2' has no memory"):
        leakage.measure(lm, asked, {(2, 0)})
    tree = load(make_tiny_model(tmp_path / "tree"))
    with pytest.raises(ConfigError, match="has another tree than"):
        leakage.measure(lm, asked, {(1, 0)}, never=tree)
    tokens = load(folder)
    tokens.tokenize = lambda text: [0, *text.encode()]
    with pytest.raises(ConfigError, match="has another tokenizer"):
        leakage.measure(lm, asked, {(1, 0)}, never=tokens)


# ---- verdicts and sentences ------------------------------------------------------------


def _known(exact, loss, n=20):
    rng = np.random.default_rng(0)
    right = np.arange(n) < exact * n
    return Known(right, np.full(n, 2.0), loss + 0.1 * rng.standard_normal(n))


def _leakage(known, never, n=20, elsewhere=0):
    return Leakage(n, elsewhere, 4.5, known, never)


@pytest.mark.parametrize(
    ("ours", "theirs", "left"),
    [
        ((0.5, 2.0), (0.0, 2.0), True),  # more answers
        ((0.0, 1.0), (0.0, 2.0), True),  # a smaller loss
        ((0.05, 2.0), (0.0, 2.0), False),  # one answer in twenty is chance
        ((0.0, 3.0), (0.5, 2.0), False),  # less than the other
        ((0.0, 2.0), (0.0, 2.0), False),
    ],
)
def test_what_is_left_is_more_than_another_model_knows(ours, theirs, left):
    found = _leakage({"anchor": _known(*ours)}, {"anchor": _known(*theirs)})
    assert found.verdict("anchor") is left
    words = "Not gone from" if left else "Gone from"
    assert found.sentences()[-1] == f"{words}: anchor alone."


def test_without_another_model_or_with_few_questions_nothing_is_claimed():
    known = {"anchor": _known(0.5, 1.0)}
    alone = _leakage(known, None)
    assert alone.verdict("anchor") is None
    assert alone.sentences() == [
        f"The anchor alone still answers 50 % of the 20 questions (rank 2.0, "
        f"{known['anchor'].losses.mean():.2f} nats per token).",
        "No model that never saw the topic was given, so it is not known how much of this is "
        "guessing.",
    ]
    few = _leakage({"anchor": _known(1, 0, 9)}, {"anchor": _known(0, 9, 9)}, 9, elsewhere=3)
    assert few.verdict("anchor") is None
    assert few.sentences()[1:] == [
        "Of 3 of the 9 questions documents were trained under other leaves too, from which nothing "
        "was removed.",
        "9 questions are too few to tell what is left.",
    ]


def test_sentences_say_what_is_gone_and_what_is_not():
    same, more = _known(0.1, 3.0), _known(0.6, 1.0)
    known = {"before": _known(0.9, 0.2), "anchor": same, "sibling": more, "parent": same}
    known["any sibling"] = Known(more.exact)
    never = {name: same for name in known} | {"any sibling": Known(same.exact)}
    found = _leakage(known, never)
    loss, other = more.losses.mean(), same.losses.mean()
    assert found.sentences()[2] == (
        "The nearest sibling of the removed cluster still answers 60 % of the 20 questions; of a "
        f"model that never saw them it is 10 % (rank 2.0, {loss:.2f} nats per token, against 2.0 "
        f"and {other:.2f})."
    )
    assert found.sentences()[-3:] == [
        "At least one of all siblings still answers 60 % of the 20 questions; of a model that "
        "never saw them it is 10 %.",
        "Gone from: anchor alone, parent block alone.",
        "Not gone from: nearest sibling of the removed cluster, at least one of all siblings.",
    ]
    conditions = found.to_dict()["conditions"]
    assert conditions["sibling"]["left"] is True and conditions["parent"]["left"] is False
    assert conditions["any sibling"]["rank"] is None
    assert conditions["anchor"]["never"] == same.to_dict()


# ---- the command -----------------------------------------------------------------------


@pytest.fixture
def run(folder, questions, tmp_path, monkeypatch, capsys):
    """``evaluate --task leakage`` on a copy of the model with the questions."""
    monkeypatch.setitem(evaluate.TASKS, "leakage", ("evaluate_leakage", "what is still known"))
    model = copytree(folder, tmp_path / "model")
    (model / "evaluation").mkdir()
    write_questions(model / "evaluation" / "facts.jsonl.gz", questions, ["all"])

    def command(*arguments):
        task = ["evaluate", "--task", "leakage", "--model", str(model)]
        code = cli.main([*task, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    command.model = model
    return command


def test_the_command_before_and_after_a_removal(run, other, lm, questions):
    few = ["--limit", 6, "--candidates", 3]
    code, out, _ = run("--removed-subtree", 1, "--never", other, "--json", *few)
    report = json.loads(out)
    assert code == 0 and report["questions"] == 6 and report["chance_rank"] == 2
    assert len(report["removed"]) == 10 and "before" in report["conditions"]
    remove(run.model / "memory", subtrees=[1])
    again = json.loads(run("--never", other, "--before", lm.bank.folder.parent, "--json", *few)[1])
    assert again == report
    code, out, _ = run("--never", other, *few)
    assert code == 0 and "6 questions that are routed through 10 removed blocks" in out
    assert "guessing gives rank 2.0" in out and "never: exact %" in out
    assert "6 questions are too few to tell what is left." in out
    code, out, _ = run("--removed", "3:4", "1:0", *few)
    assert "never:" not in out and "No model that never saw the topic was given" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing was removed from this bank; say what to measure with --removed"),
        (["--removed", "2:0"], "level '2' has no memory"),
        (["--removed-subtree", "3"], "cluster '3' of level 1 does not exist"),
        (["--removed", "1:0", "--candidates", "1"], "--candidates is 1; expected at least 2"),
    ],
)
def test_what_the_command_refuses(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2 and not out and err.count("\n") == 1 and message in err
