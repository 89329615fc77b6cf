"""``mlx_hiermem evaluate``: what it prints, and what it says of bad input."""

from __future__ import annotations

import json

import pytest

from mlx_hiermem import load
from mlx_hiermem.cli import main
from mlx_hiermem.commands.options import parse_bytes
from mlx_hiermem.errors import InputError
from mlx_hiermem.evaluation.facts import Question, write_questions
from tests.tiny import make_tiny_model, random_texts

BUCKETS = ["most frequent", "rare"]
CONDITIONS = ["none", "generic", "fetched", "wrong", "blocked"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that knows the first five of nine facts from its fetched memory only."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model"))
    lm = load(folder)
    questions = []
    for i, prompt in enumerate(random_texts(9, seed=8)):
        text = lm.generate(prompt, "fetched", 4) if i < 5 else " 72."
        family, bucket, leaf = "xy"[i % 2], int(i >= 4), lm.route(prompt).ids[-1]
        questions.append(Question(prompt, text, text, family, 50 - i, bucket, [leaf, 0]))
    (folder / "evaluation").mkdir()
    write_questions(folder / "evaluation" / "facts.jsonl.gz", questions, BUCKETS)
    return folder


@pytest.fixture(scope="module")
def full_folder(folder, tmp_path_factory):
    """The same with a second control, which is the anchor itself."""
    full = make_tiny_model(tmp_path_factory.mktemp("full"))
    (full / "evaluation").mkdir()
    (full / "evaluation" / "facts.jsonl.gz").write_bytes(
        (folder / "evaluation" / "facts.jsonl.gz").read_bytes()
    )
    (full / "evaluation" / "anchor_same_tokens.safetensors").write_bytes(
        (full / "model.safetensors").read_bytes()
    )
    return full


def printed(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_facts_as_json(folder, full_folder, capsys):
    found = json.loads(printed(capsys, "--model", full_folder, "--task", "facts", "--json"))
    assert list(found) == ["buckets", *CONDITIONS, "anchor_same_tokens", "n"]
    assert found["buckets"] == BUCKETS and found["n"] == [4, 5]
    assert found["fetched"] == [1.0, 0.2]
    off = [0.0, 0.0]
    assert all(found[c] == off for c in ("none", "wrong", "blocked", "anchor_same_tokens"))

    found = json.loads(printed(capsys, "--model", folder, "--task", "facts", "--json"))
    assert list(found) == ["buckets", *CONDITIONS, "n"] and found["fetched"] == [1.0, 0.2]

    options = ("--model", folder, "--task", "facts", "--json", "--limit", 3, "--by-family")
    found = json.loads(printed(capsys, *options))
    assert found["n"] == [3, 0] and found["fetched"] == [1.0, None]
    assert {family: shares["n"] for family, shares in found["by_family"].items()} == {
        "x": 2,
        "y": 1,
    }


def test_facts_as_a_table(folder, full_folder, capsys):
    text = printed(capsys, "--model", folder, "--task", "facts")
    rows = {line.split("  ")[0]: line.split()[-7:] for line in text.splitlines()}
    assert rows["bucket"] == ["n", "documents", *CONDITIONS]
    assert rows["most frequent"][:2] == ["4", "47-50"] and rows["most frequent"][4] == "100.0"
    assert rows["rare"][:2] == ["5", "42-46"] and rows["rare"][4] == "20.0"
    assert rows["all"][:2] == ["9", "42-50"] and rows["all"][4] == "55.6"
    assert "anchor_same_tokens was not measured" in text and "family" not in text
    text = printed(capsys, "--model", full_folder, "--task", "facts", "--by-family")
    assert "not measured" not in text and text.split().count("anchor_same_tokens") == 2
    assert [line.split()[:3] for line in text.splitlines()[-2:]] == [
        ["x", "5", "42-50"],
        ["y", "4", "43-49"],
    ]
    text = printed(capsys, "--model", folder, "--task", "facts", "--limit", 2)
    assert next(line for line in text.splitlines() if "rare" in line).split() == [
        "rare",
        "0",
        *5 * "-",
    ]


def test_the_seed_draws_the_wrong_paths(folder, monkeypatch):
    from mlx_hiermem.evaluation import facts

    seeds = []
    answer = facts.answer

    def spy(lm, questions, control, seed):
        seeds.append(seed)
        return answer(lm, questions, control, seed)

    monkeypatch.setattr(facts, "answer", spy)
    for options in ([], ["--seed", "3"]):
        assert main(["evaluate", "--model", str(folder), "--task", "facts", *options]) == 0
    assert seeds == [0, 3]


def test_routing(folder, capsys):
    options = ("--model", folder, "--task", "routing")
    assert json.loads(printed(capsys, *options, "--json")) == {"levels": [1.0, 1.0], "n": 9}
    found = json.loads(printed(capsys, *options, "--json", "--limit", 3, "--by-family"))
    assert found["n"] == 3 and found["by_family"]["y"] == {"levels": [1.0, 1.0], "n": 1}
    rows = [line.split() for line in printed(capsys, *options).splitlines()[-4:]]
    assert rows[0] == ["family", "n", "level", "1", "level", "2"]
    assert rows[1:] == [[f, n, "100.0", "100.0"] for f, n in (("x", "5"), ("y", "4"), ("all", "9"))]


def test_perplexity(folder, tmp_path, capsys):
    path = tmp_path / "some.txt"
    path.write_text("\n\n".join(random_texts(4)))
    options = ("--model", folder, "--task", "perplexity", "--text", path)
    found = json.loads(printed(capsys, *options, "--json", "--limit", 3))
    lm = load(folder)
    assert found == {
        **{m: lm.perplexity(random_texts(4)[:3], m) for m in ("none", "generic", "fetched")},
        "documents": 3,
    }
    found = json.loads(printed(capsys, *options, "--json"))
    text = printed(capsys, *options)
    assert f"fetched     {found['fetched']:.3f}" in text and "4 documents" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "facts", "--limit", "0"], "--limit is 0"),
        (["--task", "facts", "--seed", "-1"], "--seed is -1"),
        (["--task", "perplexity"], "no documents are given; name them with --text FILE"),
        (["--task", "routing", "--text", "x.txt"], "--text FILE names the documents"),
        (["--task", "perplexity", "--text", "missing.txt"], "missing.txt: cannot be read"),
        (["--task", "facts", "--memory-budget", "lots"], "'lots' is none"),
        (["--task", "facts", "--memory-budget", "1B"], "1 bytes cannot hold one block"),
        (["--task", "facts", "--bank", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_wrong_use_is_one_line(folder, capsys, arguments, message):
    refused(["--model", str(folder), *arguments], message, capsys)


def test_a_model_without_or_with_foreign_questions_is_refused(tmp_path, folder, capsys):
    make_tiny_model(tmp_path / "bare")
    for task in ("facts", "routing"):
        arguments = ["--model", str(tmp_path / "bare"), "--task", task]
        refused(arguments, "evaluation/facts.jsonl.gz: no such file", capsys)
        (tmp_path / "bare" / "evaluation").mkdir(exist_ok=True)
    write_questions(
        tmp_path / "bare" / "evaluation" / "facts.jsonl.gz",
        [Question("x", " a.", "a", "x", 1, 0, [9])],
        ["all"],
    )
    refused(arguments, "line 2: leaf 9 does not exist", capsys)
    refused(["--model", str(tmp_path / "none"), "--task", "facts"], "none: no such folder", capsys)


def test_a_damaged_control_is_refused(tmp_path, folder, capsys):
    full = make_tiny_model(tmp_path / "full")
    (full / "evaluation").mkdir()
    for name in ("facts.jsonl.gz", "anchor_same_tokens.safetensors"):
        (full / "evaluation" / name).write_bytes(
            (folder / "evaluation" / "facts.jsonl.gz").read_bytes()
        )
    refused(["--model", str(full), "--task", "facts"], "anchor_same_tokens.safetensors", capsys)


def refused(arguments, message, capsys):
    assert main(["evaluate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]  # transformers may have said something before
    assert last.startswith("mlx_hiermem: error: ") and message in last


def test_numbers_of_bytes():
    sizes = {"1": 1, "2GB": 2 * 10**9, "1.5GiB": 3 * 2**29, "512 mib": 2**29, "3k": 3000, "7B": 7}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "0", "-1", "GB", "1.GB", "2XB", "1e9", "0.0001KB", "nan", "²", "9" * 5000):
        with pytest.raises(InputError, match="a number of bytes"):
            parse_bytes(text)
