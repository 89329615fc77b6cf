"""The log of a run and its picture: crashes, resumes, and logs of any length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.errors import FormatError, TrainingError
from mlx_hiermem.training import picture
from mlx_hiermem.training.curves import LOG, PICTURE, Curves, draw, read_log


def write(folder: Path, steps: int, every: int = 0) -> None:
    with Curves(folder) as curves:
        for step in range(1, steps + 1):
            curves.step({"step": step, "loss": 1 + 9 / step, "learning_rate": 1e-3})
            if every and step % every == 0:
                losses = {"none": 3.0 + 1 / step, "generic": 2.5, "fetched": np.float32(2.25)}
                curves.validation(step, losses)


def steps_of(folder: Path) -> list[int]:
    return [entry["step"] for entry in read_log(folder / LOG).steps]


def draws(**lists: list):
    """The axes of a picture, with warnings as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = picture.figure(lists.get("steps", []), lists.get("validations", []))
        figure.canvas.draw()
    return figure, *figure.axes


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path / "new" / "run", 4, every=2)
    log = read_log(tmp_path / "new" / "run" / LOG)
    assert [entry["step"] for entry in log.steps] == [1, 2, 3, 4]
    assert log.steps[2] == {"step": 3, "loss": 4.0, "learning_rate": 1e-3}
    assert log.validations[0] == {
        "step": 2, "validation": {"none": 3.5, "generic": 2.5, "fetched": 2.25},
    }  # fmt: skip


def test_every_line_is_there_before_the_next_step(tmp_path):
    curves = Curves(tmp_path)
    curves.step({"step": 1, "loss": 1.0})
    assert steps_of(tmp_path) == [1]  # nothing was closed or flushed
    curves.close()
    curves.close()


def test_numbers_that_are_not_finite_are_null_in_strict_json(tmp_path):
    with Curves(tmp_path) as curves:
        curves.step({"step": 1, "loss": float("nan"), "norm": np.float32("inf")})
        curves.step({"step": 2, "loss": np.float64(2), "count": np.int64(3)})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = (tmp_path / LOG).read_text().splitlines()
    assert json.loads(lines[0], parse_constant=refuse) == {"step": 1, "loss": None, "norm": None}
    assert json.loads(lines[1]) == {"step": 2, "loss": 2.0, "count": 3}


@given(data=st.data())
def test_a_log_cut_anywhere_goes_on_behind_its_last_whole_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    write(folder, 5, every=2)
    whole = (folder / LOG).read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    (folder / LOG).write_bytes(whole[:cut])
    lines = whole[:cut].count(b"\n")
    log = read_log(folder / LOG)
    assert len(log.steps) + len(log.validations) == lines
    with Curves(folder) as curves:
        curves.step({"step": 9, "loss": 1.0})
    expected = b"".join(whole.splitlines(keepends=True)[:lines]) + b'{"step": 9, "loss": 1.0}\n'
    assert (folder / LOG).read_bytes() == expected


def test_a_long_broken_line_goes_too(tmp_path):
    write(tmp_path, 1)
    with open(tmp_path / LOG, "ab") as file:
        file.write(b"x" * 200_000)
    Curves(tmp_path).close()
    assert steps_of(tmp_path) == [1]
    (tmp_path / LOG).write_bytes(b"x" * 200_000)
    Curves(tmp_path).close()
    assert (tmp_path / LOG).read_bytes() == b""


def test_rewind_drops_later_steps_and_validations_and_broken_lines(tmp_path):
    write(tmp_path, 6, every=2)
    with open(tmp_path / LOG, "ab") as file:
        file.write(b"\0" * 50 + b"\n" + b'{"step": 1, "lo')
    with Curves(tmp_path) as curves:
        curves.rewind(4)
        assert steps_of(tmp_path) == [1, 2, 3, 4]
        curves.step({"step": 5, "loss": 7.0})
    log = read_log(tmp_path / LOG)
    assert [entry["step"] for entry in log.validations] == [2, 4]
    assert log.steps[-1] == {"step": 5, "loss": 7.0}
    with Curves(tmp_path) as curves:
        curves.rewind(0)
    assert (tmp_path / LOG).read_bytes() == b""
    assert os.listdir(tmp_path) == [LOG]


def test_errors_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="log.jsonl: cannot be written"):
        Curves(tmp_path / "file")
    with pytest.raises(FormatError, match="cannot be read"):
        read_log(tmp_path / "no")
    lines = ["[1]", "{}", '{"step": "1"}', '{"step": 1, "loss": "x"}', "{", "[" * 10_000]
    lines += ['{"step": 2, "validation": 3}', '{"step": 2, "validation": {"none": "x"}}']
    for line in lines:
        (tmp_path / LOG).write_text(f'{{"step": 1, "loss": 2}}\n{line}\n')
        with pytest.raises(FormatError, match="line 2: not a line of a training log"):
            read_log(tmp_path / LOG)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told(tmp_path):
    (tmp_path / LOG).symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="cannot be written.*then resume"):
        Curves(tmp_path).step({"step": 1, "loss": 1.0})


def test_the_picture_appears_whole_without_pyplot(tmp_path):
    code = (
        "import sys; from mlx_hiermem.training.curves import draw; assert 'matplotlib' not in "
        "sys.modules; draw(sys.argv[1], sys.argv[2]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    write(tmp_path, 3, every=1)
    target = tmp_path / "picture.png"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / LOG), str(target)], check=True)
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 10_000
    assert sorted(os.listdir(tmp_path)) == [LOG, "picture.png"]
    with Curves(tmp_path) as curves:
        curves.plot()
    assert (tmp_path / PICTURE).read_bytes() == target.read_bytes()


def test_a_damaged_log_leaves_the_old_picture(tmp_path):
    write(tmp_path, 2)
    draw(tmp_path / LOG, tmp_path / PICTURE)
    before = (tmp_path / PICTURE).read_bytes()
    (tmp_path / LOG).write_text("words\n")
    with pytest.raises(FormatError):
        draw(tmp_path / LOG, tmp_path / PICTURE)
    assert (tmp_path / PICTURE).read_bytes() == before


def test_the_legend_tells_memories_apart_with_their_last_loss():
    steps = [{"step": i, "loss": 3.0, "learning_rate": 1e-4} for i in range(1, 41)]
    validations = [
        {"step": i, "validation": {"fetched": 2 + 1 / i, "none": 3.0, "generic": 2.5, "wrong": 4}}
        for i in (10, 20, 40)
    ]
    figure, top, bottom = draws(steps=steps, validations=validations)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "training", "training, smoothed: 3.000", "validation, none: 3.000",
        "validation, generic: 2.500", "validation, fetched: 2.025", "validation, wrong: 4.000",
    ]  # fmt: skip
    lines = {line.get_label(): line for line in top.get_lines()}
    chosen = [lines[label] for label in labels[2:]]
    for looks in ("get_color", "get_marker", "get_linestyle"):
        assert len({getattr(line, looks)() for line in chosen}) == 4
    assert list(lines["validation, fetched: 2.025"].get_xdata()) == [10, 20, 40]
    assert bottom.get_ylabel() == "learning rate" and bottom.get_xlabel() == "step"


@pytest.mark.parametrize("losses", [[], [2.5], [None], [None, 3.0, None], [2.0] * 50, [-1.0, 0.0]])
def test_logs_of_any_kind_can_be_drawn(losses):
    steps = [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    _, top, bottom = draws(steps=steps)
    assert top.get_yscale() == "linear"
    ticks = [tick for tick in bottom.get_xticks() if tick == int(tick)]
    assert ticks == list(bottom.get_xticks())
    assert bool(top.texts) == (not any(loss is not None for loss in losses))


def test_validation_alone_can_be_drawn():
    figure, top, _ = draws(validations=[{"step": 5, "validation": {"none": 1.5, "fetched": None}}])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "validation, none: 1.500"
    ]
    low, high = top.get_xlim()
    assert low < 5 < high


def test_the_axis_is_logarithmic_where_the_loss_falls_far():
    steps = [{"step": i, "loss": 10 / i} for i in range(1, 20)]
    assert draws(steps=steps)[1].get_yscale() == "log"
    steps = [{"step": i, "loss": 10 - i / 10} for i in range(1, 20)]
    assert draws(steps=steps)[1].get_yscale() == "linear"


def test_a_long_log_is_thinned_but_shows_its_range():
    rng = np.random.default_rng(0)
    losses = 3 + rng.random(100_000)
    losses[50_000] = np.nan
    steps = [
        {"step": i + 1, "loss": None if np.isnan(loss) else loss, "learning_rate": 1e-3}
        for i, loss in enumerate(losses.tolist())
    ]
    _, top, bottom = draws(steps=steps)
    for line in (*top.get_lines(), *bottom.get_lines()):
        assert len(line.get_xdata()) <= 1000
    band = top.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == np.nanmin(losses) and band[:, 1].max() == np.nanmax(losses)
    smooth = top.get_lines()[0].get_ydata()
    assert abs(smooth[-1] - 3.5) < 0.05


def test_a_bucket_without_a_number_is_a_gap():
    y = np.ones(5000)
    y[:100] = np.nan
    x, mean, low, high = picture._buckets(np.arange(5000.0), y)
    assert len(x) == len(mean) == 1000
    assert np.isnan(mean[:20]).all() and np.isnan(low[:20]).all() and np.isnan(high[:20]).all()
    assert (mean[20:] == 1).all() and (np.diff(x) > 0).all()
