"""``bank inspect``: the table, where use counts come from, and both pictures of the tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlx_hiermem import MemoryBank, cli, load
from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.commands.bank.inspect import show_bytes
from mlx_hiermem.corpus.folder import CorpusInfo, file_sha256, folder_sha256
from mlx_hiermem.evaluation.facts import Question, write_questions
from tests.corpus.splits import LENGTH, WINDOW, make_part, many, place, read, write
from tests.tiny import make_tiny_model, random_texts

TEXTS = random_texts(40, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model of 3 and 9 clusters, with 40 questions."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    (folder / "evaluation").mkdir()
    questions = [Question(text, " 72.", "72", "x", 1, 0, [0]) for text in TEXTS]
    write_questions(folder / "evaluation" / "facts.jsonl.gz", questions, ["all"])
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """The same texts as documents."""
    path = tmp_path_factory.mktemp("text") / "some.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def corpus(model, tmp_path_factory) -> Path:
    """A corpus of the model's tree; its sequences are under random leaves."""
    folder = tmp_path_factory.mktemp("corpora") / "corpus"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "routing").mkdir()
    tree = shutil.copy(model / "memory" / "tree.safetensors", folder / "routing")
    work = folder.parent
    splits = {
        name: write(folder / name, place(work, [make_part(many(count))], 9))
        for name, count in (("train", 120), ("validation", 9))
    }
    tokenizer = {
        "sha256": folder_sha256(folder / "tokenizer"),
        "vocab_size": 1000,
        "end_of_text": 0,
    }
    CorpusInfo(
        tokenizer=tokenizer, sequence_length=LENGTH, window=WINDOW, seed=0, views=(), branching=3,
        levels=2, encoder={"type": "bert"}, tree_sha256=file_sha256(Path(tree)),
        source={"files": [], "fingerprint": "f"}, splits=splits,
    ).save(folder)  # fmt: skip
    return folder


@pytest.fixture
def inspect(model, capsys):
    """``bank inspect``: what it prints; with ``--json`` the object."""

    def command(*arguments, model: Path = model):
        given = [str(argument) for argument in arguments]
        assert cli.main(["bank", "inspect", "--model", str(model), *given]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return json.loads(captured.out) if "--json" in given else captured.out

    return command


@pytest.fixture
def refused(model, capsys):
    """``bank inspect`` with something wrong: its one line."""

    def command(*arguments, model: Path = model) -> str:
        given = map(str, arguments)
        assert cli.main(["bank", "inspect", "--model", str(model), *given]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    return command


# ---- the table -------------------------------------------------------------------------


def test_json_is_what_the_bank_says(inspect, model):
    with MemoryBank.open(model / "memory") as bank:
        assert inspect("--json") == bank.inspect()


def test_table(inspect, model):
    lines = inspect().splitlines()
    assert lines[0].startswith(f"{model / 'memory'}: ffn memories, branching 3, revision ")
    assert lines[1] == (
        "2,880 numbers, 576 in one fetched memory; 12 kB against 2.3 kB, 5.0 times as much"
    )
    assert lines[2].split() == (
        "level clusters rank numbers dtype block level bytes shards tier blocked why".split()
    )
    assert (
        lines[3].split() == "1 3 4 384 float32 1.5 kB 4.6 kB 1 resident 0 level 1 is small".split()
    )
    assert lines[4].split()[:12] == "2 9 2 192 float32 768 B 6.9 kB 3 disk 0".split()
    assert lines[4].endswith("no budget: the page cache serves it")
    assert lines[5] == "4.6 kB of at most 4.6 kB held"
    assert len(lines) == 6


def test_a_budget_shows_what_was_chosen_and_why(inspect):
    lines = inspect("--memory-budget", "6kB").splitlines()
    assert "resident" in lines[3] and lines[3].endswith("fits in the budget")
    assert "cached" in lines[4] and lines[4].endswith("does not fit in the budget as a whole")
    assert lines[5] == "4.6 kB of at most 6.0 kB held"
    by_hand = inspect("--tier", "1=disk").splitlines()
    assert "disk" in by_hand[3] and by_hand[3].endswith("chosen by hand")


def test_a_level_of_rank_0_and_a_part(tmp_path, make, inspect):
    make.bank(tmp_path / "memory", make.config((2, 0, 1), 2))
    bank = ["--bank", tmp_path / "memory"]
    lines = inspect(*bank).splitlines()
    assert "none" in lines[4] and lines[4].split()[:4] == ["2", "4", "0", "0"]
    part = inspect(*bank, "--levels", "1").splitlines()
    assert "present" in part[2] and "absent" in part[5]
    assert ["384", "B", "0", "B"] == part[5].split()[7:11]
    half = inspect(*bank, "--subtrees", "1").splitlines()
    assert ["384", "B", "192", "B"] == half[5].split()[7:11]


def test_a_level_in_another_folder(model, tmp_path, inspect):
    moved, other = shutil.copytree(model, tmp_path / "model"), tmp_path / "disk"
    other.mkdir()
    for path in (moved / "memory").glob("level-2-*"):
        path.rename(other / path.name)
    lines = inspect("--level-folder", f"2={other}", model=moved).splitlines()
    assert f"level 2 lies in {other}" in lines


def test_a_quantised_bank_names_its_bits(tmp_path, make, inspect):
    packing = {"mode": "affine", "bits": 4, "group_size": 32}
    config = make.config((2, 1), hidden=32, quantization=packing)
    from mlx_hiermem.bank.writer import write_bank

    rows = {
        level: np.zeros((config.clusters(level), config.stored_size(level)), np.uint8)
        for level in (1, 2)
    }
    generic = np.zeros(sum(map(config.stored_size, (1, 2))), np.uint8)
    write_bank(tmp_path, config, rows, generic)
    assert "4-bit affine/32" in inspect("--bank", tmp_path)


def test_blocked_blocks_are_named_and_drawn(model, corpus, tmp_path, inspect, monkeypatch):
    copy = shutil.copytree(model, tmp_path / "model")
    with BankEdit(copy / "memory") as edit:
        edit.set_blocked([(2, 3), (1, 0), (2, 8)])
    lines = inspect("--corpus", corpus, "--tree", model=copy).splitlines()
    assert [line.split()[11] for line in lines[3:5]] == ["1", "2"]
    assert lines[6] == "blocked (level:cluster): 1:0, 2:3, 2:8"
    start = lines[9].find("its ")
    assert [line[0] for line in lines[10:13]] == ["×", " ", " "]
    strips = [line[start:] for line in lines[10:13]]
    assert [strip.find("×") for strip in strips] == [-1, 0, 2]
    monkeypatch.setattr("mlx_hiermem.commands.bank.inspect._NAMED", 2)
    assert inspect(model=copy).splitlines()[-1].endswith(": 1:0, 2:3 and 1 more")


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9_949, "9.9 kB"), (9_950, "10 kB"),
        (999_499, "999 kB"), (999_500, "1.0 MB"), (35_651_584, "36 MB"), (9_206_000_000, "9.2 GB"),
        (2**62, "4.6 EB"), (10**22, "10000 EB"),
    ],
)  # fmt: skip
def test_bytes_for_people(count, text):
    assert show_bytes(count) == text


# ---- counts ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed(model):
    """Uses of TEXTS by ``MemoryLM.route``, one at a time."""
    lm = load(model)
    counts: dict[str, Counter] = {"1": Counter(), "2": Counter()}
    for text in TEXTS:
        for level, cluster in enumerate(lm.route(text).ids, 1):
            counts[str(level)][str(cluster)] += 1
    return {level: dict(count) for level, count in counts.items()}


def test_documents_and_questions_are_routed(inspect, model, text, routed, monkeypatch):
    monkeypatch.setattr("mlx_hiermem.commands.bank.uses._BATCH", 7)
    documents = inspect("--json", "--text", text)
    assert documents.pop("uses") == {
        "what": "documents", "source": str(text), "total": 40, "levels": routed,
    }  # fmt: skip
    questions = inspect("--json", "--questions")
    file = str(model / "evaluation" / "facts.jsonl.gz")
    assert questions.pop("uses") == {
        "what": "questions", "source": file, "total": 40, "levels": routed,
    }  # fmt: skip
    assert questions == documents == inspect("--json")


def test_a_corpus_gives_the_leaves_of_its_training_sequences(inspect, corpus):
    found = inspect("--json", "--corpus", corpus)["uses"]
    _, leaves = read(corpus / "train", CorpusInfo.load(corpus).splits["train"])
    assert found["levels"]["2"] == {str(k): v for k, v in Counter(leaves.tolist()).items()}
    assert found["levels"]["1"] == {str(k): v for k, v in Counter((leaves // 3).tolist()).items()}
    assert found["total"] == len(leaves) and found["what"] == "training sequences"


def test_the_table_says_how_many_clusters_are_used(inspect, text, routed):
    lines = inspect("--text", text).splitlines()
    column = lines[2].split().index("used") + 1  # "768 B" and "6.9 kB" are two words each
    for level in (1, 2):
        assert lines[2 + level].split()[column] == str(len(routed[str(level)]))
    assert lines[-1] == f"used: by 40 documents of {text}"


# ---- text ------------------------------------------------------------------------------


def test_tree_is_plain_ascii_where_the_terminal_is(model, corpus):
    result = subprocess.run(
        [sys.executable, "-m", "mlx_hiermem", "bank", "inspect", "--tree",
         "--corpus", str(corpus), "--model", str(model)],
        capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    lines = result.stdout.decode("ascii").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(" level 1"))
    assert all("#" in line for line in lines[start + 1 : start + 4])


# ---- PNG -------------------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def test_png_shows_the_counts(inspect, model, text, corpus, tmp_path):
    by_text, again, by_corpus = (tmp_path / f"{name}.png" for name in "abc")
    out = inspect("--text", text, "--tree", "--picture", by_text)
    assert out.splitlines()[-1] == f"picture: {by_text}" and " level 1  uses" in out
    inspect("--questions", "--picture", again)
    inspect("--corpus", corpus, "--picture", by_corpus)
    first, second, other = map(pixels, (by_text, again, by_corpus))
    assert first.shape == second.shape == other.shape == (555, 1650, 4)  # 11 by 3.7 inches
    # Only the words of the title differ between the same counts from two sources.
    assert (first[100:] == second[100:]).all() and not (first[100:] == other[100:]).all()
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png", "c.png"}


# ---- bad input -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--tree"], ["--picture", "a.png"], ["--tree", "--json"]])
def test_a_picture_without_counts(refused, options):
    assert "--text FILE, --corpus FOLDER or --questions" in refused(*options)


@pytest.mark.parametrize(
    "name, says",
    [
        ("a.jpg", "ends in .png"),
        ("png", "ends in .png"),
        ("nowhere/a.png", "there is no folder"),
        ("folder.png", "is a folder"),
        ("file/a.png", "there is no folder"),
    ],
)
def test_a_picture_that_cannot_go_there(refused, tmp_path, name, says):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    assert says in refused("--questions", "--picture", tmp_path / name)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(refused, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "a.png").write_text("old")
    monkeypatch.setattr(os, "replace", full)
    line = refused("--questions", "--picture", tmp_path / "a.png")
    assert "cannot be written (No space left on device)" in line
    assert (tmp_path / "a.png").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_sources_exclude_each_other(model, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["bank", "inspect", "--model", str(model), "--questions", "--text", "a.txt"])
    assert left.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_sources_that_are_not_there(refused, model, tmp_path):
    assert "no such file" in refused("--text", tmp_path / "none.jsonl").lower()
    assert "corpus.json" in refused("--corpus", tmp_path)
    (tmp_path / "empty.txt").touch()
    assert "the file is empty" in refused("--text", tmp_path / "empty.txt")
    assert "expected .jsonl" in refused("--text", tmp_path / "a.csv")
    bare = make_tiny_model(tmp_path / "bare")
    assert "facts.jsonl.gz: no such file" in refused("--questions", model=bare)


def test_a_corpus_of_another_tree(refused, corpus, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=1)
    assert "was made with another tree" in refused("--corpus", corpus, model=other)
    wider = make_tiny_model(tmp_path / "wider", branching=2)
    assert "has branching 3 and 2 levels" in refused("--corpus", corpus, model=wider)


def test_a_corpus_with_a_damaged_shard(refused, corpus, tmp_path):
    damaged = shutil.copytree(corpus, tmp_path / "corpus")
    path = next((damaged / "train").glob("*.leaves.npy"))
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in refused("--corpus", damaged)
