"""The study of what is left of a removed topic: it runs, and its means are over seeds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.harness import main
from benchmarks.studies import leakage
from mlx_hiermem.evaluation.leakage import Known, Leakage


def test_a_smoke_run(tmp_path, capsys):
    arguments = ["--json", str(tmp_path / "rows.json"), "--png", str(tmp_path / "figure.png")]
    assert main(leakage.NAME, leakage.measure, ["--smoke", *arguments], leakage.options) == 0
    rows = {row["id"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    for topic, conditions in (
        ("leaf", ["before", "anchor", "generic", "after", "sibling", "any-sibling", "parent"]),
        ("subtree", ["before", "anchor", "generic", "after", "sibling", "any-sibling"]),
    ):
        found = [id.split("@")[1] for id in rows if id.startswith(f"leakage.exact@{topic}")]
        assert found == [f"{topic}-{name}" for name in conditions]
    # What is removed from a bank of two levels: the path is then the parent alone, or nothing.
    for same in (("leaf-after", "leaf-parent"), ("subtree-after", "subtree-anchor")):
        losses = [rows[f"leakage.loss@{one}"]["value"] for one in same]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    before, after = (rows[f"leakage.loss@subtree-{name}"]["value"] for name in ("before", "after"))
    assert before != after
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "The anchor alone still answers" in out and "too few to tell what is left" in out


def _leakage(exact, loss):
    known = Known(np.array(exact), np.array([1.0, 3.0]), np.array(loss))
    return Leakage(2, 1, 4.5, {"anchor": known, "any sibling": Known(np.array(exact))},
                   {"anchor": known, "any sibling": known})  # fmt: skip


def test_seeds_are_averaged_within_a_question():
    whole = leakage.mean_over_seeds(
        [_leakage([True, False], [1.0, 2.0]), _leakage([True, True], [3.0, 2.0])]
    )
    assert (whole.questions, whole.elsewhere, whole.chance) == (2, 1, 4.5)
    assert whole.known["anchor"].exact.tolist() == [1.0, 0.5]
    assert whole.known["anchor"].losses.tolist() == [2.0, 2.0]
    assert whole.known["any sibling"].losses is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0; expected at least 1"),
        (["--seeds", "-1"], "--seeds is -1"),
        (["--seed", "-1"], "--seed is -1; expected at least 0"),
    ],
)
def test_what_is_refused(capsys, arguments, message):
    assert main(leakage.NAME, leakage.measure, arguments, leakage.options) == 2
    assert message in capsys.readouterr().err
