"""Conversions that are killed, interrupted, or have no room: what is left, and what goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mlx_hiermem.bank.manifest import FileEntry
from mlx_hiermem.cli import main
from mlx_hiermem.convert import run
from mlx_hiermem.convert.resume import JOURNAL, Journal
from mlx_hiermem.files import AtomicFile
from tests.convert.checkpoints import Written, make_numbers, memory_state, write_stacked
from tests.init.fresh import save_llama
from tests.tiny import make_tiny_model

ENCODER = json.dumps({"type": "bert", "model": "somewhere"})


@pytest.fixture
def where(tmp_path) -> Written:
    return write_stacked(make_numbers(branching=4, ranks=(4, 2, 1)), tmp_path / "from")


def words(where: Written, out: Path, *more: str) -> list[str]:
    return ["convert", *where.arguments(), "--encoder", ENCODER, "--mlx-path", str(out), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


#: Runs the command, and kills itself with SIGKILL when it is about to rename the file of that
#: number.
KILLED = """
import os, sys
from mlx_hiermem.files import AtomicFile
from mlx_hiermem.cli import main

count, real = int(sys.argv[1]), os.replace
def replace(source, target):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), 9)
    real(source, target)

os.replace = replace
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("files", [1, 5, 12, 16])
def test_a_killed_conversion_goes_on(where, tmp_path, capsys, files):
    """Nothing has its name before all is done; the result is what one run writes, to the byte."""
    assert main(words(where, tmp_path / "whole")) == 0
    out = tmp_path / "m"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(files), *words(where, out)])
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / ".m.partial" / JOURNAL).exists() == (files > 0)
    capsys.readouterr()
    assert main(words(where, out, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["resumed"] > 0) == (files > 4)
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / ".m.partial").exists()


def test_finished_files_are_not_written_again(where, tmp_path, monkeypatch):
    out = tmp_path / "m"
    subprocess.run([sys.executable, "-c", KILLED, "12", *words(where, out)])
    written: list[str] = []
    real = AtomicFile.__enter__

    def enter(file):
        written.append(file.path.relative_to(tmp_path / ".m.partial").as_posix())
        return real(file)

    monkeypatch.setattr(AtomicFile, "__enter__", enter)
    journal = [
        json.loads(line)
        for line in (tmp_path / ".m.partial" / JOURNAL).read_text().splitlines()[1:]
    ]
    done = {line["file"] for line in journal}
    assert len(done) > 1  # files are noted after they are written, maybe some later
    assert main(words(where, out)) == 0
    assert not done & set(written)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "change",
    [
        "nothing", "damage", "options", "source", "key map", "model config", "memory config",
        "memory config beside", "tokenizer",
    ],
)  # fmt: skip
def test_another_conversion_begins_anew(tmp_path, capsys, change):
    """Other options, a file that is read and has changed, or a finished file that has been cut."""
    # As many rows as columns: no shape tells which of two names or directions is meant.
    numbers = make_numbers(branching=4, ranks=(16, 16, 16))
    where = write_stacked(numbers, tmp_path / "from", generic="by level")
    out, key_map, tokenizer = tmp_path / "m", tmp_path / "map.json", tmp_path / "tokenizer"
    key_map.write_text("{}")
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    more = ["--key-map", str(key_map), "--tokenizer", str(tokenizer)]

    def arguments(out: Path) -> list[str]:
        found = words(where, out, *more)
        if change == "memory config beside":
            at = found.index("--memory-config")
            del found[at : at + 2]
        return found

    subprocess.run([sys.executable, "-c", KILLED, "12", *arguments(out)])
    if change == "options":
        more += ["--dtype", "bfloat16"]
    elif change == "source":
        os.utime(where.model)
    elif change == "key map":
        edit(key_map, **{r"(memory\..*)\.w1": r"\1.w2", r"(memory\..*)\.w2": r"\1.w1"})
    elif change == "model config":
        edit(where.model_config, norm_eps=0.5)
    elif change.startswith("memory config"):
        edit(where.memory_config, transposed=["w3"])
    elif change == "tokenizer":
        edit(tokenizer / "tokenizer.json", version="1.0")
    elif change == "damage":
        path = tmp_path / ".m.partial" / "memory" / "level-1-00000-of-00001.safetensors"
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - 1)
    capsys.readouterr()
    assert main([*arguments(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["resumed"] > 0) == (change in ("nothing", "damage"))
    assert main(arguments(tmp_path / "whole")) == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", [False, True])
def test_an_anchor_of_hugging_face_that_has_changed(tmp_path, capsys, monkeypatch, change):
    """It is no source that is open: mlx-lm reads it, and only when it is written."""
    llama = save_llama(tmp_path / "llama", make_tiny_model(tmp_path / "tiny"))
    arguments = ["convert", "--model", str(llama), "--mlx-path"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "model_card", interrupt)  # when all else is written
        assert main([*arguments, str(tmp_path / "m")]) == 130
    assert (tmp_path / ".m.partial" / "config.json").exists()
    if change:
        weights = load_file(llama / "model.safetensors")
        weights["model.norm.weight"] += 1
        save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "m"), "--json"]) == 0
    assert (json.loads(capsys.readouterr().out)["resumed"] > 0) == (not change)
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


def test_a_journal_that_a_kill_has_cut(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    journal = Journal(folder, "job")
    journal.open()
    for name in ("a", "b"):
        with AtomicFile(folder, name) as file:
            file.write(b"xyz")
        journal.add(name, FileEntry(3, file.sha256), "note")
    path = folder / JOURNAL
    path.write_bytes(path.read_bytes()[:-10])
    again = Journal(folder, "job")
    again.open()
    assert set(again.done) == {"a"}
    again.add("b", FileEntry(3, ""))
    last = Journal(folder, "job")
    last.open()
    assert set(last.done) == {"a", "b"} and last.bytes_done == 6
    assert Journal.fits(folder, "job") and not Journal.fits(folder, "other")
    path.write_bytes(b"\xff\xfe[]\n")
    assert not Journal.fits(folder, "job")


def test_an_interrupt_leaves_what_is_done(where, tmp_path):
    """Ctrl-C: exit code 130, no model folder, and the next run goes on."""
    out = tmp_path / "m"
    slow = KILLED.replace("os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 2)")
    found = subprocess.run(
        [sys.executable, "-c", slow, "12", *words(where, out)], capture_output=True, text=True
    )
    assert found.returncode == 130
    assert not out.exists() and (tmp_path / ".m.partial").exists()
    assert main(words(where, out)) == 0


def test_bad_input_leaves_nothing(tmp_path):
    numbers = make_numbers()
    numbers.blocks[2]["w2"][8, 1, 1, 3] = float("nan")
    where = write_stacked(numbers, tmp_path / "from")
    assert main(words(where, tmp_path / "m")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_not_enough_space(where, tmp_path, monkeypatch, capsys):
    """Said before the start; nothing is left."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    assert main(words(where, tmp_path / "m")) == 2
    err = capsys.readouterr().err
    assert "10,000 bytes are free" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_a_disk_that_fills_up(where, tmp_path, monkeypatch, capsys):
    """Somebody else takes the space meanwhile."""
    real = AtomicFile.write

    def write(file, data):
        if "level-3" in file.path.name:
            raise file._failed(OSError(28, "No space left on device"))
        real(file, data)

    monkeypatch.setattr(AtomicFile, "write", write)
    assert main(words(where, tmp_path / "m")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_two_at_once(where, tmp_path, capsys, monkeypatch):
    out = tmp_path / "m"
    waits = KILLED.replace("os.kill(os.getpid(), 9)", "import time; time.sleep(60)")
    first = subprocess.Popen([sys.executable, "-c", waits, "9", *words(where, out)])
    try:
        while not (tmp_path / ".m.partial" / "memory").exists():
            time.sleep(0.05)
        assert main(words(where, out)) == 2
        assert "another process is writing it" in capsys.readouterr().err
    finally:
        first.kill()
        first.wait()
    assert main(words(where, out)) == 0


def test_verify_that_finds_a_difference_leaves_nothing(where, tmp_path, monkeypatch, capsys):
    from mlx_hiermem.convert.bank import rows

    real = rows.BlockRows.matrices

    def wrong(self, level, cluster):
        return real(self, level, None if cluster is None else (cluster + 1) % 4)

    monkeypatch.setattr(rows.BlockRows, "matrices", wrong)
    assert main(words(where, tmp_path / "m", "--verify")) == 2
    assert "more than rounding explains" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_verify_without_torch_is_refused_before_anything_is_written(
    where, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(Journal, "open", None)
    assert main(words(where, tmp_path / "m", "--verify")) == 2
    assert "needs PyTorch, which is not installed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_more_files_than_the_system_allows_at_first(tmp_path):
    """A bank in more than a hundred files, where 64 may be open until the command asks for more."""
    numbers = make_numbers(branching=4, ranks=(4, 2))
    bank = tmp_path / "bank"
    bank.mkdir()
    for number, (name, tensor) in enumerate(memory_state(numbers, "per_cluster").items()):
        save_file({name: tensor}, bank / f"{number:03}.safetensors")
    assert len(list(bank.iterdir())) > 100
    where = write_stacked(numbers, tmp_path / "from", together=False)
    code = "import resource, sys; from mlx_hiermem.cli import main\n"
    code += "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
    code += "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)); sys.exit(main(sys.argv[1:]))"
    arguments = words(where, tmp_path / "m")
    arguments[arguments.index("--bank") + 1] = str(bank)
    assert subprocess.run([sys.executable, "-c", code, *arguments]).returncode == 0
