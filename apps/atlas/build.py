"""Build the atlas from nothing: run the stages, side by side where they can be, then assemble.

``python -m apps.atlas build --seed 0`` leaves the model folder in the package. The stages keep
their results in a work folder; a build that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hiermem import load
from mlx_hiermem.arrays import load_arrays
from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.errors import TrainingError
from mlx_hiermem.evaluation.facts import Question, write_questions
from mlx_hiermem.routing.names import name_tree

from .card import write_card
from .corpus import buckets, counts, documents, held_out
from .facts import facts
from .recipe import STAGES, Recipe, memory_config, trained_leaves

#: Names of the five buckets, from the most frequent facts to the rarest.
BUCKET_NAMES = ("most frequent", "frequent", "middle", "rare", "rarest")

#: Dtype of everything that ships; what it costs in accuracy is within what ``evaluate`` prints.
DTYPE = mx.bfloat16

# Prompts that are routed at a time.
_BATCH = 512


def run_stages(recipe: Recipe, work: Path, jobs: int) -> None:
    """Run every stage that has not left its file yet, each in a process of its own.

    Training steps of a model this small use little more than one core, so two stages side by side
    take about as long as one.

    Raises:
        TrainingError: a stage failed; what the others finished is kept.
    """
    work.mkdir(parents=True, exist_ok=True)
    settings = work / "recipe.json"
    wanted = json.dumps(asdict(recipe), indent=2)
    if settings.exists() and settings.read_text() != wanted:
        raise TrainingError(
            f"{settings}: this work folder belongs to another recipe; remove it or name another"
        )
    settings.write_text(wanted)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while True:
            done = {name for name, (_, file, _) in STAGES.items() if (work / file).exists()}
            done -= set(running)
            waiting = [name for name in STAGES if name not in done and name not in running]
            if not waiting and not running:
                return
            for name in waiting:
                if len(running) < jobs and set(STAGES[name][2]) <= done:
                    print(f"stage {name}", file=sys.stderr, flush=True)
                    running[name] = (_start(name, recipe, work, jobs), time.time())
            time.sleep(0.2)
            for name, (process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    raise TrainingError(
                        f"stage {name} failed with exit code {process.returncode}; its output is "
                        "above; run the same command again to go on from there"
                    )
                _note_seconds(work, name, time.time() - started)
    finally:
        for process, _ in running.values():
            process.terminate()


def _start(name: str, recipe: Recipe, work: Path, jobs: int) -> subprocess.Popen[bytes]:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "apps.atlas",
            "stage",
            name,
            "--seed",
            str(recipe.seed),
            "--work",
            str(work),
        ],
        env={**os.environ, "OPENBLAS_NUM_THREADS": str(threads)},
    )


def _note_seconds(work: Path, name: str, seconds: float) -> None:
    path = work / "seconds.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: round(seconds)}))


def assemble(recipe: Recipe, work: Path, out: Path) -> None:
    """Put the stages' results together to a model folder (docs/format.md), with its evaluation."""
    fresh = out.with_name(f".{out.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(work / "tokenizer", fresh)
    _copy_half(work / "cotrained" / "anchor.safetensors", fresh / "model.safetensors")
    config = asdict(recipe.anchor) | {"eos_token_id": 0, "torch_dtype": "bfloat16"}
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    memory = fresh / "memory"
    shutil.copytree(work / "memory", memory)
    bank = load_arrays(work / "cotrained" / "bank.safetensors")
    generic = load_arrays(work / "generic.safetensors")["generic"]
    shape = memory_config(recipe)
    write_bank(
        memory,
        shape,
        {level: np.array(bank[f"level{level}"]) for level in shape.memory_levels},
        np.array(generic),
    )

    evaluation = fresh / "evaluation"
    evaluation.mkdir()
    write_questions(evaluation / "facts.jsonl.gz", questions(recipe, work), BUCKET_NAMES)
    _copy_half(
        work / "anchor_same_tokens.safetensors", evaluation / "anchor_same_tokens.safetensors"
    )
    shutil.rmtree(out, ignore_errors=True)
    os.replace(fresh, out)


def questions(recipe: Recipe, work: Path) -> list[Question]:
    """The held-out question of every fact, with its bucket and the leaves it was trained in."""
    bucket_of = {fact: i for i, bucket in enumerate(buckets(recipe.corpus)) for fact in bucket}
    number = counts(recipe.corpus)
    return [
        Question(
            prompt=question.prompt,
            continuation=question.continuation,
            answer=question.answer,
            family=facts()[i].family,
            count=number[i],
            bucket=bucket_of[i],
            leaves=leaves,
        )
        for i, (question, leaves) in enumerate(
            zip(held_out(recipe.corpus), trained_leaves(recipe, work), strict=True)
        )
    ]


def add_names(recipe: Recipe, out: Path) -> str:
    """Name the clusters of a model folder by what the prompts in them ask about; trains nothing.

    Of each document the name of its entity is taken, which is what routes it (the encoder gives
    the words of a wording next to no weight). What is common weighs more than what is rare.

    Returns:
        The bank's new revision.
    """
    lm = load(out)
    branching, levels = lm.bank.config.branching, lm.bank.config.levels
    found = list(documents(recipe.corpus))
    distinct = sorted({document.prompt for document in found})
    leaves: dict[str, int] = {}
    for start in range(0, len(distinct), _BATCH):
        batch = distinct[start : start + _BATCH]
        leaves.update(zip(batch, lm.assign(batch)[:, -1].tolist(), strict=True))
    lm.bank.close()
    members: list[list[str]] = [[] for _ in range(branching**levels)]
    for document in found:
        members[leaves[document.prompt]].append(facts()[document.fact_index].entity)
    names = name_tree(members.__getitem__, branching, levels)
    assert names is not None, "every document has the name of its entity"
    with BankEdit(out / "memory") as edit:
        edit.set_names(names.to_bytes())
    return edit.revision


def build(recipe: Recipe, work: Path, out: Path, jobs: int) -> None:
    """The whole way: stages, model folder, names, figures and model card."""
    run_stages(recipe, work, jobs)
    assemble(recipe, work, out)
    add_names(recipe, out)
    write_card(recipe, out, json.loads((work / "seconds.json").read_text()))


def _copy_half(source: Path, target: Path) -> None:
    """Copy weights in the dtype that ships."""
    weights = {name: value.astype(DTYPE) for name, value in load_arrays(source).items()}
    mx.save_safetensors(str(target), weights, {"format": "mlx"})
