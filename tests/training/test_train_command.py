"""``train`` as people use it: each regime, from its start to a model that answers, and on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import mlx_hiermem
from mlx_hiermem import cli
from mlx_hiermem.anchors import load_anchor
from mlx_hiermem.corpus.folder import Corpus
from mlx_hiermem.training.checkpoint import whole_steps
from mlx_hiermem.training.trainer import Trainer
from tests.corpus.corpora import files_of
from tests.training.runs import arguments, bank, losses, train, validations, weights


def answers(folder):
    """Each memory is fetched and gives an answer; the logits of all three, after one prompt."""
    model = mlx_hiermem.load(folder)
    logits = {}
    for kind in ("none", "generic", "fetched"):
        assert isinstance(model.generate("some words.", memory=kind, max_tokens=3), str)
        cache = model.prompt_cache(kind, "some words.")
        tokens = mx.array([model.tokenize("some words.")])
        logits[kind] = np.array(model.model(tokens, cache=cache)[0, -1].astype(mx.float32))
        assert np.isfinite(logits[kind]).all()
    return logits


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


# ---- regimes ---------------------------------------------------------------------------


def test_frozen_memories_on_a_trained_anchor(place, tmp_path, capsys):
    corpus = Corpus.open(place / "corpus")
    steps = -(-len(corpus.train) // 8)  # one pass
    options = {"iters": steps, "batch_size": 8, "generic_probability": 0.0, "bank_dtype": "float32"}
    assert train(place, tmp_path / "run", regime="frozen", **options) == 0
    model = tmp_path / "run" / "model"
    assert not changed(weights(place / "anchor"), weights(model))
    assert (model / "model.safetensors").read_bytes() == (
        place / "anchor" / "model.safetensors"
    ).read_bytes()
    # M3 is zero still in the blocks that no sequence used, and in no other.
    blocks = bank(model)
    for (level, cluster), block in blocks.items():
        used = cluster in (corpus.train.leaves // 3 ** (2 - level)).tolist()
        assert block.reshape(2, 3, -1, 16)[:, 2].any() == used, (level, cluster)
    answers(model)
    out = capsys.readouterr().out
    assert f"{steps} steps done, loss" in out and f"model: {model}" in out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "curves.png", "log.jsonl", "model",
    ]  # fmt: skip
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, steps + 1))


def test_the_steps_are_those_of_the_trainer(place, tmp_path):
    """The command adds nothing to the numbers: the same losses from the parts put together here."""
    from mlx_hiermem.memories import attach
    from mlx_hiermem.training import setup
    from mlx_hiermem.training.config import TrainConfig

    train(place, tmp_path / "run", regime="cotrain", freeze="*embed*", grad_accumulation_steps=2)
    corpus = Corpus.open(place / "corpus")
    start = setup.open_start(corpus, str(place / "anchor"), None, 0)
    setup.freeze(start.anchor, ["*embed*"], True)
    memory = setup.memory_config(corpus, start.anchor, "anchor", (4, 2), "uniform", "bfloat16")
    config = TrainConfig(
        "cotrain", iters=6, batch_size=4, grad_accumulation_steps=2, learning_rate=0.01
    )
    trainer = Trainer(attach(start.anchor, memory), corpus.train, config)
    expected = [(step, trainer.step().loss) for step in range(1, 7)]
    assert losses(tmp_path / "run") == expected


def test_cotraining_keeps_what_is_frozen(place, tmp_path):
    run = tmp_path / "run"
    assert train(place, run, regime="cotrain", freeze="*embed*", val_batches=1) == 0
    before, after = weights(place / "anchor"), weights(run / "model")
    assert changed(before, after) == set(before) - {"model.embed_tokens.weight"}
    logits = answers(run / "model")
    assert len({values.tobytes() for values in logits.values()}) == 3
    assert [step for step, _ in validations(run)] == [0, 6]
    card = (run / "model" / "README.md").read_text()
    assert "regime `cotrain`, 6 steps of 4 sequences of 32 tokens" in card
    assert "| generic_probability | 0.25 |" in card and "| fetched | " in card


@pytest.mark.parametrize("regime", ["anchor", "scratch"])
def test_from_random_weights(place, tmp_path, regime, capsys):
    run = tmp_path / "run"
    options = {"data": place / "corpus-bert", "model": None, "anchor": place / "fresh.json"}
    if regime == "anchor":
        options |= {"ranks": None, "warmup_steps": 2}
    assert train(place, run, regime=regime, val_batches=2, steps_per_eval=3, **options) == 0
    model = run / "model"
    if regime == "scratch":
        answers(model)
        kinds = ["none", "generic", "fetched"]
    else:
        load_anchor(model)
        assert not (model / "memory").exists()
        kinds = ["none"]
    found = validations(run)
    assert [step for step, _ in found] == [0, 3, 6]
    assert all(list(values) == kinds for _, values in found)
    captured = capsys.readouterr()
    numbers = ", ".join(f"{kind} {found[-1][1][kind]:.4f}" for kind in kinds)
    assert f"step 6: validation {numbers}\n" in captured.err
    table = dict(line.split() for line in captured.out.splitlines() if len(line.split()) == 2)
    assert {kind: float(table[kind]) for kind in kinds} == pytest.approx(found[-1][1], abs=1e-4)
    # Byte ids are the tokenizer's of the corpus; another seed, another anchor.
    assert (model / "tokenizer.json").is_file()
    train(place, tmp_path / "other", regime=regime, seed=1, **options)
    assert len(changed(weights(model), weights(tmp_path / "other" / "model"))) > 10


def test_the_two_stages_of_the_paper(place, tmp_path):
    """An anchor from nothing, then frozen memories on it, in a tree of a BERT's."""
    common = {"data": place / "corpus-bert", "val_batches": 1}
    first, second = tmp_path / "first", tmp_path / "second"
    fresh = place / "fresh.json"
    assert train(place, first, model=None, anchor=fresh, ranks=None, regime="anchor", **common) == 0
    model = first / "model"
    assert train(place, second, model=model, regime="frozen", **common) == 0
    assert not changed(weights(model), weights(second / "model"))
    assert (second / "model" / "memory" / "encoder").is_dir()
    # What the anchor ended with is what the memories start from: they add nothing yet.
    end, start = validations(first)[-1][1], validations(second)[0][1]
    assert start["fetched"] == pytest.approx(start["none"], rel=1e-6)
    assert start["none"] == pytest.approx(end["none"], rel=1e-6)
    answers(second / "model")


@pytest.mark.parametrize("regime", ["frozen", "cotrain"])
def test_an_anchor_of_mlx_lm(place, tmp_path, regime, capsys):
    run = tmp_path / "run"
    options = {"data": place / "corpus-bert", "model": place / "llama", "regime": regime}
    assert train(place, run, **options) == 0
    assert "document mask off: this anchor's network takes no mask" in capsys.readouterr().err
    assert "| document_mask | False |" in (run / "model" / "README.md").read_text()
    same = weights(place / "llama"), weights(run / "model")
    assert len(changed(*same)) == (0 if regime == "frozen" else len(same[0]))
    answers(run / "model")
    model, tokenizer = mlx_lm.load(str(run / "model"))  # plain mlx-lm opens the anchor
    logits = model(mx.array([tokenizer.encode("some words")]))
    reference, _ = mlx_lm.load(str(place / "llama"))
    close = mx.allclose(logits, reference(mx.array([tokenizer.encode("some words")])), atol=1e-5)
    assert close.item() == (regime == "frozen")


# ---- settings --------------------------------------------------------------------------


def test_flags_win_over_the_file_and_both_over_defaults(place, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {place / 'corpus'}\nmodel: {place / 'anchor'}\nranks: [4, 2]\nregime: frozen\n"
        "iters: 9\nbatch-size: 2\nlearning_rate: 3e-3\nval_batches: 0\n"
    )
    run = tmp_path / "run"
    assert cli.main(["train", "-c", str(config), "--run", str(run), "--iters", "2", "--json"]) == 0
    captured = capsys.readouterr()
    lines = {line.split()[0]: line.split()[1:] for line in captured.err.splitlines() if line}
    assert lines["setting"] == ["value", "from"]
    assert lines["iters"] == ["2", "flag"] and lines["batch_size"] == ["2", "file"]
    assert lines["learning_rate"] == ["0.003", "file"] and lines["clip"] == ["1.0", "default"]
    assert lines["weight_decay"] == ["0.001", "default"]  # the paper's for memories on an anchor
    result = json.loads(captured.out)
    assert result["settings"]["iters"] == {"value": 2, "from": "flag"}
    assert result["settings"]["ranks"] == {"value": [4, 2], "from": "file"}
    assert result["step"] == 2 and result["stopped"] is False and result["validation"] is None
    assert result["model"] == str(run / "model")
    assert result["loss"] == pytest.approx(losses(run)[-1][1])


def test_lines_about_steps_come_when_they_are_asked_for(place, tmp_path, capsys):
    assert train(place, tmp_path / "run", steps_per_report=3) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if ": loss" in line]
    assert [line.split(":")[0] for line in told] == ["step 3", "step 6"]
    mean = np.mean([loss for _, loss in losses(tmp_path / "run")][3:])
    assert f"loss {mean:.4f}, learning rate" in told[1] and told[1].endswith("tokens/s")


def test_recomputing_gives_the_same_and_bfloat16_nearly(place, tmp_path):
    options = {"regime": "cotrain", "freeze": "*embed*"}
    for name, more in (
        ("plain", {}), ("recomputed", {"grad_checkpoint": True}), ("half", {"dtype": "bfloat16"}),
    ):  # fmt: skip
        assert train(place, tmp_path / name, **options, **more) == 0
    plain, recomputed, half = (
        [loss for _, loss in losses(tmp_path / name)] for name in ("plain", "recomputed", "half")
    )
    assert recomputed == pytest.approx(plain, rel=1e-4)
    assert half == pytest.approx(plain, rel=0.05) and half != plain
    config = json.loads((tmp_path / "half" / "model" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    stored = mx.load(str(tmp_path / "half" / "model" / "model.safetensors"))
    assert {str(value.dtype) for value in stored.values()} == {"mlx.core.bfloat16"}
    answers(tmp_path / "half" / "model")


@pytest.mark.parametrize("batch", [8, 1000])
def test_a_batch_may_be_larger_than_the_corpus(place, tmp_path, batch):
    options = {"iters": 1, "batch_size": batch, "generic_probability": 0.0}
    assert train(place, tmp_path / "run", **options) == 0
    log = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    sequences = len(Corpus.open(place / "corpus").train)
    assert sequences < 1000
    assert log["tokens"] > 20 * batch  # a sequence that comes twice counts twice


def test_memory_in_some_layers_and_levels(place, tmp_path):
    run = tmp_path / "run"
    assert train(place, run, ranks="4,0", memory_layers="1", bank_dtype="float16") == 0
    config = json.loads((run / "model" / "memory" / "config.json").read_text())
    assert config["ranks"] == [4, 0] and config["layers"] == [1] and config["dtype"] == "float16"
    answers(run / "model")


# ---- a bank that is there --------------------------------------------------------------


def test_training_goes_on_from_the_blocks_of_the_model(place, tmp_path):
    given = {"model": place / "model", "learning_rate": 0.0, "final_learning_rate": 0.0}
    given |= {"bank_dtype": "float32", "val_batches": 2, "weight_decay": 0.0}
    assert train(place, tmp_path / "on", **given) == 0
    before, after = bank(place / "model"), bank(tmp_path / "on" / "model")
    assert before.keys() == after.keys() and not changed(before, after)
    start = validations(tmp_path / "on")[0][1]
    assert len(set(start.values())) == 3  # the blocks have an effect from the first step on
    assert train(place, tmp_path / "fresh", **given, fresh_memory=True) == 0
    start = validations(tmp_path / "fresh")[0][1]
    assert start["fetched"] == pytest.approx(start["none"], rel=1e-6)
    assert changed(before, bank(tmp_path / "fresh" / "model")) == set(before)


def test_going_on_moves_only_what_is_visited(place, tmp_path):
    corpus = Corpus.open(place / "corpus")
    subtree = int(corpus.train.leaves[0]) // 3
    given = {"model": place / "model", "bank_dtype": "float32", "subtree": subtree}
    assert train(place, tmp_path / "run", **given) == 0
    result = tmp_path / "run" / "subtree"
    assert json.loads((result / "subtree.json").read_text())["subtree"] == subtree
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "curves.png", "log.jsonl", "subtree",
    ]  # fmt: skip


# ---- stopping --------------------------------------------------------------------------


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """Send this process a signal in the middle of a step."""
    before = Trainer._gradients

    def interrupted(self, *args):
        if self.done + 1 == step:
            os.kill(os.getpid(), number)
        return before(self, *args)

    monkeypatch.setattr(Trainer, "_gradients", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_goes_on(place, tmp_path, monkeypatch, capsys, number):
    options = {
        "regime": "cotrain", "freeze": "*embed*", "grad_accumulation_steps": 2, "val_batches": 2,
        "steps_per_eval": 2, "memory_budget": 60000, "bank_dtype": "float32",
    }  # fmt: skip
    assert train(place, tmp_path / "whole", **options) == 0
    run = tmp_path / "run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, number)
        assert train(place, run, **options, json=True) == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    captured = capsys.readouterr()
    assert json.loads(captured.out[captured.out.index("{") :])["stopped"] is True
    assert whole_steps(run / "state" / "rank-0") == [3]
    assert not (run / "model").exists()
    # A log that is broken off, and lines of steps that are done again.
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    assert train(place, run, **options, resume=True) == 0
    assert "resumed at step 3\n" in capsys.readouterr().err
    assert losses(run) == losses(tmp_path / "whole")
    assert validations(run) == validations(tmp_path / "whole")
    assert files_of(run / "model") == files_of(tmp_path / "whole" / "model")
    assert not (run / "state").exists()


def test_a_stop_is_told_with_how_to_go_on(place, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train(place, tmp_path / "run") == 130
    assert capsys.readouterr().out == (
        "stopped at step 2 of 6, with a checkpoint; go on with the same command and --resume\n"
    )


def test_a_stop_in_the_last_step_ends_the_run(place, tmp_path, monkeypatch):
    stop_at(monkeypatch, 6)
    assert train(place, tmp_path / "run") == 0
    assert (tmp_path / "run" / "model").is_dir()


def test_a_stop_while_the_model_is_written_loses_nothing(place, tmp_path, monkeypatch, capsys):
    from mlx_hiermem.training import results

    def interrupted(*_):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_memory", interrupted)
        assert train(place, run) == 130
    assert "stopped; go on with the same command and --resume" in capsys.readouterr().err
    assert not (run / "model").exists() and whole_steps(run / "state" / "rank-0") == [6]
    assert train(place, run, resume=True) == 0
    assert train(place, tmp_path / "whole") == 0
    assert files_of(run / "model") == files_of(tmp_path / "whole" / "model")
    assert losses(run) == losses(tmp_path / "whole")
    assert "6 steps done\n" in capsys.readouterr().out


def test_an_anchor_that_changes_while_it_trains_is_not_copied(place, tmp_path, monkeypatch, capsys):
    """The run waits for it, and loses nothing."""
    from mlx_hiermem.training import results

    anchor, run = Path(shutil.copytree(place / "anchor", tmp_path / "anchor")), tmp_path / "run"
    weights, real = (anchor / "model.safetensors").read_bytes(), results.write_model

    def meanwhile(*given):
        os.truncate(anchor / "model.safetensors", 1000)
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(results, "write_model", meanwhile)
        assert train(place, run, model=anchor) == 2
    told = capsys.readouterr().err
    assert "model.safetensors: was changed while it was used" in told and "--resume" in told
    assert not (run / "model").exists() and whole_steps(run / "state" / "rank-0") == [6]
    (anchor / "model.safetensors").write_bytes(weights)
    assert train(place, run, model=anchor, resume=True) == 0
    assert train(place, tmp_path / "whole", model=anchor) == 0
    assert files_of(run / "model") == files_of(tmp_path / "whole" / "model")


def test_the_second_ctrl_c_stops_at_once(place, tmp_path, monkeypatch, capsys):
    def twice(self, *_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        gradients = Trainer._gradients
        patch.setattr(
            Trainer, "_gradients", lambda s, *a: (twice if s.done == 3 else gradients)(s, *a)
        )
        assert train(place, run) == 130
    assert whole_steps(run / "state" / "rank-0") == [0]
    assert "stopped; go on with the same command and --resume" in capsys.readouterr().err
    assert train(place, run, resume=True) == 0


def test_training_works_beside_the_main_thread(place, tmp_path):
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(cli.main(arguments(place, tmp_path / "run", iters=1)))
    )
    thread.start()
    thread.join()
    assert codes == [0]


def test_rows_in_files_or_in_memory_make_no_difference(place, tmp_path):
    options = {"regime": "cotrain", "freeze": "*embed*", "iters": 12, "batch_size": 2}
    assert train(place, tmp_path / "plenty", **options) == 0
    assert train(place, tmp_path / "tight", **options, memory_budget=2 * 12 * 576) == 0
    assert files_of(tmp_path / "plenty" / "model") == files_of(tmp_path / "tight" / "model")
    assert losses(tmp_path / "plenty") == losses(tmp_path / "tight")


def test_a_run_may_start_again_where_nothing_was_saved(place, tmp_path):
    """Killed before its first checkpoint: rows and half a checkpoint lie there, and a log."""
    run = tmp_path / "run"
    part = run / "state" / "rank-0" / ".checkpoint-00000000.partial"
    part.mkdir(parents=True)
    (part.parent / "rows-1.bin").write_bytes(b"numbers" * 1000)
    (run / "log.jsonl").write_text('{"step": 0, "validation": {"none": 1.0}}\n{"ste')
    assert train(place, run, val_batches=1) == 0
    assert train(place, tmp_path / "other", val_batches=1) == 0
    assert files_of(run / "model") == files_of(tmp_path / "other" / "model")
    assert validations(run) == validations(tmp_path / "other")
