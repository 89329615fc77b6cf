"""``bank add`` on the atlas, with its defaults: new facts are learned, old ones are kept."""

from __future__ import annotations

import json
import shutil

import pytest

from benchmarks.studies import private_facts
from benchmarks.studies.add_knowledge import _ask
from mlx_hiermem import cli, load
from mlx_hiermem.evaluation.facts import QUESTIONS_FILE
from mlx_hiermem.evaluation.questions import read_questions
from mlx_hiermem.models import find_model


@pytest.mark.slow
def test_new_facts_are_answered_and_old_ones_kept(tmp_path, capsys):
    model = shutil.copytree(find_model("atlas"), tmp_path / "atlas")
    private = private_facts.make(60, 7)
    corpus = private.write(tmp_path / "private.jsonl")
    command = ["bank", "add", "--model", str(model), "--corpus", str(corpus), "--name", "acme"]
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["lands"] > 0.9 and report["loss"] < 0.3
    old = read_questions(model / QUESTIONS_FILE)[0][::11]
    new, lands = _ask(load(model), private.questions)
    kept, diverted = _ask(load(model), old)
    before, _ = _ask(load("atlas"), old)
    assert new > 0.8 and lands > 0.9
    assert diverted < 0.04 and kept > before - diverted - 0.01
    assert cli.main(["bank", "verify", "--model", str(model)]) == 0
