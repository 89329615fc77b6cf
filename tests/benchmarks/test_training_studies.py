"""Every training study runs, in its smoke mode, and says for each of its lines what came out."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module

import pytest

from benchmarks.harness import main
from benchmarks.studies import kinds, placement, regimes, shapes, shares
from benchmarks.studies.training import runs
from mlx_hiermem.config import KINDS, PLACEMENTS, AnchorShape, MemoryConfig
from mlx_hiermem.models import find_model

SHAPE = AnchorShape.of(json.loads((find_model("atlas") / "config.json").read_text()))

#: Study -> labels of its lines in a smoke run.
STUDIES = {
    "kinds": {f"{kind}-15360" for kind in KINDS},
    "placement": set(PLACEMENTS),
    "levels": {"level-1", "level-2", "level-3", "level-4", "all"},
    "sizes": {"7680", "15360"},
    "bank_sizes": {"8-1", "8-2", "8-3", "8-4"},
    "shares": {"9%"},
    "learning": {"frozen", "co-trained", "anchor-alone"},
    "regimes": {
        "A1-none", "A2-co-trained", "A3-frozen", "A4-from-scratch", "B3-larger-frozen",
    },
    "tokens": {"4-100"},
    "agreement": {"sif-prompt", "trained-prompt"},
    "shapes": {"4-1"},
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Studies find the parts and the runs of each other there."""
    return tmp_path_factory.mktemp("work")


def study(name, tmp_path, *arguments):
    module = import_module(f"benchmarks.studies.{name}")
    given = ["--json", str(tmp_path / "rows.json"), "--png", str(tmp_path / "figure.png")]
    options = getattr(module, "options", runs.options)
    code = main(module.NAME, module.measure, [*given, *arguments], options)
    if code:
        return code, None
    return code, json.loads((tmp_path / "rows.json").read_text())["rows"]


#: Which cover all regimes, columns and figures; the others are alike, and take a minute together.
FAST = ("levels", "regimes", "learning")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in STUDIES],
)
def test_a_smoke_run(name, tmp_path, work, capsys):
    code, rows = study(name, tmp_path, "--smoke", "--work", str(work))
    assert code == 0
    by_measure: dict[str, set[str]] = {}
    for row in rows:
        where, label = row["id"].split("@")
        by_measure.setdefault(where.split(".")[1], set()).add(label)
        assert row["value"] > 1 if "perplexity" in where else 0 <= row["value"] <= 1
        assert row["goal"] == "" and row["detail"]
    expected = {"CK", "SK"} if name == "regimes" else {"facts"}
    expected |= {"perplexity"} | ({"landed"} if name in ("agreement", "shapes") else set())
    assert by_measure == dict.fromkeys(expected, STUDIES[name])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "smoke run" in printed


def test_kinds_and_placements_are_compared_at_equal_fetch_size():
    def sizes(tasks):
        return {
            MemoryConfig(task["ranks"], kind=task.get("kind", "ffn"), layers=task.get("layers"))
            .fetch_size(SHAPE)
            for task in tasks
        }  # fmt: skip

    assert set(kinds.RANKS) == set(KINDS)
    given = [{"kind": kind, "ranks": ranks} for kind, ranks in kinds.RANKS.items()]
    assert sizes(given) == {kinds.FETCH_SIZE}
    wide = tuple(2 * rank for rank in placement.RANKS)
    assert len(sizes([{"ranks": placement.RANKS}, {"ranks": wide, "layers": (0, 1)}])) == 1


def test_shares_have_one_size_at_run_time_and_shapes_one_fetch_size():
    from benchmarks.studies.training.task import Anchor

    assert {sum(ranks) + (shares.WIDTH - sum(ranks)) for ranks in shares.RANKS} == {shares.WIDTH}
    found = [shares.share(ranks) for ranks in shares.RANKS]
    assert found == sorted(found) and 0.01 < found[0] and found[-1] < 0.5
    # Against the parameters of the anchor that ships, which has the width of the fourth.
    assert shares.WIDTH - sum(shares.RANKS[3]) == Anchor().ffn
    assert found[3] == pytest.approx(30_720 / (312_384 + 30_720), rel=0.01)
    assert all(shapes.RANK % p == 0 and k**p <= shapes.LEAVES for k, p in shapes.shapes())
    assert Counter(k for k, _ in shapes.shapes()) == {4: 4, 8: 3, 16: 2, 32: 2}


def test_regimes_train_as_long_as_each_other():
    tasks = {task.label[:2]: task for task in regimes.tasks()}
    anchor = {name: task.anchor.steps for name, task in tasks.items()}
    assert {anchor[name] + tasks[name].steps for name in ("A1", "A2", "A3", "A4", "B3")} == {
        regimes.ANCHOR.steps + regimes.STEPS
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0; expected at least 1"),
        (["--jobs", "-1"], "--jobs is -1"),
        (["--limit", "0"], "--limit is 0"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--seed", "-1"], "--seed is -1; expected 0 or more"),
        (["--rate", "nan"], "--rate is nan; expected more than 0"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    for name in ("kinds", "placement"):
        assert study(name, tmp_path, *arguments) == (2, None)
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_work_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert study("levels", tmp_path, "--smoke", "--work", str(tmp_path / "file"))[0] == 2
    assert "cannot be written" in capsys.readouterr().err
