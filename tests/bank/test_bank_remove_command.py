"""``bank remove`` on the command line: it asks, blanks names, and the other commands know."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_hiermem import cli, load
from mlx_hiermem.bank import journal
from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.remove import remove
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.routing.names import ClusterNames
from tests.tiny import make_tiny_model, random_texts

ROOT = Path(__file__).parents[2]
SUBTREE = [[1, 1], [2, 3], [2, 4], [2, 5]]


@pytest.fixture
def model(tmp_path):
    """A tiny model whose clusters are called a0, a1, ... and b0, b1, ..."""
    folder = make_tiny_model(tmp_path / "tiny")
    names = ClusterNames([[f"a{i}" for i in range(3)], [f"b{i}" for i in range(9)]])
    with BankEdit(folder / "memory") as edit:
        edit.set_names(names.to_bytes())
    return folder


@pytest.fixture
def run(model, capsys):
    """The command on the model: exit code, output, errors."""

    def command(*arguments, action="remove"):
        code = cli.main(["bank", action, *arguments, "--model", str(model)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def _files(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "memory").iterdir())
    }


def test_a_subtree_goes_with_its_names(model, run):
    code, out, err = run("--subtree", "1", "--yes", "--json")
    report = json.loads(out)
    assert code == 0 and not err
    assert report["blocks"] == report["removed"] == SUBTREE and report["names_changed"]
    names = ClusterNames.load(model / "memory")
    assert names.levels == (
        ("a0", "cluster 1", "a2"),
        ("b0", "b1", "b2", "cluster 3", "cluster 4", "cluster 5", "b6", "b7", "b8"),
    )
    with MemoryBank.open(model / "memory", check_blocks=True) as bank:
        bank.verify()
        assert bank.revision == report["revision"] != report["revision_before"]


def test_a_block_goes_alone(model, run):
    code, out, _ = run("--block", "1:1", "2:8", "--yes")
    assert code == 0
    assert "2 blocks (1 of level 1, 1 of level 2; " in out and "names of these" in out
    assert "evaluate --task leakage" in out
    names = ClusterNames.load(model / "memory")
    assert (
        names.of(1, 1) == "cluster 1" and names.of(2, 3) == "b3" and names.of(2, 8) == "cluster 8"
    )


def test_a_bank_without_names_stays_without(tmp_path, capsys):
    folder = make_tiny_model(tmp_path / "tiny")
    assert (
        cli.main(["bank", "remove", "--bank", str(folder / "memory"), "--block", "1:1", "--yes"])
        == 0
    )
    assert "names of these" not in capsys.readouterr().out
    assert not (folder / "memory" / "names.json").exists()


def test_answers_are_those_with_the_blocks_blocked(model, run):
    texts = random_texts(12, seed=4)
    lm = load(model)
    for pair in SUBTREE:
        lm.bank.block(*pair)
    expected = [(lm.generate(text, max_tokens=4), lm.score(text, "72")) for text in texts]
    assert len({lm.route(text).ids[0] for text in texts}) == 3
    assert run("--subtree", "1", "--yes")[0] == 0
    again = load(model)
    assert [(again.generate(t, max_tokens=4), again.score(t, "72")) for t in texts] == expected


def test_others_tell_what_is_gone(model, run):
    run("--subtree", "1", "--yes")
    _, out, _ = run(action="inspect")
    assert "removed (level:cluster): 1:1, 2:3, 2:4, 2:5" in out and "removed " in out.split("\n")[2]
    rows = json.loads(run("--json", action="inspect")[1])["levels"]
    assert [row["removed"] for row in rows] == [1, 3]
    files = _files(model)
    for action in ("unblock", "block"):
        code, out, err = run("2:4", action=action)
        assert code == 2 and not out and err.count("\n") == 1
        assert "block 4 of level 2 was removed: its numbers are gone" in err
    assert _files(model) == files
    assert run("2:6", action="block")[0] == 0
    with MemoryBank.open(model / "memory") as bank:
        assert bank.blocked == {(2, 6)} and len(bank.removed) == 4


def test_a_bank_without_removed_blocks_is_told_as_before(run):
    _, out, _ = run(action="inspect")
    assert "removed" not in out.split("\n", 1)[1]  # the first line has the folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subtree", "1"], "4 blocks (1 of level 1, 3 of level 2; 3.8 kB) of"),
        (["--block", "3:0", "--yes"], "level '3' has no memory"),
        (["--subtree", "3", "--yes"], "cluster '3' of level 1 does not exist"),
        (["--block", "x", "--yes"], "expected LEVEL:CLUSTER"),
        (["--bank", "x", "--block", "1:1", "--yes"], "either --model FOLDER or --bank FOLDER"),
        (["--yes"], "one of the arguments --block --subtree is required"),
        (["--block", "1:1", "--subtree", "1", "--yes"], "not allowed with"),
    ],
)
def test_what_is_refused_changes_nothing(model, run, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # no terminal
    files = _files(model)
    try:
        code, out, err = run(*arguments)
        assert code == 2 and not out and err.count("\n") == 1 and message in err
    except SystemExit as error:  # of argparse
        assert error.code == 2
    assert _files(model) == files


def _on_a_terminal(model, answer, *arguments):
    """Run the command on a terminal of its own, and type an answer."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mlx_hiermem", "bank", "remove", "--model", str(model)]
    os.write(ours, answer.encode())
    process = subprocess.run(
        [*command, *arguments], stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, timeout=120,
    )  # fmt: skip
    os.close(theirs)
    told = b""
    try:
        while more := os.read(ours, 1 << 16):
            told += more
    except OSError:  # all was read, and nobody holds the other end
        pass
    os.close(ours)
    return process.returncode, told.decode()


def test_it_asks_on_a_terminal(model):
    files = _files(model)
    code, told = _on_a_terminal(model, "\n", "--block", "2:4")
    assert code == 2 and "Remove 1 block (1 of level 2; " in told and "for good? [y/N]" in told
    assert "nothing was removed" in told and _files(model) == files
    code, _ = _on_a_terminal(model, "y\n", "--block", "2:4")
    assert code == 0
    with MemoryBank.open(model / "memory") as bank:
        assert bank.removed == {(2, 4)}


def test_the_same_command_brings_a_stopped_removal_to_its_end(model, run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "_overwrite", stop)
    with pytest.raises(KeyboardInterrupt):
        remove(model / "memory", [(2, 4)])
    monkeypatch.undo()
    assert "a removal was stopped before" in run(action="inspect")[1]
    code, _, err = run("--block", "2:4", "--yes")
    assert code == 2 and "removed already; what a removal that was stopped had left is over" in err
    assert "a removal was stopped" not in run(action="inspect")[1]


def test_a_bank_in_the_middle_of_an_edit_is_whole_and_is_not_copied(
    model, run, monkeypatch, tmp_path, capsys
):
    """Its new files count, whatever their names; who takes files by their names is told to wait."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "_overwrite", stop)
    assert run("--subtree", "1", "--yes")[0] == 130
    monkeypatch.undo()
    files = _files(model)
    code, out, err = run("--json", action="verify")
    assert code == 0, err
    assert {"file": "blocked.json", "ok": True}.items() <= json.loads(out)["files"][0].items()
    with MemoryBank.open(model / "memory") as bank:
        names = ClusterNames.load(bank.folder, bank.file_name("names.json"))
        assert names.of(1, 1) == "cluster 1" and bank.file_name("names.json") != "names.json"
    out, made = str(tmp_path / "out"), ["--config", "4,2", "--mlx-path", str(tmp_path / "out")]
    init = ["init", "--model", str(model), "--tree", str(model), "--fresh-memory", *made]
    push = ["bank", "push", "--model", str(model), "--hf-path", "a/b", "--dry-run"]
    for words, told in ((push, "left when writing was interrupted"), (init, "make it again")):
        capsys.readouterr()
        assert cli.main(words) == 2 and told in capsys.readouterr().err
    assert _files(model) == files and not Path(out).exists()
    run("--subtree", "1", "--yes")
    assert cli.main(init) == 0
