"""The benchmarks of kinds and placements: every run is trained and asked, at equal fetch size."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from benchmarks import atlas_runs, kinds, placement
from benchmarks.harness import main
from mlx_hiermem.config import KINDS, PLACEMENTS, AnchorShape, MemoryConfig
from mlx_hiermem.models import find_model

SHAPE = AnchorShape.of(json.loads((find_model("atlas") / "config.json").read_text()))


def run(module, tmp_path, *arguments):
    given = ["--json", str(tmp_path / "rows.json"), "--png", str(tmp_path / "figure.png")]
    code = main(module.NAME, module.measure, [*given, *arguments], atlas_runs.options)
    if code:
        return code, None
    return code, json.loads((tmp_path / "rows.json").read_text())["rows"]


def test_kinds_are_compared_at_equal_fetch_size():
    assert set(kinds.RANKS) == set(KINDS)
    sizes = {
        MemoryConfig(ranks, kind=kind).fetch_size(SHAPE) for kind, ranks in kinds.RANKS.items()
    }
    assert len(sizes) == 1


def test_a_smoke_run_of_all_kinds(tmp_path, capsys):
    code, rows = run(kinds, tmp_path, "--smoke")
    assert code == 0
    assert Counter(row["id"].split("@")[0] for row in rows) == {
        "kinds.facts": len(KINDS), "kinds.perplexity": len(KINDS),
    }  # fmt: skip
    assert {row["id"].split("@")[1] for row in rows} == {f"{kind}-15360" for kind in KINDS}
    for row in rows:
        assert (0 <= row["value"] <= 1) if "facts" in row["id"] else row["value"] > 1
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "none" in capsys.readouterr().out


@pytest.mark.slow
def test_a_smoke_run_of_all_placements(tmp_path):
    code, rows = run(placement, tmp_path, "--smoke")
    assert code == 0
    assert {row["id"].split("@")[1] for row in rows} == set(PLACEMENTS)
    assert len({row["detail"].split(";")[1] for row in rows}) == 1  # one fetch size
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0; expected at least 1"),
        (["--jobs", "-1"], "--jobs is -1"),
        (["--limit", "0"], "--limit is 0"),
        (["--rate", "nan"], "--rate is nan; expected more than 0"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    for module in (kinds, placement):
        assert run(module, tmp_path, *arguments) == (2, None)
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
