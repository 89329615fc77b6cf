"""Checkpoints: equal after loading, whole or not there whatever happens, and only for their run."""

from __future__ import annotations

import dataclasses
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_hiermem.anchors.openlm import Model, ModelArgs, init_weights
from mlx_hiermem.config import AnchorShape, MemoryConfig
from mlx_hiermem.corpus.packed import pack
from mlx_hiermem.errors import FormatError, HierMemError, TrainingError
from mlx_hiermem.memories import GENERIC, attach, start_block
from mlx_hiermem.training.checkpoint import Checkpoints, holds_run, state_folder, whole_steps
from mlx_hiermem.training.config import TrainConfig
from mlx_hiermem.training.distributed import Processes
from mlx_hiermem.training.rows import BankRows
from mlx_hiermem.training.trainer import Trainer
from tests.training.faults import Killed, die, faults, full_disk

ARGS = ModelArgs(16, 2, 32, 2, 8, vocab_size=40, tie_word_embeddings=True)
CONFIG = MemoryConfig(
    (3, 2),
    branching=3,
    base_anchor={"name": "t", "shape": dataclasses.asdict(AnchorShape.of(ARGS))},
)
STEPS, SAVE = 8, 2
#: Holds the rows of a batch and not one more.
BUDGET = 12 * 3 * CONFIG.fetch_size()


def corpus():
    rng = np.random.default_rng(0)
    return pack([(rng.integers(1, 40, 5).tolist(), leaf % 9) for leaf in range(90)], 12, 0)


def start(level, cluster):
    return start_block(CONFIG, level, cluster, 0)


class Run:
    """A run without a command line: a trainer and its checkpoints."""

    def __init__(self, folder, regime="cotrain", identity=None, **options):
        mx.random.seed(0)
        anchor = Model(ARGS)
        init_weights(anchor)
        options = {
            "iters": STEPS, "batch_size": 3, "grad_accumulation_steps": 2, "learning_rate": 0.01,
            "generic_probability": 0.3, "warmup_steps": 0,
        } | options  # fmt: skip
        config = TrainConfig(regime, **options)
        self.rows, model = None, anchor
        if regime != "anchor":
            model = attach(anchor, CONFIG)
            self.rows = BankRows(CONFIG, start, folder, BUDGET)
        self.trainer = Trainer(model, corpus(), config, self.rows)
        identity = {"settings": dataclasses.asdict(config), "frozen": []} | (identity or {})
        self.checkpoints = Checkpoints(folder, identity, Processes())
        self.losses = {}

    def go(self, until=STEPS):
        while True:
            if self.trainer.done % SAVE == 0:
                self.checkpoints.save(self.trainer)
            if self.trainer.done == until:
                return self
            report = self.trainer.step()
            self.losses[report.step] = report.loss

    def resume(self, **options):
        self.checkpoints.resume(self.trainer, **options)
        return self

    def close(self):
        if self.rows is not None:
            self.rows.close()

    def content(self):
        """Everything that a checkpoint has to bring back."""
        trainer = self.trainer
        found = {f"weight {name}": np.array(w) for name, w in tree_flatten(trainer.weights)}
        state = tree_flatten(trainer.optimizer.state)
        found |= {f"optimizer {n}": np.array(v) for n, v in state if n != "learning_rate"}
        if self.rows is not None:
            for level in self.rows.levels:
                for cluster in (GENERIC, *range(CONFIG.clusters(level))):
                    found[f"row {level} {cluster}"] = self.rows._row((level, cluster)).data.copy()
                found[f"steps {level}"] = self.rows.steps[level].copy()
        return found | {"done": np.array(trainer.done)}


def same(left, right):
    assert left.keys() == right.keys()
    return all(np.array_equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Regime -> content and losses of a run that nothing happened to."""
    found = {}
    for regime in ("cotrain", "frozen", "anchor"):
        run = Run(tmp_path_factory.mktemp(regime), regime).go()
        found[regime] = run.content(), run.losses
        run.close()
    return found


@pytest.mark.parametrize("regime", ["cotrain", "frozen", "anchor"])
def test_a_run_that_resumes_ends_as_the_one_that_did_not_stop(tmp_path, whole, regime):
    content, losses = whole[regime]
    first = Run(tmp_path, regime).go(4)
    at_save = first.content()
    first.close()
    second = Run(tmp_path, regime)
    assert second.checkpoints.resume(second.trainer) == {}
    assert second.trainer.done == 4
    assert same(second.content(), at_save)
    second.go()
    assert same(second.content(), content)
    assert first.losses | second.losses == losses and len(second.losses) == 4
    second.close()


def test_steps_after_the_checkpoint_leave_no_trace(tmp_path, whole):
    first = Run(tmp_path).go(4)
    at_save = first.content()
    for _ in range(3):  # rows go to their files, for the budget
        first.trainer.step()
    first.close()
    second = Run(tmp_path).resume()
    assert same(second.content(), at_save)
    assert same(second.go().content(), whole["cotrain"][0])
    second.close()


def test_only_the_last_checkpoint_is_kept_and_rests_are_removed(tmp_path):
    run = Run(tmp_path).go(2)
    assert whole_steps(tmp_path) == run.checkpoints.steps() == [2]
    for name in (".checkpoint-00000003.partial", ".checkpoint-00000000.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "anchor.safetensors").write_bytes(b"half of it")
    assert whole_steps(tmp_path) == [2]
    run.go(4)
    names = {"checkpoint-00000004", "rows-1.bin", "rows-2.bin"}
    assert {path.name for path in tmp_path.iterdir()} == names
    (tmp_path / ".checkpoint-00000007.partial").mkdir()
    run.close()
    again = Run(tmp_path).resume()
    assert {path.name for path in tmp_path.iterdir()} == names
    again.close()


# ---- another run -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, text",
    [
        ({"batch_size": 6}, "started with batch_size 3, now it is 6; resume it as it was, or st"),
        ({"seed": 5}, "started with seed 0, now it is 5"),
        ({"clip": 0.5}, r"started with clip 1.0, now it is 0.5; .*, or add --accept-changes, or"),
        ({"identity": {"frozen": ["a", "b"]}}, r"with frozen \[\], now it is \[\"a\", \"b\"\]"),
        ({"identity": {"corpus": "x"}}, 'started with corpus null, now it is "x"'),
        ({"identity": {"memory": {"ranks": [1]}}}, "started with memory null, now it is"),
    ],
)
def test_a_run_resumes_only_as_what_it_was(tmp_path, options, text):
    first = Run(tmp_path).go(2)
    first.close()
    second = Run(tmp_path, **options)
    before = second.content()
    with pytest.raises(TrainingError, match=text) as error:
        second.checkpoints.resume(second.trainer)
    line = str(error.value)
    assert "\n" not in line and str(tmp_path / "checkpoint-00000002") in line
    assert same(second.content(), before)
    assert whole_steps(tmp_path) == [2]
    second.close()


def test_rates_may_change_where_that_is_asked_for_and_nothing_else(tmp_path):
    Run(tmp_path).go(4).close()
    run = Run(tmp_path, learning_rate=0.001, iters=10)
    changed = run.checkpoints.resume(run.trainer, accept_changes=True)
    assert changed == {"learning_rate": (0.01, 0.001), "iters": (STEPS, 10)}
    assert run.trainer.done == 4
    assert run.trainer.step().learning_rate < 0.001
    run.close()
    for options, text in (
        ({"seed": 1}, "seed 0, now it is 1; resume it as it was, or start another"),
        ({"identity": {"learning_rate": 1}}, "with learning_rate null, now it is 1; resume it as"),
        ({"iters": 3}, "iters is 3, but 4 steps are done; give more"),
    ):
        run = Run(tmp_path, **options)
        with pytest.raises(TrainingError, match=text):
            run.resume(accept_changes=True)
        run.close()


# ---- damage ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["anchor", "optimizer", "rows"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty", "renamed"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    Run(tmp_path).go(2).close()
    path = tmp_path / "checkpoint-00000002" / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-9])
    elif damage == "flipped":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        other = "rows" if name == "anchor" else "anchor"
        shutil.copy(path.with_name(f"{other}.safetensors"), path)
    run = Run(tmp_path)
    with pytest.raises(FormatError, match=f"{name}.safetensors: damaged .*; restore it") as error:
        run.resume()
    assert "\n" not in str(error.value) and whole_steps(tmp_path) == [2]
    run.close()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"step": 4}', "\xff"])
def test_a_damaged_table_is_named(tmp_path, text):
    Run(tmp_path).go(2).close()
    path = tmp_path / "checkpoint-00000002" / "state.json"
    path.write_bytes(text.encode("latin-1"))
    run = Run(tmp_path)
    with pytest.raises(FormatError, match="state.json: damaged"):
        run.resume()
    run.close()


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    Run(tmp_path).go(2).close()
    (tmp_path / "checkpoint-00000002").rename(tmp_path / "checkpoint-00000006")
    run = Run(tmp_path)
    with pytest.raises(FormatError, match="step is 2, its name says 6"):
        run.resume()
    run.close()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    Run(tmp_path).go(2).close()
    path = tmp_path / "checkpoint-00000002" / "state.json"
    state = json.loads(path.read_text())
    del state["files"]["optimizer.safetensors"]
    path.write_text(json.dumps(state))
    run = Run(tmp_path)
    with pytest.raises(FormatError, match="optimizer.safetensors: damaged"):
        run.resume()
    run.close()


# ---- faults ----------------------------------------------------------------------------


#: Every 12th operation; with `make slow` each of them.
STRIDES = pytest.mark.parametrize("stride", [12, pytest.param(1, marks=pytest.mark.slow)])


def operations(folder, start=4):
    """How many operations on files a run has from its checkpoint at ``start`` on."""
    run = Run(folder).go(start)
    with faults(None, die) as count:
        run.go()
    run.close()
    return count


@STRIDES
def test_a_full_disk_at_any_write_keeps_the_last_checkpoint(tmp_path, whole, stride):
    total = operations(tmp_path / "count").calls
    assert total > 60
    failed = 0
    for at in range(1, total + 1, stride):
        folder = tmp_path / str(at)
        run = Run(folder).go(4)
        with faults(at, full_disk):
            try:
                run.go()
            except HierMemError as error:
                failed += 1
                assert "\n" not in str(error)
                words = ("No space left on device", "checkpoint cannot be", "rows-")
                assert any(word in str(error) for word in words)
        run.close()
        assert not list(folder.glob(".checkpoint-*.partial"))
        again = Run(folder).resume()
        assert again.trainer.done >= 4
        assert same(again.go().content(), whole["cotrain"][0]), at
        again.close()
    assert failed > 60 // stride


@STRIDES
def test_a_process_that_dies_at_any_operation_loses_nothing(tmp_path, whole, stride):
    total = operations(tmp_path / "count").calls
    content, losses = whole["cotrain"]
    for at in range(2, total + 1, stride):
        folder = tmp_path / str(at)
        run = Run(folder).go(4)
        with faults(at, die), pytest.raises(Killed):
            run.go()
        run.close()
        again = Run(folder).resume().go()
        assert same(again.content(), content), at
        assert run.losses | again.losses == losses
        again.close()


# ---- the folder ------------------------------------------------------------------------


def test_the_folder_is_one_process_s_alone(tmp_path):
    folder = tmp_path / "run" / "state" / "rank-0"
    with state_folder(folder):
        with pytest.raises(TrainingError, match="another process is training this run now"):
            with state_folder(folder):
                pass
        assert folder.is_dir()


def test_a_run_without_a_checkpoint_leaves_nothing(tmp_path):
    folder = tmp_path / "run" / "state" / "rank-0"
    with pytest.raises(ValueError), state_folder(folder):
        (folder / "rows-1.bin").write_bytes(b"numbers")
        raise ValueError
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()  # somebody's
    with state_folder(folder):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_what_was_left_before_the_first_checkpoint_is_removed(tmp_path):
    folder = tmp_path / "rank-0"
    (folder / ".checkpoint-00000000.partial").mkdir(parents=True)
    (folder / "rows-1.bin").write_bytes(b"numbers")
    assert not holds_run(tmp_path)
    with state_folder(folder):
        assert not list(folder.iterdir())
        (folder / "checkpoint-00000000").mkdir()
    assert holds_run(tmp_path) and folder.is_dir()
    with state_folder(folder):
        assert [path.name for path in folder.iterdir()] == ["checkpoint-00000000"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(TrainingError, match="rank-0: cannot be written .Not a directory.; check"):
        with state_folder(tmp_path / "run" / "state" / "rank-0"):
            pass
