"""A model of three levels whose blocks are on disk, and a router that does as it is told."""

from __future__ import annotations

import pytest

from mlx_hiermem import load
from tests.tiny import make_tiny_model
from tests.topics import follower


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # float32, as the anchor: the model computes from the bank's own buffers.
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", ranks=(4, 2, 2))


@pytest.fixture
def lm(folder):
    lm = load(folder, tiers="disk")
    yield lm
    lm.bank.close()


@pytest.fixture
def routes(lm, monkeypatch):
    """Sets the paths that the next texts are routed to; returns the texts that will have been."""

    def follow(*paths):
        texts = []
        monkeypatch.setattr(lm, "route", follower(texts, *paths))
        return texts

    return follow
