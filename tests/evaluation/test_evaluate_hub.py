"""Measuring a model of the Hub: the revision that is asked for, and no more of its bank than that.

Against the stand-in of the Hub in ``tests/hub``, in a process of its own.
"""

from __future__ import annotations

import json
from shutil import copytree

from mlx_hiermem import load
from mlx_hiermem.evaluation.facts import QUESTIONS_FILE, Question, write_questions
from tests.hub import conftest
from tests.tiny import make_tiny_model, random_texts

hub, environment, commands = conftest.hub, conftest.environment, conftest.commands

PROMPTS = random_texts(12, seed=8)


def write(folder, prompts):
    questions = [Question(prompt, " 72.", "72", "x", 1, 0, [0]) for prompt in prompts]
    write_questions(folder / QUESTIONS_FILE, questions, ["all"])


def test_the_revision_and_the_part_that_are_asked_for(hub, commands, tmp_path):
    older = make_tiny_model(tmp_path / "older", ranks=(4, 2, 1))
    (older / "evaluation").mkdir()
    write(older, PROMPTS)
    newer = copytree(older, tmp_path / "newer")
    write(newer, PROMPTS[:1])
    commit = hub.add(conftest.REPO, conftest.contents(older))
    main = hub.add(conftest.REPO, conftest.contents(newer))
    hub.repos[conftest.REPO].refs["v1"] = commit
    root = load(older).route(PROMPTS[0]).ids[0]
    measured = [
        ["evaluate", "--task", "facts"],
        ["evaluate", "--task", "routing"],
        ["evaluate", "--task", "atomic", "--limit", 5],
        ["evaluate", "--task", "leakage", "--removed", f"1:{root}", "--candidates", 2],
        ["bank", "inspect", "--questions"],
    ]
    options = ["--json", "--levels", 1, "--model"]
    found = commands(
        *([*line, *options, conftest.REPO, "--revision", "v1"] for line in measured),
        *([*line, *options, older] for line in measured),
    )
    assert [code for code, _, _ in found] == [0] * 10, found
    answers = [json.loads(out) for _, out, _ in found]
    assert answers[0]["n"] == [12] and answers[1]["n"] == 12
    assert answers[:4] == answers[5:9]
    assert answers[4]["uses"]["levels"] == answers[9]["uses"]["levels"]
    assert not [line for line in hub.requests if main in line or line.endswith("revision/main")]
    asked_for = set(hub.downloads())
    assert QUESTIONS_FILE in asked_for and "memory/level-1-00000-of-00001.safetensors" in asked_for
    assert not [name for name in asked_for if name.startswith(("memory/level-2", "memory/level-3"))]
