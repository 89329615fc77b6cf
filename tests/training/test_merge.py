"""Merging subtree results: the bank of one job, every refusal, and nothing left half done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlx_hiermem
from mlx_hiermem import cli
from mlx_hiermem.anchors import load_anchor
from mlx_hiermem.bank import layout
from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import FormatError, HierMemError, InputError, TrainingError
from mlx_hiermem.folders import anchor_files, is_weights, model_folder
from mlx_hiermem.memories import GENERIC, start_block
from mlx_hiermem.training.fingerprints import anchor_sha256, tree_sha256
from mlx_hiermem.training.merge import merge
from mlx_hiermem.training.subtree import FILE, write_subtree
from tests.tiny import make_tiny_model, write_tiny_anchor

SETTINGS = {"regime": "frozen", "iters": 10, "learning_rate": 1e-4, "seed": 5}


def write_results(model: Path, folder: Path, **facts) -> list[Path]:
    """The results that jobs of the subtrees of ``model``'s bank would have written."""
    reader = BlockReader(model / "memory")
    config, k = reader.config, reader.config.branching
    facts = {
        "anchor_sha256": anchor_sha256(load_anchor(model)[0]),
        "tree_sha256": tree_sha256(model / "memory"),
        "corpus_revision": "c" * 64,
        "settings": SETTINGS,
        **facts,
    }
    runs = []
    for subtree in range(k):

        def rows(level: int, subtree: int = subtree):
            width = k ** (level - 1)
            for cluster in range(subtree * width, (subtree + 1) * width):
                yield reader.stored(level, cluster)[None]

        run = folder / f"run-{subtree}" / "subtree"
        write_subtree(run, config, subtree, rows, **facts)
        shutil.copytree(model / "memory", run / "routing", ignore=_bank_files)
        runs.append(run.parent)
    reader.close()
    return runs


def _bank_files(_: str, names: list[str]) -> set[str]:
    keep = {"tree.safetensors", "encoder.safetensors"}
    return set(names) - keep


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model with a bank of three levels of which the second has no memory."""
    return make_tiny_model(tmp_path_factory.mktemp("source") / "model", ranks=(4, 0, 2))


@pytest.fixture(scope="module")
def ready(source, tmp_path_factory) -> list[Path]:
    return write_results(source, tmp_path_factory.mktemp("ready"))


@pytest.fixture
def runs(ready, tmp_path) -> list[Path]:
    """Results that a test may spoil."""
    return [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in ready]


def edit(run: Path, **changes) -> None:
    path = run / "subtree" / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("ranks", [(4, 2), (4, 0, 2), (0, 2), (3,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_bank_is_that_of_one_job(tmp_path, ranks, dtype):
    model = make_tiny_model(tmp_path / "model", ranks=ranks, dtype=dtype)
    runs = write_results(model, tmp_path)
    report = merge(runs[::-1], model, tmp_path / "out", generic=model)
    merged, whole = contents(tmp_path / "out" / "memory"), contents(model / "memory")
    assert merged == whole  # levels, generic memory, tree, encoder, config and manifest
    assert report.revision == json.loads(whole["manifest.json"])["revision"]
    levels = [name for name in whole if name.startswith("level-")]
    assert report.files == len(levels) and report.bytes == sum(len(whole[name]) for name in levels)
    assert report.linked == len([name for name in levels if not name.startswith("level-1-")])
    assert report.subtrees == [str(run / "subtree") for run in runs]


def test_several_shards_of_a_subtree_and_of_level_1(tmp_path, monkeypatch):
    model = make_tiny_model(tmp_path / "model", ranks=(4, 2, 2))
    config = MemoryConfig.load(model / "memory" / "config.json")
    reader = BlockReader(model / "memory")
    rows = {
        level: np.concatenate([reader.stored_shard(level, i) for i in range(len(parts))])
        for level in (1, 2, 3)
        if (parts := reader.shards(level))
    }
    generic = np.concatenate([reader.stored(level, None) for level in (1, 2, 3)])
    reader.close()
    monkeypatch.setattr(layout, "MAX_SHARD_SIZE", 2 * config.block_size(1))
    write_bank(model / "memory", config, rows, generic)
    assert (model / "memory" / "level-1-00001-of-00002.safetensors").exists()
    runs = write_results(model, tmp_path)
    assert len(list((runs[0] / "subtree").glob("level-3-*"))) == 3
    merge(runs, model, tmp_path / "out", generic=model)
    assert contents(tmp_path / "out" / "memory") == contents(model / "memory")


def test_the_merged_model_generates_what_the_whole_one_does(source, ready, tmp_path):
    merge(ready, source, tmp_path / "out", generic=source)
    whole, merged = mlx_hiermem.load(source), mlx_hiermem.load(tmp_path / "out")
    for memory in ("fetched", "generic", "none", (1, 4, 13)):
        answers = [lm.generate("some words", memory=memory, max_tokens=8) for lm in (whole, merged)]
        assert answers[0] == answers[1] and answers[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3 independent subtrees" in card and "| learning_rate | 0.0001 |" in card
    assert not (tmp_path / "out" / "evaluation").exists()


def test_without_a_generic_memory_its_start_values_have_no_effect(source, ready, tmp_path):
    report = merge(ready, source, tmp_path / "out")
    assert report.generic is None
    reader = BlockReader(tmp_path / "out" / "memory")
    for level in (1, 3):
        expected = start_block(reader.config, level, GENERIC, seed=5)
        assert np.array_equal(reader.block(level, None), expected)
    reader.close()
    lm = mlx_hiermem.load(tmp_path / "out")
    answers = [lm.generate("words", memory=memory, max_tokens=8) for memory in ("generic", "none")]
    assert answers[0] == answers[1]


def test_results_may_be_given_themselves_and_differ_in_what_does_not_matter(source, runs, tmp_path):
    edit(runs[1], settings={**SETTINGS, "iters": 20, "grad_checkpoint": True})
    config = json.loads((runs[2] / "subtree" / FILE).read_text())["memory_config"]
    config["base_anchor"]["name"] = "the same under another name"
    edit(runs[2], memory_config=config)
    report = merge([run / "subtree" for run in runs], source, tmp_path / "out", generic=source)
    assert (
        report.revision == json.loads((source / "memory" / "manifest.json").read_text())["revision"]
    )


def test_the_tree_may_come_from_any_run_or_from_the_anchor(source, runs, tmp_path):
    for run in runs[:2]:
        shutil.rmtree(run / "subtree" / "routing")
    (runs[2] / "subtree" / "routing").rename(runs[2] / "routing")  # of the run's own folder
    (runs[0] / "subtree" / "routing").mkdir()
    (runs[0] / "subtree" / "routing" / "tree.safetensors").write_bytes(b"another one")
    report = merge(runs, source, tmp_path / "out")
    assert report.routing == str(runs[2] / "routing")
    shutil.rmtree(runs[2] / "routing")
    assert merge(runs, source, tmp_path / "two").routing == str(source / "memory")
    with pytest.raises(TrainingError, match="is not the tree that the runs were trained with"):
        bare = shutil.copytree(source, tmp_path / "bare")
        shutil.rmtree(bare / "memory")
        merge(runs, bare, tmp_path / "three")
    shutil.rmtree(runs[0] / "subtree" / "routing")
    with pytest.raises(TrainingError, match="no routing/tree.safetensors there or beside any"):
        merge(runs, bare, tmp_path / "three")


def test_of_the_anchors_bank_only_what_routes_is_taken(source, runs, tmp_path):
    """Not its checksums, which are of other blocks, nor the list of those that are blocked."""
    for run in runs:
        shutil.rmtree(run / "subtree" / "routing")
    other = make_tiny_model(tmp_path / "other", ranks=(2, 1, 1))
    for name in ("tree.safetensors", "encoder.safetensors"):
        assert contents(other / "memory")[name] == contents(source / "memory")[name]
    with BankEdit(other / "memory") as bank:
        bank.set_blocked([(1, 1), (3, 5)])
    path = other / "memory" / "checksums.safetensors"
    path.write_bytes(path.read_bytes().ljust(1 << 17))  # more than this bank's can have
    report = merge(runs, other, tmp_path / "out", generic=source)
    assert report.routing == str(other / "memory")
    assert contents(tmp_path / "out" / "memory") == contents(source / "memory")


def test_where_files_cannot_be_linked_they_are_copied(source, runs, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    report = merge(runs, source, tmp_path / "out", generic=source)
    assert report.linked == 0
    assert contents(tmp_path / "out" / "memory") == contents(source / "memory")
    flip(next((runs[1] / "subtree").glob("level-3-*")))
    refused(runs, source, tmp_path / "two", "altered")


# ---- refusals ----------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def refused(runs, model: Path, out: Path, words: str, kind=HierMemError, **more) -> str:
    """Merging stops with one line, and leaves nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(kind) as error:
        merge(runs, model, out, **more)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert sorted(out.parent.iterdir()) == before
    return str(error.value)


def test_a_missing_and_a_doubled_subtree(source, runs, tmp_path):
    out = tmp_path / "out"
    refused(runs[:1], source, out, "2 of the 3 subtrees are missing: 1, 2;", TrainingError)
    words = f"{runs[0] / 'subtree'}: is subtree 0, and so is {runs[0] / 'subtree'}"
    refused([*runs, runs[0]], source, out, words, TrainingError)
    refused([], source, out, "no run is given", TrainingError)
    refused([*runs, tmp_path / "no"], source, out, f"{tmp_path / 'no'}: no such folder; expected")
    (tmp_path / "no").mkdir()
    refused([*runs, tmp_path / "no"], source, out, f"{tmp_path / 'no' / FILE}: no such file")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"anchor_sha256": "1" * 64}, "the anchor (sha256) is 1111"),
        ({"tree_sha256": "1" * 64}, "the tree (sha256) is 1111"),
        ({"corpus_revision": "1" * 64}, "the corpus (revision) is 1111"),
        ({"settings": {**SETTINGS, "learning_rate": 1}}, "setting learning_rate is 1, but 0.0001"),
        ({"settings": {**SETTINGS, "clip": 1}}, "setting clip is 1, but not set"),
        ({"settings": {"seed": 5}}, "setting learning_rate is not set, but 0.0001"),
    ],
)
def test_runs_that_differ(source, runs, tmp_path, changes, words):
    edit(runs[1], **changes)
    text = refused(runs, source, tmp_path / "out", words, TrainingError)
    assert str(runs[1]) in text and str(runs[0]) in text


def test_runs_of_another_memory_config(source, runs, tmp_path):
    other = make_tiny_model(tmp_path / "other", ranks=(2, 0, 2))
    others = write_results(other, tmp_path / "others")
    words = "memory config: ranks is (2, 0, 2), but (4, 0, 2)"
    refused([runs[0], others[1], runs[2]], source, tmp_path / "out", words, TrainingError)


def test_another_anchor(source, runs, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=1, ranks=(4, 0, 2))
    out = tmp_path / "out"
    refused(runs, other, out, "is not the anchor that the memories were trained on", TrainingError)
    refused(runs, source, out, "trained on another anchor", TrainingError, generic=other)
    refused(runs, tmp_path, out, "no config.json")


def test_a_generic_memory_of_another_config(source, runs, tmp_path):
    other = make_tiny_model(tmp_path / "other", ranks=(4, 1, 2))
    words = "ranks of its memory config is (4, 1, 2), that of the runs (4, 0, 2)"
    out = tmp_path / "out"
    refused(runs, source, out, words, TrainingError, generic=other)
    shutil.rmtree(other / "memory")
    refused(runs, source, out, "no such file", FormatError, generic=other)


def test_a_generic_memory_of_a_run_in_another_dtype(source, runs, tmp_path):
    run = tmp_path / "generic"
    make_tiny_model(run / "model", ranks=(4, 0, 2), dtype="bfloat16")
    write_tiny_anchor(run / "model", seed=0)
    merge(runs, source, tmp_path / "out", generic=run)
    readers = [BlockReader(folder / "memory") for folder in (run / "model", tmp_path / "out")]
    for level in (1, 3):
        blocks = [reader.block(level, None) for reader in readers]
        assert np.array_equal(*blocks) and blocks[0].any()
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("level", [1, 3])
def test_an_altered_file(source, runs, tmp_path, level):
    path = next((runs[1] / "subtree").glob(f"level-{level}-*"))
    flip(path)
    refused(runs, source, tmp_path / "out", f"{path}: altered", FormatError)


def test_an_existing_folder_stays(source, runs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    refused(runs, source, out, f"{out}: exists already", InputError)
    out.rmdir()
    out.symlink_to("nowhere")
    refused(runs, source, out, f"{out}: exists already", InputError)


# ---- a folder that appears whole or not at all -------------------------------------------


def test_a_merge_that_is_killed_leaves_nothing_that_the_next_one_minds(source, ready, tmp_path):
    code = """
import sys, time
from mlx_hiermem.training import merge as module
write_manifest = module.write_manifest
def slow(*arguments):
    print("all but the manifest is written", flush=True)
    time.sleep(60)
module.write_manifest = slow
module.merge(sys.argv[3:], sys.argv[1], sys.argv[2])
"""
    out = tmp_path / "deep" / "out"
    command = [sys.executable, "-c", code, str(source), str(out), *map(str, ready)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert "manifest" in process.stdout.readline()
        with pytest.raises(InputError, match="another process is writing it now"):
            merge(ready, source, out)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert os.listdir(out.parent) == [".out.partial"]
    merge(ready, source, out, generic=source)
    assert os.listdir(out.parent) == ["out"]
    assert contents(out / "memory") == contents(source / "memory")


def test_an_error_removes_everything_that_was_made(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(ZeroDivisionError), model_folder(out) as folder:
        (folder / "memory").mkdir()
        (folder / "memory" / "file").write_text("x")
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), model_folder(out) as folder:
        raise KeyboardInterrupt
    with pytest.raises(FormatError, match="cannot be written .No space left"):
        with model_folder(out):
            raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError), model_folder(out):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == []
    with model_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert os.listdir(out) == ["file"] and os.listdir(out.parent) == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="exists already"), model_folder(out):
        out.mkdir()
        (out / "theirs").write_text("x")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["theirs"]


@pytest.mark.parametrize("out", ["", "/", "..", "."])
def test_names_that_are_no_new_folder(out):
    with pytest.raises(InputError), model_folder(out):
        pass


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="cannot be written"), model_folder(tmp_path / "file/out"):
        pass


def test_anchor_files_are_the_anchor_and_its_tokenizer(source, tmp_path):
    for name in ("README.md", "LICENSE", ".hidden.json", "notes.md", "chat_template.jinja",
                 "model.safetensors.index.json", "optimizer.safetensors"):  # fmt: skip
        (tmp_path / name).write_text("x")
    for name in anchor_files(source):
        shutil.copy(source / name, tmp_path / name)
    everything = [
        "LICENSE", "chat_template.jinja", "config.json", "model.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert anchor_files(tmp_path) == everything
    assert [name for name in everything if is_weights(name)] == everything[3:5]


# ---- the command -------------------------------------------------------------------------


def test_the_command(source, ready, tmp_path, capsys):
    argv = ["merge", *map(str, ready), "--model", str(source)]
    assert cli.main([*argv, "--mlx-path", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "3 subtrees merged" in text and "start values, which have no effect" in text
    more = ["--mlx-path", str(tmp_path / "two"), "--generic", str(source), "--json"]
    assert cli.main([*argv, *more]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["folder"] == str(tmp_path / "two") and report["generic"] == str(source)
    assert (report["files"], report["linked"], len(report["subtrees"])) == (4, 3, 3)
    assert cli.main([*argv, *more]) == 2
    error = capsys.readouterr().err
    assert "exists already" in error and len(error.splitlines()) == 1


def test_progress_counts_every_byte(source, ready, tmp_path):
    seen: dict[str, list[int]] = {}

    def progress(what: str, count: int, total: int) -> None:
        seen.setdefault(what, [total]).append(count)

    merge(ready, source, tmp_path / "out", progress=progress)
    assert set(seen) == {"anchor", "merge"}
    for total, *counts in seen.values():
        assert sum(counts) == total


def test_help_imports_no_model_code():
    code = (
        "import sys; from mlx_hiermem import cli\n"
        "try: cli.main(['merge', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'mlx.core', 'mlx_lm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
