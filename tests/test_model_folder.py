"""Model folders that replace others, and what a killed process leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.folders import Originals, model_folder


def model(path: Path, text: str = "old") -> Path:
    path.mkdir()
    (path / "config.json").write_text(text)
    return path


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_another_takes_its_place(tmp_path):
    out = model(tmp_path / "m")
    (out / "more").write_text("old")
    with model_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (out / "config.json").read_text() == "old"  # until all is written
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == "new"
    assert hidden(tmp_path) == []


def test_it_stays_where_writing_fails(tmp_path):
    out = model(tmp_path / "m")
    with pytest.raises(ValueError), model_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        raise ValueError
    assert (out / "config.json").read_text() == "old"
    assert hidden(tmp_path) == []


def test_only_models_are_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(model(tmp_path / "m"))
    for name, words in (("photos", "something else"), ("file", "no folder"), ("link", "no folder")):
        with pytest.raises(InputError, match=words), model_folder(tmp_path / name, overwrite=True):
            pass
    with pytest.raises(InputError, match="exists already"), model_folder(tmp_path / "m"):
        pass
    (tmp_path / "empty").mkdir()
    with model_folder(tmp_path / "empty", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_kill_between_both_renames_loses_nothing(tmp_path):
    """The old folder lies aside, under its hidden name, and none has the name itself."""
    out = model(tmp_path / ".m.old")
    with pytest.raises(InputError, match="exists already"), model_folder(tmp_path / "m"):
        pass
    assert (tmp_path / "m" / "config.json").read_text() == "old"
    assert not out.exists()


def test_a_kill_after_both_renames_leaves_nothing(tmp_path):
    model(tmp_path / ".m.old", "older")
    model(tmp_path / "m")
    with model_folder(tmp_path / "m", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("wanted", [True, False])
def test_what_a_kill_has_left(tmp_path, wanted):
    """It is gone on with only where the caller says so."""
    left = model(tmp_path / ".m.partial", "half")
    seen = []

    def keep(folder: Path) -> bool:
        seen.append(sorted(path.name for path in folder.iterdir()))
        return wanted

    with model_folder(tmp_path / "m", keep=keep) as folder:
        assert (folder / "config.json").exists() == wanted
        (folder / "config.json").write_text("whole")
    assert seen == [["config.json"]]
    assert not left.exists()


@pytest.mark.parametrize("keeps", [True, False])
def test_an_interrupt_leaves_it_for_the_next_one(tmp_path, keeps):
    options = {"keep": lambda folder: True} if keeps else {}
    with pytest.raises(KeyboardInterrupt), model_folder(tmp_path / "m", **options) as folder:
        (folder / "one").write_text("x")
        raise KeyboardInterrupt
    assert hidden(tmp_path) == ([".m.partial"] if keeps else [])


def test_an_error_leaves_nothing_even_so(tmp_path):
    with pytest.raises(FormatError), model_folder(tmp_path / "a" / "m", keep=lambda f: True) as out:
        (out / "one").write_text("x")
        raise FormatError("bad input")
    assert os.listdir(tmp_path) == []


# ---- files that are copied later ---------------------------------------------------------


def test_originals_are_copied_as_they_are(tmp_path):
    (tmp_path / "from" / "below").mkdir(parents=True)
    for name in ("a", "below/b"):
        (tmp_path / "from" / name).write_text(name)
    originals = Originals(tmp_path / "from", ["a", "below/b"])
    counts = []
    for name in originals.names:
        originals.copy(name, tmp_path / "to", counts.append)
        assert (tmp_path / "to" / name).read_text() == name
    assert sum(counts) == originals.bytes == 8


def test_originals_that_are_others_now_are_refused(tmp_path):
    path = tmp_path / "a"

    def copy(change, told):
        path.write_text("as it was")
        originals = Originals(tmp_path, ["a"])
        change()
        with pytest.raises(FormatError, match=told):
            originals.copy("a", tmp_path / "to")
        assert not (tmp_path / "to").exists()

    copy(lambda: os.truncate(path, 3), "a: was changed while it was used")
    copy(lambda: os.utime(path, ns=(0, 0)), "was changed while it was used")
    copy(path.unlink, "a: cannot be read .No such file")
    with pytest.raises(FormatError, match="a: cannot be read .No such file"):
        Originals(tmp_path, ["a"])


def test_an_original_that_changes_while_it_is_copied(tmp_path):
    (tmp_path / "a").write_text("as it was")
    originals = Originals(tmp_path, ["a"])
    with pytest.raises(FormatError, match="was changed while it was used"):
        originals.copy("a", tmp_path / "to", lambda _: os.truncate(tmp_path / "a", 3))
