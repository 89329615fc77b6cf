"""One place with anchors, banks and corpora for all tests of ``init``; none of them changes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlx_hiermem.making import make_model
from tests.corpus.corpora import make_documents, make_tiny_bert, write_jsonl
from tests.init.fresh import save_llama
from tests.tiny import make_tiny_model
from tests.training.runs import make_corpus


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """``model``: the tiny model with a bank; ``anchor``: without; ``llama``: one of transformers';
    ``corpus``: made with ``anchor``, its embeddings the encoder; ``corpus-bert``: with a BERT."""
    place = tmp_path_factory.mktemp("place")
    make_tiny_model(place / "model", branching=3)
    shutil.copytree(place / "model", place / "anchor", ignore=shutil.ignore_patterns("memory"))
    save_llama(place / "llama", place / "anchor")
    write_jsonl(place / "some.jsonl", make_documents(160))
    make_tiny_bert(place / "bert")
    make_corpus(place, "corpus")
    make_corpus(place, "corpus-bert", encoder=str(place / "bert"))
    return place


@pytest.fixture(scope="session")
def bare(place) -> Path:
    return make_model(
        place / "model", place / "bare", (4, 2), branching=3, fresh_memory=True
    ).folder
