"""The harness on tiny, real measurements."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Row, Times, in_fresh_process, interleave, main, ratio
from mlx_hiermem.errors import HierMemError

ROOT = Path(__file__).parents[2]


def test_tasks_take_turns_and_the_first_is_not_always_first():
    calls = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, 2)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert {name: len(found.seconds) for name, found in times.items()} == {"a": 3, "b": 3}


def test_a_task_that_takes_twice_as_long_has_twice_the_time():
    tasks = {"slow": lambda: time.sleep(0.04), "fast": lambda: time.sleep(0.02)}
    row = ratio("t.slow_vs_fast", interleave(tasks, 3), "slow", "fast", "<= 3", "sleeping")
    assert 1.5 < row.value < 2.5 and row.met
    assert row.detail.startswith("sleeping; slow 4") and "rounds 3" in row.detail


def test_the_ratio_is_taken_within_each_round():
    times = {"a": Times((2.0, 40.0, 6.0)), "b": Times((1.0, 20.0, 2.0))}
    row = ratio("t", times, "a", "b", ">= 2")
    assert row.value == 2.0 and row.met
    assert row.detail == "a 6.00 s ÷ b 2.00 s; rounds 3, 2.000 to 3.000"


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [(1.7, "<= 1.7", True), (1.71, "<= 1.7", False), (0.9, ">= 0.9", True), (0, ">= 1", False),
     (5, "", None)],
)  # fmt: skip
def test_a_goal_is_met_or_not(value, goal, met):
    assert Row("t", value, goal, "").met is met


def hold(megabytes: int) -> dict:
    """Hold so much memory, for a moment."""
    held = bytearray(b"x" * (megabytes << 20))
    return {"length": len(held), "mlx": "mlx.core" in sys.modules}


@pytest.fixture
def importable(monkeypatch):
    """Let another process import this module."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_a_fresh_process_tells_its_own_peak(importable):
    ballast = bytearray(b"x" * (300 << 20))  # of this process, not of the fresh one
    small, large = (in_fresh_process(hold, megabytes=size) for size in (1, 150))
    assert small.result == {"length": 1 << 20, "mlx": False}
    assert small.peak < 150 << 20 < large.peak < 2 * len(ballast)
    # bytearray(b"...") holds the bytes twice
    assert 270 << 20 < large.peak - small.peak < 330 << 20


def test_a_process_that_fails_is_one_line(importable):
    with pytest.raises(HierMemError, match="hold ended with 1: TypeError") as error:
        in_fresh_process(hold, gigabytes=1)
    assert "\n" not in str(error.value)


def test_a_script_prints_a_table_and_writes_json(tmp_path, capsys):
    rows = [Row("t.a_vs_b", 1.25, "<= 1.7", "a ÷ b"), Row("t.speed", 3.0, "", "per second")]
    asked = []

    def measure(smoke):
        asked.append(smoke)
        return rows

    assert main("t", measure, ["--smoke", "--json", str(tmp_path / "t.json")]) == 0
    assert main("t", measure, []) == 0
    assert asked == [True, False]
    printed = capsys.readouterr().out
    assert "t.a_vs_b  1.250  <= 1.7  yes  a ÷ b" in printed
    assert printed.count("the values say nothing") == 1
    report = json.loads((tmp_path / "t.json").read_text())
    assert report["benchmark"] == "t" and report["smoke"] is True
    assert report["rows"][0] == {
        "id": "t.a_vs_b", "value": 1.25, "goal": "<= 1.7", "detail": "a ÷ b"
    }  # fmt: skip
    assert report["machine"]["cores"] >= 1 and report["machine"]["backend"] and report["commit"]


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "x.json", tmp_path):
        assert harness.main("x", lambda smoke: pytest.fail("measured"), ["--json", str(place)]) == 2
        assert f"--json {place}: cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_commit_is_told_only_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_ROOT", tmp_path)
    assert harness.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True)
    subprocess.run([*git, "commit", "-qm", "m"], check=True)
    clean = harness.commit()
    assert len(clean) == 12
    (tmp_path / "f").write_text("2")
    assert harness.commit() == clean + "+"


def test_importing_a_benchmark_loads_the_fast_blas_before_mlx():
    code = "import sys, benchmarks.harness; print('mlx.core' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
