"""Corpus folders: what is written is what is opened, and whatever is wrong is named in one line."""

import io
import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mlx_hiermem.corpus.folder import (
    Corpus,
    CorpusInfo,
    file_sha256,
    folder_sha256,
)
from mlx_hiermem.errors import FormatError
from mlx_hiermem.routing.tree import ClusterTree
from tests.corpus.splits import LENGTH, WINDOW, make_part, many, place, read, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small corpus of two splits and several shards."""
    folder = tmp_path_factory.mktemp("whole") / "corpus"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "tokenizer" / "vocab.txt").write_text("a b c")
    (folder / "routing").mkdir()
    rng = np.random.default_rng(0)
    tree = ClusterTree([rng.standard_normal((3**level, 4)) for level in (1, 2)])
    tree.save(folder / "routing" / "tree.safetensors")
    work = folder.parent
    train = write(folder / "train", place(work, [make_part(many())], 9))
    validation = write(folder / "validation", place(work, [make_part(many(9))], 9))
    info = CorpusInfo(
        tokenizer={
            "sha256": folder_sha256(folder / "tokenizer"),
            "vocab_size": 1000,
            "end_of_text": 0,
        },
        sequence_length=LENGTH,
        window=WINDOW,
        seed=0,
        views=(),
        branching=3,
        levels=2,
        encoder={"type": "bert", "max_length": 256},
        tree_sha256=file_sha256(folder / "routing" / "tree.safetensors"),
        source={"files": ["a.txt"], "fingerprint": "f"},
        splits={"train": train, "validation": validation},
    )
    info.save(folder)
    return folder


@pytest.fixture
def corpus(whole, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(whole, tmp_path / "corpus")


def fails(folder, message, action=Corpus.open):
    with pytest.raises(FormatError, match=message) as error:
        action(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_was_written_is_opened(whole):
    corpus = Corpus.open(whole)
    for name, split in (("train", corpus.train), ("validation", corpus.validation)):
        tokens, leaves = read(whole / name, corpus.info.splits[name])
        assert len(split) == len(tokens) and split.end_of_text == 0
        assert split.sequence_length == LENGTH
        taken, of = split.take(np.arange(len(split)))
        np.testing.assert_array_equal(taken, tokens)
        np.testing.assert_array_equal(of, leaves)
    assert len(corpus.info.splits["train"].shards) > 3
    assert corpus.tree().levels == 2
    assert corpus.revision == json.loads((whole / "corpus.json").read_text())["revision"]
    assert corpus.tokenizer_folder.is_dir() and corpus.routing_folder.is_dir()
    steps = []
    results = corpus.verify(steps.append)
    shards = sum(len(split.shards) for split in corpus.info.splits.values())
    assert len(results) == 2 * shards + 2 and all(result["ok"] for result in results)
    assert sum(steps) == sum(r["bytes"] for r in results if r["file"] != "tokenizer")


def test_a_corpus_without_validation(corpus):
    info = CorpusInfo.load(corpus)
    replace(info, splits={"train": info.splits["train"]}).save(corpus)
    shutil.rmtree(corpus / "validation")
    assert Corpus.open(corpus).validation is None


def test_the_table_is_read_as_it_was_written(whole):
    info = CorpusInfo.load(whole)
    assert CorpusInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info
    assert replace(info, seed=1).revision != info.revision


# ---- corpus.json --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 2, "format_version is '2'; this version of mlx_hiermem reads 1"),
        ("revision", "0" * 64, "but its table gives"),
        ("revision", None, "no key 'revision'"),
        ("window", None, "no key 'window'"),
        ("extra", 1, "unknown key 'extra'"),
        ("window", 12, "window is 12, not a multiple of sequence_length 8"),
        ("sequence_length", 1, "sequence_length is '1'; expected an integer from 2 on"),
        ("sequence_length", True, "sequence_length is 'True'"),
        ("seed", -1, "seed is '-1'"),
        ("views", "whole", "views is 'whole'; expected a list"),
        ("views", [1], "expected a list of strings"),
        ("branching", 1, "branching is '1'"),
        ("levels", 0, "levels is '0'"),
        ("levels", 63, "cannot be numbered"),
        ("encoder", {}, "expected an object with a type"),
        ("encoder", {"type": "embeddings"}, "embedding_sha256 is 'None'"),
        ("embedding_sha256", "0" * 64, "is given for an encoder of type bert"),
        ("tree_sha256", "abc", "tree_sha256 is 'abc'; expected a sha256"),
        ("source", {}, "expected one with a fingerprint"),
        ("splits", {}, "splits are none"),
        ("splits", [], "splits is not an object"),
        ("tokenizer", 3, "tokenizer is 3; expected an object"),
        ("tokenizer.vocab_size", 0, "vocab_size of the tokenizer is '0'"),
        ("tokenizer.vocab_size", None, "expected an object of sha256, vocab_size and end_of_text"),
        ("tokenizer.end_of_text", 1000, "end_of_text is 1000, but the tokenizer has 1000 ids"),
        ("splits.test", {}, "split test has no key"),
        ("splits.train.documents", 0, "documents of a split is '0'"),
        ("splits.train.sequences", 1, "a split of 1 sequences lists shards of"),
        ("splits.train.fill", 1.5, "fill of a split is '1.5'"),
        ("splits.train.shards", {}, "shards of split train is not a list"),
        ("splits.train.shards.0", 3, "a shard of split train is '3'"),
        ("splits.train.shards.0.sequences", 0, "sequences of 00000.tokens.npy is '0'"),
        ("splits.train.shards.0.tokens_sha256", "x" * 64, "expected a sha256 of 64 hex digits"),
        ("splits.train.shards.0.tokens", "../../secret.npy", "expected a plain file name"),
        ("splits.train.shards.0.tokens", "/etc/passwd", "expected a plain file name"),
        ("splits.train.shards.0.tokens", "..", "expected a plain file name"),
        ("splits.train.shards.0.leaves", "a\\b.npy", "expected a plain file name"),
        ("splits.train.shards.0.leaves", "a\nb.npy", "expected a plain file name"),
        ("splits.train.shards.0.leaves", 7, "expected a plain file name"),
        ("splits.train.shards.0.leaves", "00001.leaves.npy", "lists a file twice"),
    ],
)
def test_a_table_that_cannot_be_right_is_named(corpus, key, value, message):
    path = corpus / "corpus.json"
    table = json.loads(path.read_text())
    *inner, last = key.split(".")
    place = table
    for step in inner:
        place = place[int(step) if step.isdigit() else step]
    if value is None:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = value
    path.write_text(json.dumps(table))
    assert str(path) in fails(corpus, message)


def test_what_is_no_table_is_named(corpus):
    path = corpus / "corpus.json"
    for text, message in (
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ("[" * 9**5, "not"),
    ):
        path.write_text(text)
        assert str(path) in fails(corpus, message)
    path.write_bytes(b"\xff\xfe")
    fails(corpus, "not valid JSON")
    path.unlink()
    fails(corpus, "no such file; the folder is not a corpus, or not to its end")


# ---- files --------------------------------------------------------------------------------


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class Bomb:
    """Unpickling one would leave a file behind."""

    def __reduce__(self):
        return open, ("unpickled", "w")


def objects():
    file = io.BytesIO()
    np.save(file, np.array([Bomb()] * 4, object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["tokens", "leaves"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "truncated: "),
        (lambda data: data + b"x", "too long: "),
        (lambda data: data[:40], "header cannot be read"),
        (lambda data: b"", "header cannot be read"),
        (lambda data: b"PK\x03\x04" + data, "header cannot be read"),
        (lambda data: pickle.dumps(Bomb()), "header cannot be read"),
        (lambda data: objects(), "holds object of shape"),
        (lambda data: npy(np.load(io.BytesIO(data)).astype(np.int16)), "holds int16 of shape"),
        (lambda data: npy(np.load(io.BytesIO(data)).astype(">i8")), "holds >i8 of shape"),
        (lambda data: npy(np.load(io.BytesIO(data))[:-1]), "corpus.json says"),
        (lambda data: npy(np.load(io.BytesIO(data))[:, None]), "corpus.json says"),
        (lambda data: data[:6] + b"\x02\x00" + data[8:], r"version \(2, 0\)"),
        (lambda data: data.replace(b"'shape'", b"'share'"), "header cannot be read"),
    ],
)
def test_a_damaged_shard_is_named(corpus, monkeypatch, kind, damage, message):
    monkeypatch.chdir(corpus)
    path = corpus / "train" / f"00001.{kind}.npy"
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in fails(corpus, message)
    assert not (corpus / "unpickled").exists()


def test_rows_in_fortran_order_are_not_taken_for_rows(corpus):
    path = corpus / "train" / "00000.tokens.npy"
    path.write_bytes(npy(np.asfortranarray(np.load(path))))
    fails(corpus, "in Fortran order")


def test_a_leaf_beyond_the_tree_is_named(corpus):
    path = corpus / "train" / "00001.leaves.npy"
    for leaf in (9, -1):
        leaves = np.load(path)
        leaves[1] = leaf
        path.write_bytes(npy(leaves))
        fails(corpus, "00001.leaves.npy: holds a leaf beyond the 9 of the tree")


@pytest.mark.parametrize(
    "name",
    ["tokenizer", "routing", "routing/tree.safetensors", "train/00001.tokens.npy", "validation"],
)
def test_what_is_missing_is_named(corpus, name):
    path = corpus / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert str(path) in fails(corpus, "no such f")


def test_an_empty_tokenizer_folder_or_a_folder_for_a_shard_is_named(corpus):
    path = corpus / "train" / "00001.leaves.npy"
    path.unlink()
    path.mkdir()
    fails(corpus, "00001.leaves.npy: ")
    shutil.rmtree(corpus / "tokenizer")
    (corpus / "tokenizer").mkdir()
    fails(corpus, "tokenizer: no such folder, or nothing in it")


@pytest.mark.parametrize(
    "name", ["train/00001.tokens.npy", "validation/00000.leaves.npy", "routing/tree.safetensors"]
)
def test_a_changed_byte_is_found_by_verify(corpus, name):
    path = corpus / name
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    opened = Corpus.open(corpus)
    with pytest.raises(FormatError, match="altered: sha256 is") as error:
        opened.verify()
    assert str(path) in str(error.value)
    if name.startswith("routing"):
        with pytest.raises(FormatError, match="altered: sha256 is"):
            opened.tree()


def test_another_tokenizer_or_tree_is_found(corpus):
    (corpus / "tokenizer" / "vocab.txt").write_text("a b d")
    with pytest.raises(FormatError, match="tokenizer: altered"):
        Corpus.open(corpus).verify()
    path = corpus / "routing" / "tree.safetensors"
    ClusterTree([np.eye(3, 4)]).save(path)
    replace(CorpusInfo.load(corpus), tree_sha256=file_sha256(path)).save(corpus)
    with pytest.raises(FormatError, match="branching 3 and 1 levels, but corpus.json says 3 and 2"):
        Corpus.open(corpus).tree()
