"""Mistakes that a newcomer makes in the first hour, each by the command that they would type.

Each ends with exit code 2 and one line that says what is wrong, where, what was expected and how to
go on; nothing is written. The table is meant to be read.
"""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_hiermem import cli, models
from tests.docs.pages import REPOSITORY
from tests.test_bad_input import listing
from tests.tiny import make_tiny_model, random_texts

ASK = "--prompt 'gold is' --max-tokens 2"
SMALL = "--encoder embeddings --branching 2 --levels 1 --sequence-length 64"
FROZEN = "--regime frozen --ranks 4 --iters 1 --val-batches 0"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """What a newcomer may have after an hour."""
    folder = tmp_path_factory.mktemp("hour")
    make_tiny_model(folder / "my-model")
    shutil.copytree(folder / "my-model", folder / "anchor", ignore=shutil.ignore_patterns("memory"))
    (folder / "my-texts").mkdir()
    (folder / "my-texts" / "some.txt").write_text("\n\n".join(random_texts(12)))
    for name in ("empty", "markdown"):
        (folder / name).mkdir()
    (folder / "empty" / ".DS_Store").write_text("x")
    (folder / "markdown" / "a.md").write_text("# A note")
    (folder / "empty.txt").touch()
    (folder / "wrong-field.jsonl").write_text('{"txt": "a note"}\n')
    (folder / "some.parquet").write_bytes(b"PAR1")
    (folder / "epoch_9.pt").write_bytes(b"no archive")
    (folder / "run.yaml").write_text("data: corpus\nlearning_rat: 0.1\n")
    here = [word.format(folder=folder) for word in f"--data {folder}/my-texts {SMALL}".split()]
    model = ["--model", f"{folder}/my-model"]
    assert cli.main(["cluster", *here, *model, "--out", f"{folder}/corpus"]) == 0
    data = ["--data", f"{folder}/corpus", "--model", f"{folder}/anchor"]
    assert cli.main(["train", *data, *FROZEN.split(), "--run", f"{folder}/run"]) == 0
    return folder


@pytest.fixture
def hour(original, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is the folder we are in; nothing may change in it."""
    folder = shutil.copytree(original, tmp_path / "hour")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder; a corpus that was begun keeps its settings, to go on from them."""
    return {name: at for name, at in listing(folder).items() if not re.match(r"\.$|new\b", name)}


def say(command: str, capsys, code: int = 2) -> str:
    """What a command that fails says last."""
    try:
        found = cli.main(shlex.split(command))
    except SystemExit as left:  # argparse shows the usage before
        found = left.code
    captured = capsys.readouterr()
    assert found == code, captured
    assert "Traceback" not in captured.err and "fault of ours" not in captured.err
    line = captured.err.splitlines()[-1]
    assert re.match(r"mlx_hiermem[ \w]*: error: \S", line), captured.err
    return line


#: What is typed, and what the line has to say: what and where; how to go on.
MISTAKES = {
    # ---- which model ----
    "a wrong path": (
        f"generate --model my-modle {ASK}",
        r"my-modle: no such folder; give a model folder, .*; did you mean my-model\?",
    ),
    "a wrong path elsewhere": (
        f"generate --model nowhere/at/all {ASK}",
        r"nowhere/at/all: no such folder; give a model folder, one of the shipped models \(atlas\)",
    ),
    "a shipped model's name in capitals": (
        f"generate --model Atlas {ASK}", r"Atlas: no such folder; .*did you mean atlas\?",
    ),
    "a prompt in its place": (
        f"generate --model '{'gold is ' * 60}' {ASK}",
        r"gold is : no such folder; give a model folder, one of the shipped models",
    ),
    "a Hub name without a network": (
        f"generate --model someone/something {ASK}",
        r"someone/something: no such folder, and the Hub .*; unset it, or give a repository",
    ),
    "a model without a bank": (
        f"generate --model anchor {ASK}",
        r"anchor/memory: no such folder; expected a memory bank; .*with `mlx_hiermem init`",
    ),
    "the memory folder": (
        f"generate --model my-model/memory {ASK}",
        r"my-model/memory is a memory folder; give the model folder that it is in, my-model$",
    ),
    "the run in place of its model": (
        f"generate --model run {ASK}",
        r"run is the folder of a training run; give its model, run/model$",
    ),
    "the corpus in place of a model": (
        f"generate --model corpus {ASK}",
        r"corpus is a corpus; train a model on it with `mlx_hiermem train --data corpus`$",
    ),
    "a checkpoint of PyTorch": (
        f"generate --model epoch_9.pt {ASK}",
        r"epoch_9\.pt: is a file; .*`mlx_hiermem convert --model epoch_9\.pt --mlx-path FOLDER`$",
    ),
    "a file of the model": (
        f"generate --model my-model/model.safetensors {ASK}",
        r"model\.safetensors: is a file; .*give the folder that it is in, my-model$",
    ),
    "a checkpoint that is none": (
        "convert --model epoch_9.pt --mlx-path converted",
        r"epoch_9\.pt: refused: it is not a file of torch\.save; save it again with torch\.save",
    ),
    # ---- what is typed ----
    "nothing": ("", r"no subcommand is given; --help tells of generate, chat, demo"),
    "a subcommand misspelt": ("gnerate", r"invalid choice: 'gnerate' \(choose from '?generate"),
    "bank alone": ("bank", r"no action is given; --help tells of inspect, verify"),
    "an option misspelt": (
        f"generate --model my-model {ASK} --memroy none",
        r"unrecognized arguments: --memroy none; did you mean --memory\? `mlx_hiermem generate "
        r"--help` lists",
    ),
    "an option of an action misspelt": (
        "bank add --model my-model --corpus my-texts --name n --rot=2",
        r"unrecognized arguments: --rot=2; did you mean --roots\?",
    ),
    "a memory misspelt": (
        f"generate --model my-model {ASK} --memory fetchd",
        r"argument --memory: invalid choice: 'fetchd' \(choose from '?fetched",
    ),
    "no prompt": ("generate --model my-model", r"arguments are required: --prompt/-p"),
    "an empty prompt": (
        "generate --model my-model --prompt ''", r"--prompt: it is empty; give it at least one",
    ),
    "a prompt longer than the context": (
        f"generate --model my-model --prompt {'a' * 300}",
        r"prompt has 300 tokens, but the context of this model ends at 256.*; shorten the prompt",
    ),
    "a path outside the tree": (
        f"generate --model my-model {ASK} --path 7,21",
        r"cluster '7' of level 1 does not exist; its clusters are 0 to 2",
    ),
    "a path of too many levels": (
        f"generate --model my-model {ASK} --path 0,1,2", r"has 3 ids, expected 2, one per level",
    ),
    "a budget without a unit that is known": (
        f"generate --model my-model {ASK} --memory-budget 2gigs",
        r"a number of bytes: '2gigs' is none; give one above 0 such as 500MB, 2GB",
    ),
    "a budget that holds nothing": (
        f"generate --model my-model {ASK} --memory-budget 2B",
        r"memory budget: 2 bytes cannot hold one block .*; give at least \d+",
    ),
    # ---- one's own texts ----
    "notes in an empty folder": (
        "bank add --model my-model --corpus empty --name notes",
        r"empty: the folder is empty; expected documents in \.txt",
    ),
    "notes in an empty file": (
        "bank add --model my-model --corpus empty.txt --name notes",
        r"empty\.txt: the file is empty; leave it out, or fill it with documents",
    ),
    "notes in Markdown": (
        "bank add --model my-model --corpus markdown --name notes",
        r"markdown: the folder holds no file that can be read, only \.md; save text as \.txt",
    ),
    "notes that are not there": (
        f"cluster --data notes --model my-model {SMALL} --out new",
        r"notes: no such file, folder or pattern; give documents in \.txt",
    ),
    "another field": (
        f"cluster --data wrong-field.jsonl --model my-model {SMALL} --out new",
        r"wrong-field\.jsonl: line 1: .*\"text\"; name another field with --text-field",
    ),
    "too few notes for the tree": (
        "cluster --data my-texts --model my-model --encoder embeddings --sequence-length 64 "
        "--out new",
        r"12 windows .*fewer than the 65536 clusters .*; give more documents, or .*--branching",
    ),
    "the paper's encoder without a network": (
        "cluster --data my-texts --model my-model --out new",
        r"all-MiniLM-L6-v2 cannot be fetched .*; check the network, .*--encoder embeddings",
    ),
    "a name with capitals": (
        "bank add --model my-model --corpus my-texts --name Notes",
        r"name is 'Notes'; expected 1 to 32 of a-z, 0-9 and -",
    ),
    # ---- training ----
    "training without a corpus": (
        "train --model anchor --run new",
        r"--data is missing \(corpus folder, as cluster wrote it\); give it as a flag",
    ),
    "training on texts": (
        "train --model anchor --data my-texts --run new",
        r"my-texts/corpus\.json: no such file; the folder is not a corpus.*`mlx_hiermem cluster",
    ),
    "training on a corpus that is not there": (
        "train --model anchor --data corpora --run new",
        r"corpora: no such folder; expected a corpus: make it with `mlx_hiermem cluster --data",
    ),
    "a corpus of another anchor": (
        f"train --model atlas --data corpus {FROZEN} --run new",
        r"corpus: was made with another tokenizer than .*; cluster the corpus with --model of this",
    ),
    "training without an anchor": (
        "train --data corpus --run new", r"no anchor is given; give --model",
    ),
    "the same run again": (
        f"train --model anchor --data corpus {FROZEN} --run run",
        r"--run run: the run is finished, its result is run/model; name another folder",
    ),
    "a setting misspelt in a file": (
        "train -c run.yaml --model anchor --run new",
        r"run\.yaml, line 2: 'learning_rat' is no setting; did you mean learning_rate\?",
    ),
    "merging a run of everything": (
        "merge run --model anchor --mlx-path new",
        r"run: the run trained a whole model, run/model, which needs no merging; .*--subtree",
    ),
    # ---- changing a bank ----
    "a fresh bank for a model that has one": (
        "init --model my-model --config 4,2 --mlx-path new",
        r"has a memory bank already; go on from it with `mlx_hiermem train .*--fresh-memory",
    ),
    "writing to a folder that is there": (
        "convert --model anchor --mlx-path my-model",
        r"my-model: exists already; remove it, or give another folder",
    ),
    "removing in a script": (
        "bank remove --model my-model --block 2:4",
        r"nothing was removed: .* would be gone for good, .*; give --yes",
    ),
    # ---- measuring ----
    "a perplexity of nothing": (
        "evaluate --model my-model --task perplexity",
        r"no documents are given; name them with --text FILE",
    ),
    "questions that a model does not have": (
        "evaluate --model my-model --task facts",
        r"facts\.jsonl\.gz: no such file; expected .*; `evaluate --task perplexity --text FILE`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_each_line_says_how_to_go_on(name, hour, capsys):
    command, says = MISTAKES[name]
    before = written(hour)
    line = say(command, capsys)
    assert re.search(says, line), line
    assert len(line) < 600
    assert written(hour) == before


def test_a_name_that_is_taken(hour, capsys):
    add = "bank add --model my-model --corpus my-texts --name notes --iters 1 --roots 1"
    assert cli.main(add.split()) == 0
    capsys.readouterr()
    line = say(add, capsys)
    assert re.search(
        r"has an added memory notes already; give another --name, or remove that one first "
        r"\(mlx_hiermem bank remove --name notes\)",
        line,
    )


@pytest.mark.parametrize(
    "command",
    ["add --corpus my-texts --name notes", "block 1:0", "unblock 1:0", "remove --block 1:0 --yes",
     "names --text my-texts/some.txt", "checksums"],
    ids=lambda command: command.split()[0],
)  # fmt: skip
def test_changing_the_model_that_ships(command, hour, capsys, monkeypatch):
    monkeypatch.setattr(models, "_ASSETS", hour / "assets")  # so that a failure changes no package
    shipped = shutil.copytree("my-model", hour / "assets" / "atlas")
    before = listing(shipped)
    line = say(f"bank {command} --model atlas", capsys)
    assert re.search(
        r"atlas: ships with the package and is not changed; copy it first "
        rf"\(cp -r {shipped} my-model\), and give --model my-model$",
        line,
    )
    assert listing(shipped) == before


def test_quantising_twice(hour, capsys):
    assert cli.main("bank quantize --model atlas --mlx-path once --q-bits 8".split()) == 0
    capsys.readouterr()
    line = say("bank quantize --model once --mlx-path twice --q-bits 4", capsys)
    assert re.search(r"once/memory: is quantised already .*; quantise the bank that it was", line)
    assert not (hour / "twice").exists()


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_port_that_is_taken(command, hour, port, capsys):
    line = say(f"{command} --model my-model --port {port}", capsys)
    assert re.search(rf"port {port}: cannot be listened on .*; give another --port \(0 takes", line)


@pytest.mark.parametrize(
    "missing, extra, command",
    [
        ("pyarrow", "parquet", f"cluster --data some.parquet --model my-model {SMALL} --out new"),
        ("datasets", "datasets", f"cluster --dataset a/b --model my-model {SMALL} --out new"),
        ("ray", "ray", f"cluster --data my-texts --runner ray --model my-model {SMALL} --out new"),
        ("lm_eval", "eval", "evaluate --model my-model --task lm-eval --tasks arc_easy"),
        ("torch", "convert", "convert --model anchor --verify --mlx-path new"),
    ],
    ids=lambda value: value.split()[0],
)
def test_an_extra_that_is_missing(missing, extra, command, hour, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert f"pip install 'mlx-hiermem[{extra}]'" in say(command, capsys)


def test_a_python_that_is_too_old(tmp_path):
    """``make`` says so before it makes anything."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$2" in *version_info*) exit 1;; esac\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "PYTHON=./python3.9", "demo"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "./python3.9 is older than Python 3.10; try: make PYTHON=python3.12" in done.stdout
    assert not (tmp_path / ".venv").exists()
