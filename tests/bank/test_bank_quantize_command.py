"""``mlx_hiermem bank quantize`` and what the model that it writes can do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_hiermem import cli, load
from mlx_hiermem.evaluation.facts import Question, write_questions
from tests.corpus.corpora import files_of
from tests.tiny import make_tiny_model, random_texts
from tests.training.runs import make_place, train
from tests.training.test_merge import write_results

PROMPT = "what is the capital?"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model of width 16, with questions, a card and a file that is nobody's."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    lm = load(folder)
    questions = []
    for i, prompt in enumerate(random_texts(6, seed=8)):
        text = lm.generate(prompt, "fetched", 4) if i < 3 else " 72."
        leaf = lm.route(prompt).ids[-1]
        questions.append(Question(prompt, text, text, "x", 5, i % 2, [leaf]))
    (folder / "evaluation").mkdir()
    write_questions(folder / "evaluation" / "facts.jsonl.gz", questions, ["often", "rare"])
    (folder / "README.md").write_text("the card of the whole bank")
    (folder / "LICENSE").write_text("as you like")
    (folder / ".hidden").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "file").write_text("x")
    return folder


def quantize(source: Path, out: Path, *options: str) -> int:
    return cli.main(["bank", "quantize", "--model", str(source), "--mlx-path", str(out), *options])


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    assert quantize(model, out) == 0
    return out


@pytest.fixture
def refused(capsys, tmp_path):
    """See that quantising ends with one line that holds ``text``, and leaves nothing behind."""

    def check(source: Path, text: str, *options: str, out: Path | None = None) -> None:
        out = out or tmp_path / "new" / "out"
        before = files_of(tmp_path)
        capsys.readouterr()
        assert quantize(source, out, *options) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("mlx_hiermem: error: ") and captured.err.count("\n") == 1
        assert text in captured.err
        assert files_of(tmp_path) == before
        assert not (tmp_path / "new").exists()

    return check


# ---- what is written -------------------------------------------------------------------


def test_the_folder_is_the_model_with_another_bank(model, packed):
    before, after = files_of(model), files_of(packed)
    names = {name for name in before if not name.startswith(".")}
    assert set(after) == names
    changed = {name for name in names if before[name] != after[name]}
    assert changed == {
        "README.md", "memory/config.json", "memory/manifest.json", "memory/generic.safetensors",
        "memory/checksums.safetensors", *(name for name in names if "level-" in name),
    }  # fmt: skip
    card = after["README.md"].decode()
    assert card.startswith("---\nlibrary_name: mlx") and "quantised (nvfp4/16)" in card
    assert list(packed.parent.iterdir()) == [packed]


def test_the_report_for_people_and_for_machines(model, tmp_path, capsys):
    assert quantize(model, tmp_path / "one", "--q-bits", "4", "--q-mode", "nvfp4", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == [
        "folder", "quantization", "revision", "bytes_before", "bytes", "error"
    ]  # fmt: skip
    assert report["folder"] == str(tmp_path / "one")
    assert report["quantization"] == {"bits": 4, "group_size": 16, "mode": "nvfp4"}
    rows = 2 * 3 * (3 * 4 + 9 * 2)  # layers, M1 to M3, clusters of each level by rank
    assert report["bytes_before"] == rows * 16 * 4
    assert report["bytes"] == rows * (8 + 1)
    assert 0.02 < report["error"] < 0.2
    assert quantize(model, tmp_path / "two") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{tmp_path / 'two'}\n")
    assert "nvfp4/16" in text and "1,620 (7.11 times smaller than 11,520)" in text
    assert f"{100 * report['error']:.2f} %" in text and report["revision"][:12] in text


def test_generate_evaluate_and_verify_run_on_it(model, packed, tmp_path, capsys):
    def run(*arguments: str) -> dict:
        assert cli.main([*arguments, "--model", str(packed), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    answer = run("generate", "--prompt", PROMPT, "--max-tokens", "8")
    assert [block["bytes"] for block in answer["fetch"]["blocks"]] == [6 * 4 * 9, 6 * 2 * 9]
    other = "0,0" if answer["path"][0] else "2,8"
    with_path = run("generate", "--prompt", PROMPT, "--max-tokens", "8", "--path", other)
    without = run("generate", "--prompt", PROMPT, "--max-tokens", "8", "--memory", "none")
    assert len({one["text"] for one in (answer, with_path, without)}) == 3
    facts = run("evaluate", "--task", "facts")
    assert facts["n"] == [3, 3] and facts["none"] == facts["blocked"] == [0, 0]
    text = tmp_path / "text.txt"
    text.write_text("one two three\n\nfour five\n")
    perplexity = run("evaluate", "--task", "perplexity", "--text", str(text))
    assert len({perplexity[memory] for memory in ("none", "generic", "fetched")}) == 3
    assert run("bank", "inspect")["quantization"]["mode"] == "nvfp4"
    assert run("bank", "verify")["files"]


def test_the_model_computes_from_the_unpacked_numbers(model, packed):
    exact, again = load(model), load(packed)
    path = exact.route(PROMPT).ids
    assert again.route(PROMPT).ids == path
    ours, theirs = (np.array(lm.fetch(path).memory) for lm in (exact, again))
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(ours**2))
    assert 0.02 < error < 0.2
    for lm in (exact, again):
        lm.bank.close()


def test_a_folder_inside_of_the_model_it_is_made_from(tmp_path):
    source = make_tiny_model(tmp_path / "model")
    before = files_of(source)
    assert quantize(source, source / "packed") == 0
    packed = files_of(source / "packed")
    assert not any(name.startswith(("packed", ".packed")) for name in packed)
    after = files_of(source)
    assert {name: after[name] for name in before} == before
    assert quantize(source / "packed", tmp_path / "again") == 2


def test_blocked_blocks_stay_blocked(tmp_path, capsys):
    from mlx_hiermem.bank.manifest import write_manifest

    source = make_tiny_model(tmp_path / "model")
    (source / "memory" / "blocked.json").write_text('{"blocked": [[1, 2]]}')
    write_manifest(source / "memory")
    assert quantize(source, tmp_path / "packed") == 0
    lm = load(tmp_path / "packed")
    assert lm.bank.blocked == {(1, 2)}
    lm.bank.close()


# ---- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, text",
    [
        (["--q-bits", "8"], "a multiple of 16 numbers fit no group size of any mode with 8 bits"),
        (["--q-bits", "7"], "bits is '7'; affine has 2, 3, 4, 5, 6, 8"),
        (["--q-bits", "-4"], "bits is '-4'; affine has"),
        (["--q-mode", "mxfp4"], "fit no group size of mxfp4 with 4 bits"),
        (["--q-mode", "affine", "--q-group-size", "64"], "do not divide by group size 64"),
        (["--q-group-size", "17"], "group_size is '17'; affine has 32, 64, 128"),
        (["--q-group-size", "0"], "group_size is '0'"),
    ],
)
def test_what_does_not_fit_is_one_line(model, refused, options, text):
    refused(model, text, *options)


def test_bad_folders_are_one_line(model, packed, refused, tmp_path):
    refused(packed, "is quantised already (nvfp4/16); quantise the bank that it was made from")
    refused(tmp_path / "nowhere", "nowhere: no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty")
    (tmp_path / "there").mkdir()
    refused(model, "there: exists already", out=tmp_path / "there")
    (tmp_path / "file").write_text("x")
    refused(model, "file: exists already", out=tmp_path / "file")
    refused(model, "cannot be written", out=tmp_path / "file" / "out")


def test_numbers_and_modes_of_the_command_line(model, tmp_path, capsys):
    for options in (["--q-bits", "four"], ["--q-mode", "int4"], ["--q-group-size", "x"]):
        with pytest.raises(SystemExit) as error:
            quantize(model, tmp_path / "out", *options)
        assert error.value.code == 2
    with pytest.raises(SystemExit):
        cli.main(["bank", "quantize", "--model", str(model)])  # the folder is missing
    assert not any(tmp_path.iterdir())


def test_an_altered_bank_is_refused(tmp_path, refused):
    source = make_tiny_model(tmp_path / "model")
    path = source / "memory" / "level-2-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(source, "block 8 of level 2 was altered")


@pytest.mark.parametrize("what", ["gone", "shorter"])
def test_a_model_that_changes_meanwhile_is_not_copied(tmp_path, refused, monkeypatch, what):
    """Once it was copied without a word as far as it was there."""
    from mlx_hiermem.bank import quantize as module

    source = make_tiny_model(tmp_path.parent / f"{tmp_path.name}-{what}")
    real = module.quantize_bank

    def meanwhile(*given):
        found = real(*given)
        if what == "gone":
            source.rename(f"{source}-away")
        else:
            os.truncate(source / "model.safetensors", 1000)
        return found

    monkeypatch.setattr(module, "quantize_bank", meanwhile)
    refused(source, "cannot be read" if what == "gone" else "was changed while it was used")


# ---- when it is killed -----------------------------------------------------------------

_KILLED = """
import os, signal, sys
from mlx_hiermem import cli, files
from mlx_hiermem.bank import quantize

last = int(sys.argv.pop(1))
write, calls = files.AtomicFile.write, 0

def killed(file, data):
    global calls
    calls += 1
    write(file, bytes(data)[: len(bytes(data)) // 2] if calls == last else data)
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)

files.AtomicFile.write = killed
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("last", [4, 12])
def test_a_killed_process_leaves_no_model_and_the_next_one_works(model, packed, tmp_path, last):
    """Killed in the midst of a level file, and when the bank was whole but the model was not."""
    out = tmp_path / "out"
    arguments = ["bank", "quantize", "--model", str(model), "--mlx-path", str(out)]
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(last), *arguments], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    left = {name for name in files_of(tmp_path) if "level-2-00002" in name or "manifest" in name}
    assert bool(left) == (last == 12)
    assert quantize(model, out) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files_of(out) == files_of(packed)


# ---- training --------------------------------------------------------------------------


def test_training_and_merging_ask_for_the_bank_it_was_made_from(tmp_path, capsys):
    place = make_place(tmp_path / "place")
    assert quantize(place / "model", tmp_path / "packed") == 0
    before = files_of(tmp_path / "packed")

    def told(code: int) -> str:
        captured = capsys.readouterr()
        assert code == 2 and captured.out == ""
        lines = [line for line in captured.err.splitlines() if "error: " in line]
        assert len(lines) == 1 and "Traceback" not in captured.err
        return lines[0]

    capsys.readouterr()
    line = told(train(place, tmp_path / "run", model=tmp_path / "packed"))
    assert "packed/memory: the bank is quantised" in line
    runs = write_results(place / "model", tmp_path / "results")
    arguments = ["merge", *map(str, runs), "--model", str(place / "model")]
    arguments += ["--generic", str(tmp_path / "packed"), "--mlx-path", str(tmp_path / "merged")]
    line = told(cli.main(arguments))
    assert "packed/memory: the bank is quantised" in line
    assert not (tmp_path / "merged").exists() and not (tmp_path / "run" / "model").exists()
    assert files_of(tmp_path / "packed") == before
    # A bank of its own may be trained on the same anchor.
    fresh = {"model": tmp_path / "packed", "fresh_memory": True, "iters": 2, "save_every": 2}
    assert train(place, tmp_path / "fresh", **fresh) == 0
