"""A tiny model with held-out questions and a control, and running a study on it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from benchmarks.harness import main
from mlx_hiermem import load
from mlx_hiermem.evaluation.facts import CONTROL_FILE, QUESTIONS_FILE, Question, write_questions
from tests.tiny import make_tiny_model, random_texts, write_tiny_anchor

N = 12
BUCKETS = ["often", "rarely"]


def make_study_model(folder: Path, seed: int = 0) -> Path:
    """Questions of two families and two buckets; fetched, none and generic each answer some."""
    make_tiny_model(folder, seed)
    lm, rng = load(folder), random.Random(3)
    names = [text.split()[0] for text in random_texts(N, seed=4)]
    questions = []
    for i, name in enumerate(names):
        family = ("colour", "shape")[i % 2]
        prompt = f"The {family} of {name}{i} is"
        memory = ("fetched", "fetched", "none", "generic")[i % 4]
        text = lm.generate(prompt, memory, rng.randint(1, 3))
        leaf = lm.route(prompt).ids[-1]
        trained = sorted({leaf, rng.randrange(9)} if i % 3 else {rng.randrange(9)})
        questions.append(Question(prompt, text, text, family, N - i, i * 2 // N, trained))
    lm.bank.close()
    (folder / "evaluation").mkdir()
    write_questions(folder / QUESTIONS_FILE, questions, BUCKETS)
    # It writes config.json once more, as it was.
    write_tiny_anchor(folder, seed + 7, CONTROL_FILE)
    return folder


def run(module, *arguments) -> int:
    """Run a study's ``main``."""
    options = getattr(module, "options", None)
    return main(module.NAME, module.measure, list(map(str, arguments)), options)


def rows(module, folder: Path, out: Path, *arguments) -> dict[str, float]:
    """Run a study on all questions, with a figure; its rows by id."""
    path, png = out / "rows.json", out / "new" / "figure.png"
    given = ["--model", folder, "--limit", N, "--json", path, "--png", png, *arguments]
    assert run(module, *given) == 0
    assert png.read_bytes()[:4] == b"\x89PNG"
    return {row["id"]: row["value"] for row in json.loads(path.read_text())["rows"]}
