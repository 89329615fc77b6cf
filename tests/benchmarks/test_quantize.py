"""The figures of the quantisation benchmark are those of the commands, and nothing is left."""

from __future__ import annotations

import json
import math
import os
import shutil

import mlx.core as mx
import pytest
from tqdm import tqdm

from benchmarks import fetch_bank, quantize, quantize_banks
from benchmarks.harness import main
from mlx_hiermem import cli, load
from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.evaluation.facts import QUESTIONS_FILE, Question, answer, write_questions
from tests.tiny import make_tiny_model, random_texts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of width 16 and nine questions, of which it knows five."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    lm = load(folder)
    questions = []
    for i, prompt in enumerate(random_texts(9, seed=8)):
        text = lm.generate(prompt, "fetched", 4) if i < 5 else " 72."
        questions.append(Question(prompt, text, text, "x", 5, 0, [lm.route(prompt).ids[-1]]))
    lm.bank.close()
    (folder / "evaluation").mkdir()
    write_questions(folder / QUESTIONS_FILE, questions, ["all"])
    return folder


@pytest.fixture
def large(tmp_path):
    """Banks of the smoke run's size, for all quantisations."""
    config = fetch_bank.make_config(fetch_bank.SMOKE, (8, 4, 2, 0), 3)
    fetch_bank.write_random_bank(tmp_path / "whole", config, "bank")
    return quantize_banks.make_banks(tmp_path / "whole", tmp_path)


def run(*arguments):
    return main(quantize.NAME, quantize.measure, list(map(str, arguments)), quantize.options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("memory", ["fetched", "none"])
def test_the_figures_are_those_of_the_model(model, tmp_path, memory, packed):
    if packed:
        quantize_bank(model / "memory", tmp_path / "packed", 4)
    lm = load(model, bank=tmp_path / "packed" if packed else None)
    questions, _ = quantize.read_questions(model / QUESTIONS_FILE)
    found = quantize.ask(lm, questions, memory, tqdm(disable=True))
    assert found.facts == answer(lm, questions)[memory].mean()
    if memory == "fetched" and not packed:
        assert found.facts == 5 / 9
    nats = tokens = 0
    for question in questions:
        nats -= lm.score(question.prompt, question.continuation, memory)[0]
        tokens += len(question.continuation)  # a token is a byte
    assert found.answers == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    texts = [question.prompt + question.continuation for question in questions]
    assert found.texts == pytest.approx(lm.perplexity(texts, memory), rel=1e-4)
    lm.bank.close()


def test_the_banks_are_as_large_as_they_say(large):
    base, banks = large
    assert base == "bf16" and list(banks) == ["bf16", *quantize_banks.VARIANTS]
    per_row = {  # of 32 numbers, bytes; affine with scale and bias in bfloat16
        "bf16": 64, "8-bit": 36, "4-bit": 20, "3-bit": 16, "2-bit": 12, "mxfp4": 17, "nvfp4": 18,
    }  # fmt: skip
    rows = 2 * 3  # layers, M1 to M3
    for name, bank in banks.items():
        assert bank.fetch_bytes == rows * (8 + 4 + 2) * per_row[name]
        assert bank.bank_bytes == rows * (8 * 3 + 4 * 9 + 2 * 27) * per_row[name]
        assert (bank.error > 0) == (name != base)
        with MemoryBank.open(bank.memory) as opened:
            assert opened.inspect()["bank_bytes"] == bank.bank_bytes
    assert banks["8-bit"].error < banks["4-bit"].error < banks["2-bit"].error


def test_every_fetch_reads_all_blocks(large):
    for bank in large[1].values():
        fetches = quantize_banks.Fetches(bank)
        for _ in range(7):
            report = fetches.bank.fetch(fetches.path()).report
            assert report.bytes_read == bank.fetch_bytes
        fetches.drop()
        fetches.fetch(3)
        fetches.bank.close()


def test_the_two_halves_of_a_fetch(large, monkeypatch):
    bank = large[1]["4-bit"]
    reading, reads, preadv = quantize_banks.Reading(bank), [], os.preadv

    def counted(*arguments):
        reads.append(preadv(*arguments))
        return reads[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", counted)
        for turn in (1, 2):
            reads.clear()
            reading.read()
            assert sum(reads) == bank.fetch_bytes
            with MemoryBank.open(bank.memory) as opened:
                memory = opened.fetch((turn, 3 * turn, 9 * turn, 27 * turn))
                assert mx.array_equal(reading._slot.joined(), memory.joined)
    reading.unpack()
    reading.close()


def test_a_smoke_run_has_every_row_and_leaves_nothing(model, tmp_path, capsys):
    path = tmp_path / "rows.json"
    (tmp_path / "disk").mkdir()
    arguments = ["--smoke", "--model", model, "--folder", tmp_path / "disk", "--json", path]
    assert run(*arguments) == 0
    assert not any((tmp_path / "disk").iterdir())
    rows = {row["id"]: row for row in json.loads(path.read_text())["rows"]}
    names = {"fp32", "nvfp4"}  # the model is 16 wide
    assert {id for id in rows if "160M" not in id} == {
        *(f"quantize.{figure}@{name}" for name in names
          for figure in ("facts", "perplexity", "answer_perplexity")),
        "quantize.size@nvfp4", "quantize.fetch@nvfp4",
    }  # fmt: skip
    assert {id for id in rows if "160M" in id} == {
        f"quantize.160M.{figure}@{name}"
        for name in quantize_banks.VARIANTS
        for figure in ("warm", "cold", "read", "unpack")
    }
    assert all(row["value"] > 0 and row["detail"] for row in rows.values())
    assert rows["quantize.facts@fp32"]["value"] == 5 / 9
    assert rows["quantize.size@nvfp4"]["value"] == 9 / 64
    text = capsys.readouterr().out
    assert "8-bit is left out: quantization: rows of a multiple of 16 numbers" in text
    assert "no memory" in text and "unpacking" in text
    assert cli.main(["evaluate", "--task", "facts", "--model", str(model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fetched"] == [rows["quantize.facts@fp32"]["value"]]


def test_what_cannot_be_measured_is_one_line_and_leaves_nothing(
    model, tmp_path, capsys, monkeypatch
):
    bare = make_tiny_model(tmp_path / "bare")
    shutil.copytree(model, tmp_path / "packed")
    shutil.rmtree(tmp_path / "packed" / "memory")
    quantize_bank(model / "memory", tmp_path / "packed" / "memory", 4)
    (tmp_path / "disk").mkdir()
    there = ["--smoke", "--folder", tmp_path / "disk"]
    for arguments, text in (
        ([*there, "--model", bare], "facts.jsonl.gz"),
        ([*there, "--model", tmp_path / "packed"], "quantised already"),
        ([*there, "--model", "nowhere"], "nowhere: no such folder"),
        ([*there, "--model", model, "--limit", "0"], "--limit is 0; expected at least 1"),
        (["--smoke", "--folder", tmp_path / "none"], "none: cannot be written"),
    ):
        assert run(*arguments) == 2, text
        captured = capsys.readouterr()
        assert text in captured.err
        assert captured.err.count("error: ") == captured.err.count("\n") == 1
        assert not any((tmp_path / "disk").iterdir())

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "ask", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*there, "--model", model)
    assert not any((tmp_path / "disk").iterdir())


def test_questions_are_drawn_evenly(model, monkeypatch, tmp_path):
    asked = []

    def ask(lm, questions, *_):
        asked.append([question.prompt for question in questions])
        return quantize.Worth(1.0, 1.0, 1.0)

    monkeypatch.setattr(quantize, "ask", ask)
    (tmp_path / "new").mkdir()
    list(quantize.worth(tmp_path / "new" / "model", model, 3, 1))
    every = [one.prompt for one in quantize.read_questions(model / QUESTIONS_FILE)[0]]
    assert asked == [[every[0], every[3], every[6]]] * 3
