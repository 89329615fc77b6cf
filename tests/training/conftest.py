"""One place with models and corpora for all tests of ``train``; none of them changes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.runs import make_place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))
