"""A small model with questions, for the studies that ask a finished one."""

from __future__ import annotations

import pytest

from mlx_hiermem import load
from tests.benchmarks.study_model import make_study_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_study_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def lm(model):
    lm = load(model)
    yield lm
    lm.bank.close()
