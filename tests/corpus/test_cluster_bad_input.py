"""What ``cluster`` refuses: one line that says what, where and what to do; exit code 2."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_hiermem import cli
from mlx_hiermem.corpus.folder import Corpus
from tests.corpus.corpora import files_of, make_documents, make_tiny_bert, write_jsonl
from tests.tiny import make_tiny_model, write_tiny_anchor

SMALL = ["--branching", "3", "--levels", "2", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("place")
    make_tiny_model(place / "model")
    make_tiny_bert(place / "bert")
    make_tiny_bert(place / "other_bert", seed=1)
    shutil.copytree(place / "model", place / "other_model")
    write_tiny_anchor(place / "other_model", seed=5)
    write_jsonl(place / "some.jsonl", make_documents(60))
    arguments = command(place, place / "made", "--encoder", "embeddings")
    assert cli.main(arguments) == 0
    bert = command(place, place / "made_bert", "--encoder", str(place / "bert"))
    assert cli.main([*bert, "--encoder-max-length", "32"]) == 0
    return place


def command(place: Path, out: Path, *more: str) -> list[str]:
    found = ["cluster", "--out", str(out), "--model", str(place / "model"), *SMALL, *more]
    return found if "--data" in more or "--dataset" in more else [
        *found, "--data", str(place / "some.jsonl"),
    ]  # fmt: skip


@pytest.fixture
def refused(place, tmp_path, capsys) -> Callable[..., str]:
    """Runs a command that has to fail, and returns the line that it prints."""

    def run(*more: str, out: Path = tmp_path / "out", remains: bool = False) -> str:
        before = files_of(out) if out.exists() else None
        assert cli.main(command(place, out, *more)) == 2
        captured = capsys.readouterr()
        line = captured.err.splitlines()[-1]
        assert captured.out == "" and "Traceback" not in captured.err
        assert re.fullmatch(r"mlx_hiermem: error: [^\n]+", line), line
        assert "fault of ours" not in line
        if not remains:
            assert (files_of(out) if out.exists() else None) == before
        assert not (out / "corpus.json").exists() or before
        return line

    return run


def source(tmp_path: Path, name: str, data: bytes) -> list[str]:
    (tmp_path / name).write_bytes(data)
    return ["--encoder", "embeddings", "--data", str(tmp_path / name)]


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", bytes(range(256)) * 9, "a.txt: line 1: not UTF-8 text"),
        ("a.jsonl", b"\x00\x01\x02" * 99, "a.jsonl: line 1: not UTF-8 text"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: line 1: damaged gzip file"),
        ("a.parquet", b"PAR1 not", "a.parquet: not a readable Parquet file"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text":', "a.jsonl: line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', 'line 2: expected an object with a "text"'),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n{"text": " "}', "holds no document with text"),
        ("a.txt", b" \n\n \t\n", "holds no document with text"),
        ("a.txt", b"one\n\ntwo\n\nthree", "has 3 windows of text to train on, fewer than the 9 cl"),
        ("a.csv", b"text", "the name ends in '.csv'; files that can be read are .txt, .jsonl"),
    ],
)  # fmt: skip
def test_documents_that_cannot_be_used(refused, tmp_path, name, data, says):
    # What came before too few windows was done is kept: fewer clusters are all that is needed.
    line = refused(*source(tmp_path, name, data), remains="fewer" in says)
    assert says in line


@pytest.mark.parametrize("encoder", ["embeddings", "bert"])
def test_a_late_line_of_a_large_file_is_named_and_what_is_done_is_kept(
    refused, place, tmp_path, encoder
):
    documents = make_documents(200)
    documents[150]["text"] = 7
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    name = "embeddings" if encoder == "embeddings" else str(place / "bert")
    more = ["--encoder", name, "--data", str(path), "--unit-size", "3000"]
    more += ["--encoder-max-length", "32"] * (encoder == "bert")
    line = refused(*more, remains=True)
    assert f"{path}: line 151: " in line
    if encoder == "bert":  # the other has to be fitted to all of it first
        assert list((tmp_path / "out").glob("work/parts/*-*.json"))


def test_empty_documents_among_others_are_counted_and_left_out(place, tmp_path, capsys):
    documents = [*make_documents(60), {"text": ""}, {"text": None}, {"text": "\n"}]
    more = ["--data", str(write_jsonl(tmp_path / "a.jsonl", documents)), "--encoder", "embeddings"]
    assert cli.main(command(place, tmp_path / "c", *more)) == 0
    out = capsys.readouterr().out
    assert "60 documents, " in out and "3 documents had no token and are left out" in out


@pytest.mark.parametrize(
    "more, says",
    [
        (["--tree", "{place}/made/routing", "--encoder", "{place}/bert"], "was grown with the enc"),
        (["--tree", "{place}/made_bert/routing", "--encoder", "embeddings"], "was grown with the"),
        (["--tree", "{place}/made_bert/routing", "--encoder", "{place}/other_bert",
          "--encoder-max-length", "32"], "was grown with the encoder bert ("),
        (["--tree", "{place}/made_bert/routing", "--encoder", "{place}/bert",
          "--encoder-max-length", "9"], "was grown with"),
        (["--tree", "{place}/made_bert/routing", "--encoder-max-length", "9"], "grown with 32"),
        (["--tree", "{place}/model/memory", "--branching", "2"], "--branching is 2, but the"),
        (["--tree", "{place}/nothing"], "tree.safetensors: no such file"),
        (["--encoder", "{place}/model"], "config.json: model_type is 'openlm'"),
        (["--encoder", "{place}/nothing"], "neither a folder nor the name of a Hub repo"),
        (["--encoder", "{place}/bert", "--encoder-max-length", "65"], "takes 3 to 64 tokens"),
        (["--views", "text,fields"], "--views: 'fields' is none; known are text, prefix, first"),
        (["--views", "field:nothing", "--encoder", "embeddings"], "some.jsonl: line 1: none of"),
        (["--window", "48"], "--window is 48; expected a multiple of --sequence-length 32"),
        (["--validation", "1"], "--validation is 1.0; expected 0 up to, not with, 1"),
        (["--tree-samples", "8"], "--tree-samples is 8, fewer than the 9 clusters"),
        (["--levels", "40"], "clusters are too many to grow"),
        (["--workers", "2"], "--workers and --worker-gpus are for --runner ray"),
        (["--tokenizer", "{place}/model"], "--model and --tokenizer: both are given"),
        (["--dataset", "some/set", "--data", "x.txt"], "--data and --dataset: both are given"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(refused, place, more, says):
    line = refused(*(text.format(place=place) for text in more))
    assert says in line


def test_a_tree_of_another_anchors_embeddings(refused, place, tmp_path):
    for tree in (place / "made" / "routing", place / "model" / "memory"):
        more = ["--tree", str(tree), "--model", str(place / "other_model")]
        assert "token embeddings of another anchor" in refused(*more)


def test_fields_of_plain_texts(refused, tmp_path):
    more = source(tmp_path, "a.txt", b"one")
    assert "documents in .txt have no fields" in refused(*more, "--views", "field:q")


def test_no_training_documents_are_left(refused, place):
    tree = ["--tree", str(place / "made" / "routing"), "--validation", "0.999999"]
    assert "leaves no document to train on" in refused(*tree, remains=True)


def test_a_folder_that_is_taken(refused, place, tmp_path):
    assert "is a corpus already" in refused("--encoder", "embeddings", out=place / "made")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for name in ("work", "tokenizer"):  # of somebody else, for all we know
        (tmp_path / "mine" / name).mkdir()
        (tmp_path / "mine" / name / "lock").write_text("mine")
    assert "holds other files" in refused("--encoder", "embeddings", out=tmp_path / "mine")
    assert "is a file" in refused("--encoder", "embeddings", out=tmp_path / "mine" / "notes.txt")


@pytest.mark.parametrize(
    "library, more, extra",
    [
        ("datasets", ["--dataset", "some/set"], "datasets"),
        ("ray", ["--runner", "ray"], "ray"),
    ],
)
def test_a_missing_extra(refused, monkeypatch, library, more, extra):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    line = refused("--encoder", "embeddings", *more)
    assert f"pip install 'mlx-hiermem[{extra}]'" in line


def test_a_disk_that_is_full_in_the_midst_of_it(place, tmp_path):
    """A limit on the size of files stands for it: writes fail half-way, at any of the stages."""
    out = tmp_path / "c"
    arguments = command(place, out, "--encoder", "embeddings", "--unit-size", "1500")
    failed = 0
    for limit in (1000, 3000, 6000, 9000):
        found = subprocess.run(
            [sys.executable, "-m", "mlx_hiermem", *arguments],
            capture_output=True, text=True, env={**os.environ},
            preexec_fn=lambda limit=limit: resource.setrlimit(
                resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)
            ),
        )  # fmt: skip
        if found.returncode == 0:
            break
        failed += 1
        line = found.stderr.splitlines()[-1]
        assert found.returncode == 2 and found.stdout == "", found.stderr
        assert line.startswith("mlx_hiermem: error: ") and "cannot be written" in line
        assert not list(out.rglob("*.partial")) and not (out / "corpus.json").exists()
    assert failed >= 2
    if not (out / "corpus.json").exists():
        assert cli.main(arguments) == 0
    assert Corpus.open(out).revision == _plain(place, tmp_path)


def _plain(place: Path, tmp_path: Path) -> str:
    assert (
        cli.main(command(place, tmp_path / "d", "--encoder", "embeddings", "--unit-size", "1500"))
        == 0
    )
    return json.loads((tmp_path / "d" / "corpus.json").read_text())["revision"]


def test_help_is_quick_and_loads_no_model_library():
    code = (
        "import sys\nfrom mlx_hiermem import cli\n"
        "try: cli.main(['cluster', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'pyarrow', 'ray', 'datasets', 'tokenizers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "--views" in found.stdout and "--tree" in found.stdout


def test_a_config_file_and_json(place, tmp_path, capsys):
    config = tmp_path / "cluster.yaml"
    config.write_text(
        f"data: ['{place / 'some.jsonl'}']\nmodel: {place / 'model'}\nencoder: embeddings\n"
        "branching: 3\nlevels: 2\nsequence_length: 32\nvalidation: 0\n"
    )
    assert cli.main(["cluster", "-c", str(config), "--out", str(tmp_path / "c"), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["settings"]["branching"] == {"value": 3, "from": "file"}
    assert found["settings"]["window"] == {"value": 2048, "from": "default"}
    assert found["documents"] == 60 and set(found["splits"]) == {"train"}
    assert [level["clusters"] for level in found["levels"]] == [3, 9]
    assert sum(1 for sample in found["samples"] if sample["texts"]) >= 4
    level = found["levels"][1]
    assert level["smallest"] <= level["median"] <= level["largest"] <= 1
    assert level["balance"] == pytest.approx(9 * level["largest"])
    assert "validation" in captured.err and not (tmp_path / "c" / "validation").exists()
