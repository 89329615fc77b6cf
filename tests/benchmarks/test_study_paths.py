"""Wrong paths, blocking and beams against written-out loops over the model's public calls."""

from __future__ import annotations

import random
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from benchmarks.studies import beams as study_beams
from benchmarks.studies import blocking as study_blocking
from benchmarks.studies import wrong_path as study_wrong_path
from benchmarks.studies.asking import paths as study_paths
from benchmarks.studies.asking.table import open_study, tuples
from mlx_hiermem.evaluation.questions import read_questions
from mlx_hiermem.routing.tree import AddedTree, ClusterTree
from mlx_hiermem.scoring import score
from tests.benchmarks.study_model import N, rows, run


@pytest.fixture
def questions(model):
    return read_questions(model / "evaluation" / "facts.jsonl.gz")[0]


def mean(values):
    return pytest.approx(sum(values) / len(values))


def distance(tree, vector, level, cluster):
    return float(np.linalg.norm(tree.centroids[level - 1][cluster] - vector))


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "added"])
def tree(request):
    """Three children each; one has an added memory of two roots besides."""
    rng = np.random.default_rng(0)
    plain = ClusterTree([rng.standard_normal((3**level, 4)) for level in (1, 2, 3)])
    if not request.param:
        return plain
    added = [rng.standard_normal((2 * 3 ** (level - 1), 4)) for level in (1, 2, 3)]
    return plain.with_added([AddedTree(added, radius=1.0)])


def children(tree, parent, level):
    return [3 * parent + i for i in range(tree.roots if level == 1 else 3)]


def greedy(tree, vector, path):
    """The rest of a path, the nearest child each time."""
    path = list(path)
    while len(path) < tree.levels:
        level = len(path) + 1
        kids = [3 * path[-1] + i for i in range(3)]
        path.append(min(kids, key=lambda c: distance(tree, vector, level, c)))
    return path


# ---- paths -----------------------------------------------------------------------------


def test_wrong_clusters_are_the_siblings_by_distance(tree):
    rng = random.Random(1)
    vectors = np.random.default_rng(1).standard_normal((40, 4)).astype(np.float32)
    paths = tree.assign(vectors)[0]
    trained = [rng.sample(range(27), rng.randint(0, 9)) for _ in vectors]
    for level in (1, 2, 3):
        found = study_paths.wrong_clusters(tree, vectors, paths, level, trained)
        short = 0
        for vector, path, leaves, row in zip(vectors, paths, trained, found, strict=True):
            parent = path[level - 2] if level > 1 else 0
            right = {leaf // 3 ** (3 - level) for leaf in leaves} | {path[level - 1]}
            every = children(tree, parent, level)
            wrong = [c for c in every if c not in right]
            wrong.sort(key=lambda c: distance(tree, vector, level, c))
            missing = len(every) - 1 - len(wrong)
            assert row.tolist() == wrong + [study_paths.NO_CLUSTER] * missing
            short += missing > 0
        assert short


def test_paths_are_completed_greedily_and_at_random(tree):
    vectors = np.random.default_rng(2).standard_normal((30, 4)).astype(np.float32)
    clusters = np.arange(30) % 9
    found = study_paths.complete(tree, vectors, 2, clusters)
    assert found.tolist() == [
        greedy(tree, vector, (c // 3, c)) for vector, c in zip(vectors, clusters, strict=True)
    ]
    drawn = study_paths.random_below(np.random.default_rng(0), tree, 2, clusters)
    assert (drawn[:, 1] == clusters).all() and (drawn[:, 2] // 3 == clusters).all()
    assert (drawn[:, 0] == clusters // 3).all() and len(set(drawn[:, 2] % 3)) == 3


def test_the_second_path_is_the_nearest_other_that_a_beam_finds(tree):
    vectors = np.random.default_rng(3).standard_normal((60, 4)).astype(np.float32)
    paths = tree.assign(vectors)[0]
    assert tree.roots == 3 or {3, 4} & set(paths[:, 0].tolist())
    found = study_paths.second_paths(tree, vectors, paths)
    elsewhere = 0
    for vector, path, second in zip(vectors, paths.tolist(), found.tolist(), strict=True):
        beam = [()]
        for level in (1, 2, 3):
            kids = [c for node in beam for c in children(tree, node[-1] if node else 0, level)]
            others = [c for c in kids if c != path[level - 1]]
            best = min(others, key=lambda c: distance(tree, vector, level, c))
            beam = [tuple(path[:level]), tuple(best // 3**j for j in range(level - 1, -1, -1))]
        assert tuple(second) == beam[1] and second != path
        elsewhere += second[0] != path[0]
    assert 0 < elsewhere < 60


# ---- wrong paths -----------------------------------------------------------------------


def test_the_costs_of_wrong_paths_are_those_of_the_model(model, lm, questions, tmp_path, capsys):
    found = rows(study_wrong_path, model, tmp_path)
    assert "level1-random" in capsys.readouterr().out
    vectors = lm.encoder.encode([question.prompt for question in questions])
    for level in (1, 2):
        hits, nats = {1: [], 2: []}, {1: [], 2: []}
        for question, vector in zip(questions, vectors, strict=True):
            path = lm.route(question.prompt).ids
            trained = {leaf // 3 ** (2 - level) for leaf in question.leaves} | {path[level - 1]}
            first = 3 * path[0] if level == 2 else 0
            wrong = [c for c in range(first, first + 3) if c not in trained]
            wrong.sort(key=lambda c, level=level: distance(lm.tree, vector, level, c))
            for near, cluster in enumerate(wrong, 1):
                given = (path[0], cluster) if level == 2 else greedy(lm.tree, vector, (cluster,))
                logprob, right = lm.score(question.prompt, question.continuation, given)
                hits[near].append(right)
                nats[near].append(-logprob / len(question.continuation))  # a token is a byte
        for near in (1, 2):
            assert found[f"wrong_path.accuracy@level{level}-{near}"] == mean(hits[near])
            assert found[f"wrong_path.loss@level{level}-{near}"] == pytest.approx(
                np.mean(nats[near]), rel=1e-4
            )
    for level in (1, 2):
        hits = []
        for question in questions:
            path = lm.route(question.prompt).ids
            lm.bank.block(level, path[level - 1])
            hits.append(lm.score(question.prompt, question.continuation)[1])
            lm.bank.unblock(level, path[level - 1])
        assert found[f"wrong_path.accuracy@blocked{level}"] == mean(hits)
    for name, memory in (("right", "fetched"), ("none", "none"), ("generic", "generic")):
        hits = [lm.score(q.prompt, q.continuation, memory)[1] for q in questions]
        assert found[f"wrong_path.accuracy@{name}"] == mean(hits)
    other = rows(study_wrong_path, model, tmp_path, "--seed", 1)
    differ = {name for name in found if found[name] != other[name]}
    assert differ and all(name.endswith("-random") for name in differ)


# ---- blocking --------------------------------------------------------------------------


def test_curves_are_those_of_blocks_that_are_blocked_in_the_bank(
    model, lm, questions, tmp_path, capsys
):
    found = rows(study_blocking, model, tmp_path)
    assert "3/3" in capsys.readouterr().out
    vectors = lm.encoder.encode([question.prompt for question in questions])
    routed = {q.prompt: lm.route(q.prompt).ids for q in questions}
    for n in range(4):
        hits = {"nearest": [], "rerouted": [], "family": []}
        for question, vector in zip(questions, vectors, strict=True):
            near = sorted(range(3), key=lambda c: distance(lm.tree, vector, 1, c))
            where = [routed[q.prompt][0] for q in questions if q.family == question.family]
            popular = sorted(range(3), key=lambda c: (-where.count(c), c))
            for name, order in (("nearest", near), ("family", popular)):
                blocks = [(1, c) for c in order[:n]]
                blocks += [(2, 3 * c + i) for c in order[:n] for i in range(3)]
                for block in blocks:
                    lm.bank.block(*block)
                hits[name].append(lm.score(question.prompt, question.continuation)[1])
                for block in blocks:
                    lm.bank.unblock(*block)
            to = greedy(lm.tree, vector, (near[n],)) if n < 3 else None
            if to is None:
                hits["rerouted"].append(hits["nearest"][-1])
            else:
                hits["rerouted"].append(lm.score(question.prompt, question.continuation, to)[1])
        for name, right in hits.items():
            assert found[f"blocking.accuracy@{name}-{n}"] == mean(right), (name, n)
    assert found["blocking.accuracy@random-0"] == found["blocking.accuracy@nearest-0"]
    assert found["blocking.accuracy@random-3"] == found["blocking.accuracy@nearest-3"]
    config = lm.bank.config
    assert config.bank_size() == 3 * (config.block_size(1) + 3 * config.block_size(2))


def test_random_blocking_is_the_mean_over_orders():
    order = np.array([[2, 0, 1], [2, 0, 1]])
    curve = study_blocking.blocked_curve(
        order, np.array([[0], [1]]), np.array([True, True]), np.array([False, True])
    )
    assert [one.tolist() for one in curve] == [[1, 1], [1, 1], [0, 1], [0, 1]]


def test_one_family_alone(model, tmp_path, capsys):
    assert run(study_blocking, "--model", model, "--smoke", "--family", "shape") == 0
    assert "6 questions of shape" in capsys.readouterr().out
    assert run(study_blocking, "--model", model, "--family", "metal") == 2
    assert "--family metal: the model has no such questions; it has colour, shape" in (
        capsys.readouterr().err
    )


# ---- beams -----------------------------------------------------------------------------


def half_by_hand(lm, one, other):
    """The memory of half the rows of each of two paths, block by block."""
    config, blocks = lm.bank.config, []
    for level in (1, 2):
        rank, width = config.ranks[level - 1], 16
        blocked = {1: (2,), 2: (1,)}[level]
        pair = []
        for path in (one, other):
            off = [(other_level, path[other_level - 1]) for other_level in blocked]
            found = lm.model.split(lm.model.matrices(lm.fetch(path, blocked=off).memory))
            pair.append(np.array(found[level - 1]).reshape(2, 3, rank, width))
        if one[level - 1] == other[level - 1]:
            block = pair[0]
        else:
            block = np.empty_like(pair[0])
            for layer in range(2):
                kept = []
                for source in pair:
                    norms = np.linalg.norm(source[layer], axis=-1).prod(0)
                    best = sorted(range(rank), key=lambda r, norms=norms: -norms[r])
                    kept += [source[layer][:, r] for r in best[: rank // 2]]
                block[layer] = np.stack(kept, axis=1)
        blocks.append(mx.array(block.reshape(1, -1)))
    return lm.model.join(blocks)


def written(lm, prompt, path, ends, longest):
    """Log-probability of what is written after a prompt, by the engine."""
    total = 0.0
    for n, piece in enumerate(lm.stream(prompt, path, longest), 1):
        text = lm.tokenizer.decode([piece.token])
        total = lm.score(prompt, lm.generate(prompt, path, n), path)[0]
        if ends and text.endswith(ends):
            break
    return total


def test_beams_are_made_and_chosen_as_written_out(model, lm, questions):
    class Args:
        limit, seed, smoke, png = N, 0, False, None

    Args.model = model
    vectors = lm.encoder.encode([question.prompt for question in questions])
    first = lm.tree.assign(vectors)[0]
    second = study_paths.second_paths(lm.tree, vectors, first)
    assert {len(set(pair)) for pair in zip(first[:, 0], second[:, 0], strict=True)} == {1, 2}
    asked, memories = [], []
    for i, (question, *paths) in enumerate(
        zip(questions, first.tolist(), second.tolist(), strict=True)
    ):
        one, other = (lm.fetch(path).memory for path in paths)
        four = [one, other, half_by_hand(lm, *paths), (one + other) / 2]
        np.testing.assert_array_equal(
            np.array(study_beams.halves(lm, tuple(map(tuple, paths)), one, other)),
            np.array(four[2]),
        )
        # Each way to make a memory writes some of the answers.
        text = mlx_lm.generate(
            lm.model, lm.tokenizer, question.prompt, max_tokens=2,
            prompt_cache=lm.model.make_cache(four[i % 4]),
        )  # fmt: skip
        asked.append(replace(question, continuation=text, answer=text))
        memories.append(four)
    hits = {beam: [] for beam in study_beams.BEAMS}
    for question, four, *paths in zip(
        asked, memories, first.tolist(), second.tolist(), strict=True
    ):
        pair = question.prompt, question.continuation
        right = [score(lm, [pair], [memory])[0][1] for memory in four]
        likely = [written(lm, question.prompt, path, None, 2) for path in paths]
        for beam, one in zip(("first", "second", "halves", "mean"), right, strict=True):
            hits[beam].append(one)
        hits["likelier"].append(right[int(likely[1] > likely[0])])
        hits["either"].append(right[0] or right[1])
    assert all(0 < sum(right) < N for right in hits.values())
    assert len({tuple(right) for right in hits.values()}) == len(hits)
    with open_study(Args, N) as study:
        found = study_beams.ask_beams(
            replace(study, questions=asked), tuples(first), tuples(second)
        )
    assert {beam: right.tolist() for beam, right in found.items()} == hits


def test_every_way_to_route_has_its_rows(model, tmp_path, capsys):
    found = rows(study_beams, model, tmp_path)
    ways = ("full", "name", "name-edits-1", "name-edits-2", "name-edits-3")
    assert set(found) == {"beams.fetched@two"} | {
        f"beams.accuracy@{way}-{beam}" for way in ways for beam in study_beams.BEAMS
    }
    assert 1 < found["beams.fetched@two"] <= 2 and "likelier" in capsys.readouterr().out


def test_what_is_written_is_scored_token_by_token(lm, questions):
    pairs = [(question.prompt, "abc") for question in questions]
    paths = [lm.route(question.prompt).ids for question in questions]
    likely = study_beams.written_logprobs(lm, pairs, paths)
    for i in range(N):
        text = lm.generate(pairs[i][0], paths[i], 3)
        if "c" not in text[:2]:  # all end with "c", so that an answer ends there
            assert likely[i] == pytest.approx(lm.score(pairs[i][0], text, paths[i])[0], rel=1e-4)


def test_two_paths_cost_what_their_distinct_blocks_are(model, lm):
    class Args:
        limit, seed, smoke, png = N, 0, False, None

    Args.model = model
    with open_study(Args, N) as study:
        a, b = lm.bank.config.block_size(1), lm.bank.config.block_size(2)
        first, second = np.array([[0, 1], [0, 1]]), np.array([[0, 2], [1, 4]])
        found = study_beams.fetched_ratio(study.lm, first, second)
    assert found.tolist() == [(a + 2 * b) / (a + b), 2.0]
