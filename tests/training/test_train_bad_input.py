"""Bad input to ``train``: one line that says what and where, exit code 2, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
from contextlib import contextmanager

import numpy as np
import pytest

from mlx_hiermem.training import results
from mlx_hiermem.training.checkpoint import whole_steps
from tests.corpus.corpora import files_of
from tests.tiny import make_tiny_model
from tests.training.runs import losses, make_corpus, train
from tests.training.test_train_command import stop_at


@pytest.fixture
def refused(place, tmp_path, capsys):
    """Run, and see that it ends with one line of error that matches ``text``."""

    def check(text, run=None, lines=1, **options):
        run = run or tmp_path / "run"
        capsys.readouterr()
        assert train(place, run, **options) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        told = captured.err.splitlines()
        last = [number for number, line in enumerate(told) if line.startswith("save_every ")]
        rest = told[last[-1] + 1 if last else 0 :]
        assert len(rest) == lines, rest
        assert rest[-1].startswith("mlx_hiermem: error: ")
        assert re.search(text, rest[-1]), rest[-1]
        return rest[-1]

    return check


@pytest.fixture
def nothing_written(tmp_path):
    """After the test there is no run."""
    yield
    assert not (tmp_path / "run").exists()


@pytest.fixture
def stopped(place, tmp_path, monkeypatch):
    """A run that was stopped after step 3, and a function that gives all of its files."""
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train(place, tmp_path / "run") == 130

    def state():
        return files_of(tmp_path / "run" / "state")

    return state


# ---- before anything is done -----------------------------------------------------------


@pytest.mark.parametrize(
    "options, text",
    [
        ({"model": None}, "regime frozen: no anchor is given; give --model"),
        ({"model": None, "regime": "scratch"}, "scratch: no anchor is given; give --anchor"),
        ({"anchor": "160M"}, "--model and --anchor: give one of them"),
        ({"model": None, "anchor": "160M"}, "--anchor: regime frozen needs a trained anchor"),
        ({"regime": "scratch"}, "--model: regime scratch starts from random weights"),
        ({"regime": "cotrain", "subtree": 0}, "--subtree: .* with a frozen anchor only"),
        ({"regime": "sideways"}, "--regime: found 'sideways'; expected one of anchor, frozen"),
        ({"iters": 0}, "iters is 0: expected at least 1"),
        ({"iters": "many"}, "--iters: found 'many'; expected a whole number"),
        ({"save_every": 0}, "save_every is 0: expected at least 1"),
        ({"memory_budget": "much"}, "'much' is none; give one above 0"),
        ({"generic_probability": 2}, "generic_probability is 2.0: expected 0 to 1"),
        ({"resume": True}, "run: no run to resume there; start without --resume"),
        ({"data": "nowhere"}, "nowhere: no such folder; expected a corpus: make it with"),
        ({"model": "nowhere"}, "nowhere: no such folder; give a model folder"),
        ({"ranks": None}, "ranks: the corpus's tree has 2 levels, none are given; give one rank"),
        ({"ranks": "4,2,1"}, "ranks: the corpus's tree has 2 levels, given are 4,2,1; give one"),
        ({"ranks": "0,0"}, r"ranks is \[0, 0\]; at least one level needs a rank > 0"),
        ({"ranks": "4,-2"}, "ranks is .*expected a list of integers >= 0"),
        ({"memory_layers": "0,2"}, "names layer 2, but the anchor has 2 layers"),
        ({"subtree": 3}, "subtree 3: the tree's level-1 clusters are 0 to 2"),
        ({"subtree": -1}, "subtree -1: the tree's level-1 clusters are 0 to 2"),
        ({"freeze": "*nothing*"}, r"freeze '\*nothing\*': no parameter .* named like model\."),
        ({"regime": "cotrain"}, r"embeddings, which this run would change; give --freeze '\*embed"),
        ({"regime": "cotrain", "freeze": "*"}, r"freeze '\*': nothing of the anchor is left to"),
        ({"regime": "anchor", "freeze": "*"}, "nothing of the anchor is left to learn; freeze le"),
    ],
)
@pytest.mark.usefixtures("nothing_written")
def test_one_line_and_nothing_written(refused, options, text):
    refused(text, **options)


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "learning_rat: 1\n",
            "run.yaml.*learning_rat.* is no setting; did you mean learning_",
        ),
        ("iters: [1]\n", "run.yaml.*line 1.*iters.*expected a whole number"),
        ("iters: 1\niters: 2\n", "iters.* is set twice, first in line 1"),
        ("iters: {\n", "run.yaml"),
    ],
)
@pytest.mark.usefixtures("nothing_written")
def test_a_wrong_file_of_settings(refused, tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(text)
    refused(expected, config=tmp_path / "run.yaml", iters=None)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{", "anchor .*fresh.json: neither one of 160M, 410M, 1.4B nor a JSON file"),
        ("[]", "neither one of"),
        ('{"hidden_size": 16}', "neither one of|hidden_size|positive integer"),
        (None, r"neither one of .*\(.*No such file"),
    ],
)
@pytest.mark.usefixtures("nothing_written")
def test_a_wrong_file_of_an_anchor(refused, place, tmp_path, text, expected):
    path = tmp_path / "fresh.json"
    if text is not None:
        path.write_text(text)
    data = place / "corpus-bert"
    refused(expected, data=data, model=None, anchor=path, regime="scratch")


@pytest.mark.parametrize("change", [{"hidden_size": 0}, {"head_dim": -8}])
@pytest.mark.usefixtures("nothing_written")
def test_an_anchor_of_impossible_sizes(refused, place, tmp_path, change):
    path = tmp_path / "fresh.json"
    path.write_text(json.dumps(json.loads((place / "fresh.json").read_text()) | change))
    data, name = place / "corpus-bert", next(iter(change))
    refused(name, data=data, model=None, anchor=path, regime="scratch")


@pytest.mark.usefixtures("nothing_written")
def test_a_fresh_anchor_with_too_few_tokens(refused, place, tmp_path):
    path = tmp_path / "fresh.json"
    path.write_text(json.dumps(json.loads((place / "fresh.json").read_text()) | {"vocab_size": 40}))
    text = "its tokenizer has 257 tokens, the anchor 40; cluster the corpus with the anchor's own"
    refused(text, data=place / "corpus-bert", model=None, anchor=path, regime="scratch")


# ---- corpora ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, damage, text",
    [
        ("corpus.json", "{", "corpus.json: not valid JSON"),
        ("corpus.json", None, "corpus.json: no such file; the folder is not a corpus"),
        ("train/00000.tokens.npy", None, "00000.tokens.npy: no such file; copy it again"),
        ("train/00000.tokens.npy", "short", "00000.tokens.npy: not a .npy file"),
        ("train/00000.leaves.npy", "short", "00000.leaves.npy: not a .npy file"),
        ("routing/tree.safetensors", None, "tree.safetensors: no such file"),
        ("routing/tree.safetensors", "other", "tree.safetensors: altered: sha256 is"),
    ],
)
@pytest.mark.usefixtures("nothing_written")
def test_a_damaged_corpus(refused, place, tmp_path, name, damage, text):
    corpus = shutil.copytree(place / "corpus", tmp_path / "corpus")
    (corpus / name).unlink()
    if damage is not None:
        (corpus / name).write_text(damage)
    refused(text, data=corpus)


@pytest.mark.usefixtures("nothing_written")
def test_a_corpus_without_sequences(refused, place, tmp_path):
    corpus = shutil.copytree(place / "corpus", tmp_path / "corpus")
    table = json.loads((corpus / "corpus.json").read_text())
    split = table["splits"]["train"]
    split |= {"documents": 0, "tokens": 0, "sequences": 0, "shards": []}
    (corpus / "corpus.json").write_text(json.dumps(table))
    refused("corpus.json: documents of a split is '0'; expected an integer from 1", data=corpus)


@pytest.mark.usefixtures("nothing_written")
def test_a_corpus_of_another_tokenizer(refused, place, tmp_path):
    corpus = shutil.copytree(place / "corpus", tmp_path / "corpus")
    path = corpus / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|end|>"))
    refused("was made with another tokenizer than .* has; cluster the corpus with", data=corpus)


@pytest.mark.usefixtures("nothing_written")
def test_a_tree_of_another_anchor_s_embeddings(refused, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=1)
    shutil.rmtree(other / "memory")
    refused("its tree was grown with the token embeddings of another anchor", model=other)


@pytest.mark.usefixtures("nothing_written")
def test_a_subtree_without_sequences(refused, place, tmp_path):
    corpus = shutil.copytree(place / "corpus", tmp_path / "corpus")
    path = corpus / "train" / "00000.leaves.npy"
    leaves = np.load(path)
    np.save(path, np.where(leaves // 3 == 1, 0, leaves))
    refused("subtree 1: .* has no sequence of it", data=corpus, subtree=1)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"ranks": "4,3"}, r"memory: ranks is \(4, 2\), this run's \(4, 3\); give the same to go"),
        ({"memory_layers": "1"}, r"memory: layers is None, this run's \(1,\)"),
        ({"data": "corpus-bert"}, "memory: encoder is .*, or --fresh-memory to start another"),
        ({"data": "regrown"}, "memory: its tree is not the one that .* cluster the corpus with"),
    ],
)
@pytest.mark.usefixtures("nothing_written")
def test_a_bank_that_does_not_fit(refused, place, options, text):
    if "data" in options:
        options = {"data": place / options["data"]}
        if not options["data"].exists():
            make_corpus(place, "regrown", seed=1)
    refused(text, model=place / "model", **options)


@pytest.mark.usefixtures("nothing_written")
def test_a_damaged_bank(refused, place, tmp_path):
    model = shutil.copytree(place / "model", tmp_path / "model")
    next((model / "memory").glob("level-2-00001*")).unlink()
    refused("level-2-00001-of-00003.safetensors: no such file", model=model)


# ---- folders ---------------------------------------------------------------------------


def test_a_run_folder_that_is_a_file(refused, tmp_path):
    (tmp_path / "run").write_text("mine")
    refused("rank-0: cannot be written .Not a directory.; check whose folder it is")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_folder_that_cannot_be_written(refused, tmp_path, monkeypatch):
    """Another user's. It is simulated: who runs the tests may be root."""
    mkdir = os.mkdir

    def denied(path, *args, **options):
        if str(path).startswith(str(tmp_path / "run")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", denied)
    refused("rank-0: cannot be written .Permission denied.; check whose folder it is")


def test_a_checkpoint_folder_that_cannot_be_written(refused, stopped, tmp_path, monkeypatch):
    before = stopped()
    opened = os.open

    def denied(path, *args, **options):
        if str(path).endswith(".bin"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        refused("rows-1.bin: cannot be opened .Permission denied", resume=True)
    assert stopped() == before


def test_a_picture_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "run" / "curves.png").mkdir(parents=True)
    refused("curves.png: cannot be written .*; the checkpoint of step 0 is whole: go on from it wi")


def test_a_run_that_is_there_is_not_written_over(refused, stopped, place, tmp_path):
    before = stopped()
    refused("run: holds a run; add --resume to go on with it, or name another folder")
    assert stopped() == before
    assert train(place, tmp_path / "run", resume=True) == 0
    for options in ({}, {"resume": True}):
        refused("run: the run is finished, its result is .*model; name another folder", **options)
    assert (tmp_path / "run" / "model").is_dir()


# ---- another run -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, text",
    [
        ({"batch_size": 2}, "was started with batch_size 4, now it is 2; resume it as it was, or"),
        ({"seed": 7}, "was started with seed 0, now it is 7"),
        (
            {"regime": "cotrain", "freeze": "*embed*"},
            'with regime "frozen", now it is "cotrain"',
        ),
        ({"learning_rate": 0.1}, "learning_rate 0.01, now it is 0.1; .* add --accept-changes"),
        ({"ranks": "4,1"}, r"memory.ranks \[4, 2\], now it is \[4, 1\]"),
        ({"bank_dtype": "float32"}, 'memory.dtype "bfloat16", now it is "float32"'),
        ({"subtree": 1}, "was started with subtree null, now it is 1"),
        ({"model": "model"}, 'was started with bank null, now it is "[0-9a-f]+'),
    ],
)
def test_a_run_resumes_as_it_was(refused, stopped, place, options, text):
    before = stopped()
    if "model" in options:
        options = {"model": place / "model"}
    refused(text, resume=True, **options)
    assert stopped() == before


def test_a_run_does_not_resume_on_another_corpus(refused, stopped, place, tmp_path):
    before = stopped()
    other = make_corpus(place, "other", seed=1, tree=place / "model" / "memory")
    revisions = [
        json.loads((corpus / "corpus.json").read_text())["revision"]
        for corpus in (place / "corpus", other)
    ]
    line = refused("was started with corpus", resume=True, data=other)
    assert all(f'"{revision[:50]}' in line for revision in revisions)
    assert stopped() == before
    assert train(place, tmp_path / "run", resume=True) == 0


def test_a_run_does_not_resume_on_another_anchor(refused, place, tmp_path, monkeypatch):
    data = place / "corpus-bert"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train(place, tmp_path / "run", data=data) == 130
    other = make_tiny_model(tmp_path / "anchor", seed=1)  # of the same name
    shutil.rmtree(other / "memory")
    text = 'was started with anchor "[0-9a-f]+.*, now it is "'
    refused(text, resume=True, data=data, model=other)
    assert train(place, tmp_path / "run", resume=True, data=data) == 0


# ---- in the middle of it ---------------------------------------------------------------


def test_a_budget_that_is_too_small_says_what_is_needed(refused, place, tmp_path):
    text = r"budget of 5,000 bytes cannot hold .*, ([\d,]+) bytes; give --memory-budget more"
    line = refused(text, memory_budget=5000)
    assert line.endswith("; there is no checkpoint yet: start again")
    needed = int(re.search(text, line)[1].replace(",", ""))
    assert train(place, tmp_path / "run", memory_budget=needed, iters=1) == 0
    shutil.rmtree(tmp_path / "run")
    refused(f"cannot hold .* {needed:,} bytes", memory_budget=needed - 1)


def test_a_budget_that_turns_out_too_small(refused, place, tmp_path):
    """A later batch has more rows than the first: the run goes on with more."""
    options = {"batch_size": 2, "iters": 12, "save_every": 2}
    steps = tmp_path / "run" / "state" / "rank-0"
    line = refused("cannot hold", memory_budget=12 * 576 + 12 * 192, lines=1, **options)
    done = whole_steps(steps)[-1]
    assert f"the checkpoint of step {done} is whole: go on from it with the same command" in line
    assert line.endswith("and --resume") and done < 12
    options |= {"memory_budget": 24 * 576}
    assert train(place, tmp_path / "run", resume=True, **options) == 0
    assert train(place, tmp_path / "other", **options) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "other")


@pytest.mark.parametrize("regime", ["frozen", "cotrain", "anchor"])
def test_a_loss_that_is_no_number_keeps_a_good_checkpoint(refused, place, tmp_path, regime):
    options = {"regime": regime, "save_every": 1, "iters": 4, "warmup_steps": 0}
    if regime == "cotrain":
        options["freeze"] = "*embed*"
    line = refused("step 2: the loss is .*nan", learning_rate=1e30, **options)
    # The weights after step 1 are useless already: their checkpoint was never written.
    assert whole_steps(tmp_path / "run" / "state" / "rank-0") == [0]
    assert "lower learning_rate (1e+30) or clip (1); the checkpoint of step 0 is whole: go" in line
    assert line.endswith("with the same command and the lower value, --resume and --accept-changes")
    refused("add --accept-changes", learning_rate=1e-3, resume=True, **options)
    options["learning_rate"] = 1e-3
    assert train(place, tmp_path / "run", resume=True, accept_changes=True, **options) == 0
    assert train(place, tmp_path / "other", **options) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "other")


def test_a_validation_that_is_no_number_stops_too(refused, place, tmp_path):
    options = {"save_every": 2, "iters": 2, "val_batches": 1, "learning_rate": 1e30}
    refused("step [12]: the (validation )?loss.* is nan", lines=2, **options)
    assert not (tmp_path / "run" / "model").exists()
    assert whole_steps(tmp_path / "run" / "state" / "rank-0") == [0]


@contextmanager
def files_end_at(limit):
    """What a full disk does, for files larger than ``limit`` bytes; anybody may set that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_in_mid_checkpoint(refused, place, tmp_path):
    """Four rows of level 1 fit; the second checkpoint needs records of its own for them."""
    options = {"ranks": "64,8", "batch_size": 16}
    record = 3 * 4 * 64 * 16 * 3 * 2
    with files_end_at(5 * record):
        line = refused(r"00000006: the checkpoint cannot be written \(.*rows-1.bin", **options)
    assert "File too large" in line
    assert whole_steps(tmp_path / "run" / "state" / "rank-0") == [3]
    how = "the checkpoint of step 3 is whole: go on from it with the same command and --resume"
    assert line.endswith(f"check the folder and free space; {how}")
    assert train(place, tmp_path / "run", resume=True, **options) == 0
    assert train(place, tmp_path / "other", **options) == 0
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "other" / "model")
    assert losses(tmp_path / "run") == losses(tmp_path / "other")


@pytest.mark.parametrize("write", ["save_model", "write_memory", "_copy_routing"])
def test_a_disk_that_is_full_when_the_model_is_written(
    refused, place, tmp_path, monkeypatch, write
):
    options = {"regime": "cotrain", "freeze": "*embed*"}
    real = getattr(results, write)

    def full(*args):
        with files_end_at(100):
            return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(results, write, full)
        line = refused("cannot be written .*; check the folder and free space; the ch", **options)
    assert line.endswith("of step 6 is whole: go on from it with the same command and --resume")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "curves.png", "log.jsonl", "state",
    ]  # fmt: skip
    assert train(place, tmp_path / "run", resume=True, **options) == 0
