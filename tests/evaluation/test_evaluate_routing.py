"""The routing task against single calls of ``lm.route``."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mlx_hiermem import load
from mlx_hiermem.evaluation import routing
from mlx_hiermem.evaluation.facts import Question
from tests.tiny import make_tiny_model, random_texts


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), ranks=(2, 1, 1), branching=2)
    return load(folder)


def test_a_question_lands_where_an_ancestor_of_a_trained_leaf_is(lm):
    rng = random.Random(0)
    questions = [
        Question(
            prompt, " a.", "a", rng.choice("xyz"), 1, 0, rng.sample(range(8), rng.randint(0, 2))
        )
        for prompt in random_texts(60, seed=4)
    ]
    expected = []
    for question in questions:
        ids = lm.route(question.prompt).ids
        expected.append(
            [
                ids[0] in {leaf // 4 for leaf in question.leaves},
                ids[1] in {leaf // 2 for leaf in question.leaves},
                ids[2] in question.leaves,
            ]
        )
    right = routing.landed(lm, questions)
    assert right.tolist() == expected
    shares = np.mean(expected, axis=0)
    assert 1 > shares[0] > shares[1] > shares[2] > 0
    assert routing.summary(right) == {"levels": shares.tolist(), "n": 60}

    per_family = routing.by_family(questions, right)
    assert list(per_family) == ["x", "y", "z"]
    for family, found in per_family.items():
        rows = [row for row, q in zip(expected, questions, strict=True) if q.family == family]
        assert found == {"levels": np.mean(rows, axis=0).tolist(), "n": len(rows)}


def test_levels_count_from_the_top():
    paths = np.array([[1, 4, 13], [1, 4, 13], [1, 4, 13], [1, 4, 13]])
    leaves = [[13], [0, 12], [15], [8]]
    assert routing.lands(paths, leaves, branching=3).tolist() == [
        [True, True, True],
        [True, True, False],
        [True, False, False],
        [False, False, False],
    ]
