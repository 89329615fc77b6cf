"""``cluster`` names the clusters of its tree, and the names go wherever the tree goes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_hiermem import cli
from mlx_hiermem.bank.manifest import read_manifest
from mlx_hiermem.corpus import build, naming
from mlx_hiermem.corpus.build import build_corpus
from mlx_hiermem.corpus.config import CorpusConfig
from mlx_hiermem.corpus.folder import Corpus
from mlx_hiermem.errors import FormatError
from mlx_hiermem.making import make_model
from mlx_hiermem.routing.names import NAMES, ClusterNames, split_words
from tests.corpus.corpora import files_of, make_documents, pieces_of, write_jsonl
from tests.tiny import make_tiny_model

DOCUMENTS = make_documents(120)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("names")
    make_tiny_model(place / "model")
    write_jsonl(place / "some.jsonl", DOCUMENTS)
    return place


@pytest.fixture(scope="module")
def config(place) -> CorpusConfig:
    return CorpusConfig(
        data=(str(place / "some.jsonl"),), model=str(place / "model"), encoder="embeddings",
        sequence_length=64, window=64, branching=3, levels=2, validation=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(place, config) -> Path:
    build_corpus(place / "made", config, unit_bytes=4000)
    return place / "made"


def test_every_cluster_has_a_name_of_words_that_its_documents_hold(made):
    names = ClusterNames.load(made / "routing")
    names.check(3, 2)
    words = {word for document in DOCUMENTS for word in split_words(document["text"])}
    for level in names.levels:
        for cluster, name in enumerate(level):
            # Of a text that goes on in the next window, the first word may be a part of one.
            found = name.split(", ")
            assert name == f"cluster {cluster}" or any(word in words for word in found)
    assert len(set(names.levels[0])) == 3
    assert not (made / "work").exists()
    Corpus.open(made).verify()


def test_the_names_are_those_of_the_windows_in_each_leaf(place, config, monkeypatch):
    """What each leaf is named after is what was placed in it, cut to its first tokens."""
    given: dict[int, list[str]] = {}
    name_tree = naming.name_tree

    def watched(texts, branching, levels, progress):
        given.update({leaf: texts(leaf) for leaf in range(branching**levels)})
        return name_tree(given.__getitem__, branching, levels, progress)

    monkeypatch.setattr(naming, "name_tree", watched)
    monkeypatch.setattr(naming, "TOKENS", 20)
    monkeypatch.setattr(naming, "_MOST", 5)
    build_corpus(place / "watched", config, unit_bytes=4000, keep_work=True)
    assert not (place / "watched/work/names.u32").exists()
    corpus = Corpus.open(place / "watched")
    windows = np.bincount(corpus.train.leaves, minlength=9)
    tokens, leaves = corpus.train.take(np.arange(len(corpus.train)))
    for leaf, texts in given.items():
        assert len(texts) <= 5 and bool(texts) == bool(windows[leaf])
        packed = [piece.decode() for piece in pieces_of(tokens[leaves == leaf])]
        for text in texts:
            assert len(text) <= 20 and any(one.startswith(text) for one in packed)
    assert any(len(text) < 20 for texts in given.values() for text in texts)


def test_the_same_corpus_has_the_same_names_however_it_is_made(made, place, config, monkeypatch):
    stop = KeyboardInterrupt()

    def killed(*args, **kwargs):
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(build, "summarize", killed)  # the names are there, the corpus is not
        with pytest.raises(KeyboardInterrupt):
            build_corpus(place / "again", config, unit_bytes=4000)
    assert (place / "again" / "routing" / NAMES).exists()
    build_corpus(place / "again", config, unit_bytes=4000)
    assert files_of(place / "again") == files_of(made)


def test_without_names_nothing_else_changes(made, place, config):
    data = str(place / "some.jsonl")
    out = place / "plain"
    assert cli.main([
        "cluster", "--data", data, "--model", str(place / "model"), "--encoder", "embeddings",
        "--sequence-length", "64", "--window", "64", "--branching", "3", "--levels", "2",
        "--validation", "0.1", "--unit-size", "4000", "--no-names", "--out", str(out),
    ]) == 0  # fmt: skip
    expected = files_of(made)
    del expected[f"routing/{NAMES}"]
    assert files_of(out) == expected


def test_a_tree_that_is_given_keeps_its_names(made, place, config):
    few = write_jsonl(place / "few.jsonl", DOCUMENTS[:60])  # they would give other names
    given = replace(config, data=(str(few),), tree=made / "routing", branching=None, levels=None)
    build_corpus(place / "given", given, unit_bytes=4000)
    assert (place / "given/routing" / NAMES).read_bytes() == (made / "routing" / NAMES).read_bytes()
    # A tree without names gets them from the documents that were assigned by it.
    bare = place / "bare"
    shutil.copytree(made / "routing", bare)
    (bare / NAMES).unlink()
    build_corpus(place / "named", replace(given, tree=bare), unit_bytes=4000)
    named = ClusterNames.load(place / "named/routing")
    assert named.levels != ClusterNames.load(made / "routing").levels
    # And if they are not wanted, it has none.
    build_corpus(place / "unnamed", given, unit_bytes=4000, names=False)
    assert not (place / "unnamed/routing" / NAMES).exists()


@pytest.mark.parametrize("text", ['{"level1": ["a", "b"]}', "nonsense"])
def test_names_that_do_not_belong_to_the_tree_are_refused(made, place, config, text, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(made / "routing", wrong)
    (wrong / NAMES).write_text(text)
    given = replace(config, tree=wrong, branching=None, levels=None)
    with pytest.raises(FormatError, match=NAMES):
        build_corpus(tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def test_names_go_along_with_the_tree_into_a_bank(made, place, tmp_path, capsys):
    model = tmp_path / "made"
    made_model = make_model(place / "model", model, ranks=(4, 8), tree=made, fresh_memory=True)
    assert made_model.config.branching == 3
    listed = read_manifest(model / "memory").files
    assert NAMES in listed and NAMES in files_of(model / "memory")
    expected = (made / "routing" / NAMES).read_bytes()
    assert (model / "memory" / NAMES).read_bytes() == expected
    # From one bank to the next, too.
    make_model(place / "model", tmp_path / "next", ranks=(4, 8), tree=model, fresh_memory=True)
    assert (tmp_path / "next/memory" / NAMES).read_bytes() == expected
    # It is not left out of what a verification reads.
    assert cli.main(["bank", "verify", "--model", str(model), "--json"]) == 0
    assert NAMES in [file["file"] for file in json.loads(capsys.readouterr().out)["files"]]
    (model / "memory" / NAMES).write_bytes(expected.replace(b"level1", b"level9"))
    assert cli.main(["bank", "verify", "--model", str(model)]) == 2
    assert f"{NAMES}: altered" in capsys.readouterr().err


# ---- bank names ------------------------------------------------------------------------


@pytest.fixture
def bare(made, place, tmp_path) -> Path:
    """A model with the tree of the corpus, without names."""
    routing = tmp_path / "bare"
    shutil.copytree(made, routing)
    (routing / "routing" / NAMES).unlink()
    make_model(place / "model", tmp_path / "m", ranks=(4, 8), tree=routing, fresh_memory=True)
    assert not (tmp_path / "m/memory" / NAMES).exists()
    return tmp_path / "m"


def test_a_bank_gets_the_names_of_its_corpus(made, bare, capsys):
    command = ["bank", "names", "--model", str(bare), "--corpus", str(made), "--json"]
    before = read_manifest(bare / "memory").revision
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    expected = ClusterNames.load(made / "routing")
    assert ClusterNames.load(bare / "memory").levels == expected.levels
    assert found["level1"] == list(expected.levels[0]) and found["levels"] == [3, 9]
    assert found["revision_before"] == before != found["revision"]
    assert cli.main(["bank", "verify", "--model", str(bare)]) == 0
    capsys.readouterr()
    assert cli.main(command) == 0
    again = json.loads(capsys.readouterr().out)  # nothing changes
    assert again["revision"] == again["revision_before"] == found["revision"]


def test_a_bank_is_named_after_documents_that_it_routes(place, bare, capsys):
    assert cli.main(["bank", "names", "--model", str(bare), "--text",
                     str(place / "some.jsonl")]) == 0  # fmt: skip
    assert "3 + 9 clusters named" in capsys.readouterr().out
    names = ClusterNames.load(bare / "memory")
    words = {word for document in DOCUMENTS for word in split_words(document["text"])}
    for level in names.levels:
        for cluster, name in enumerate(level):
            assert name == f"cluster {cluster}" or set(name.split(", ")) <= words


def test_names_of_another_tree_or_none_are_refused(made, place, bare, config, tmp_path, capsys):
    revision = read_manifest(bare / "memory").revision
    build_corpus(tmp_path / "other", replace(config, seed=5), names=False)
    for corpus, words in (
        (tmp_path / "other", "another tree"),
        (tmp_path / "bare", "has no names"),
    ):
        assert cli.main(["bank", "names", "--model", str(bare), "--corpus", str(corpus)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert words in error
    assert read_manifest(bare / "memory").revision == revision
