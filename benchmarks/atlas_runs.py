"""Runs that train memories on a frozen anchor of the atlas, for benchmarks of kinds and placements.

The anchor is the atlas's second control: bare, and trained on as many tokens as anchor and memory
together, so that it was made for no kind of memory. Corpus, routes and held-out questions are those
of the atlas. Several runs go side by side, one processor each.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_hiermem.errors import InputError

#: Optimizer steps of a run, and its peak learning rate (the atlas's own is 1e-2).
STEPS, RATE = 600, 1e-2
#: Of ``--smoke``.
SMOKE_STEPS, SMOKE_QUESTIONS = 2, 24


@dataclass(frozen=True)
class Task:
    """One run: what memory, and with which settings."""

    name: str
    kind: str
    ranks: tuple[int, ...]
    layers: tuple[int, ...] | None
    steps: int
    rate: float
    questions: int | None
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        fetch_size, bank_size: numbers of a fetched memory, and of the bank.
        loss: of the last tenth of the steps, nats per token.
        facts: share of the held-out questions that are answered exactly, with fetched memory.
        perplexity: per token of questions and answers, with fetched memory.
        bare_facts, bare_perplexity: the same with memory off.
    """

    task: Task
    fetch_size: int
    bank_size: int
    loss: float
    facts: float
    perplexity: float
    bare_facts: float
    bare_perplexity: float


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, metavar="N", help=f"of each run (default: {STEPS})")
    parser.add_argument(
        "--rate", type=float, metavar="X",
        help=f"peak learning rate of each run (default: {RATE:g}, or what the kind wants)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="ask only N questions, evenly drawn")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the runs")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs side by side (default: one for each processor)"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figure here")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that all runs of a call share.

    Raises:
        InputError: one of them is out of range.
    """
    for name in ("steps", "limit", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; expected at least 1")
    if args.rate is not None and not 0 < args.rate < math.inf:
        raise InputError(f"--rate is {args.rate}; expected more than 0")
    return {
        "steps": args.steps or (SMOKE_STEPS if args.smoke else STEPS),
        "rate": args.rate or RATE,
        "questions": args.limit or (SMOKE_QUESTIONS if args.smoke else None),
        "seed": args.seed,
    }


def run_all(tasks: Sequence[Task], jobs: int | None) -> dict[str, Result]:
    """Run all tasks, some at a time; results by name, in the order of the tasks."""
    from tqdm import tqdm

    jobs = min(jobs or os.cpu_count() or 1, len(tasks))
    # Read by the BLAS when a worker loads it: each has one processor.
    known = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    folder = Path(tempfile.mkdtemp(prefix="atlas-runs-"))
    found: dict[str, Result] = {}
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            pool.submit(_prepare, str(folder)).result()
        with ProcessPoolExecutor(jobs, context) as pool:
            futures = [pool.submit(_run, str(folder), asdict(task)) for task in tasks]
            with tqdm(total=len(tasks), unit="run", disable=None) as bar:
                for future in as_completed(futures):
                    result = future.result()
                    found[result.task.name] = result
                    bar.update()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if known is None:
            del os.environ["OPENBLAS_NUM_THREADS"]
        else:
            os.environ["OPENBLAS_NUM_THREADS"] = known
    return {task.name: found[task.name] for task in tasks}


# ---- in a process of its own -------------------------------------------------------------


def _prepare(folder: str) -> None:
    """Route and pack the corpus once, for all runs."""
    from mlx_hiermem.backend import preload_blas

    preload_blas()
    import numpy as np

    from apps.atlas.corpus import documents
    from apps.atlas.recipe import Recipe
    from mlx_hiermem import load
    from mlx_hiermem.corpus.packed import pack

    recipe, lm = Recipe(), load("atlas")
    everything = list(documents(recipe.corpus))
    prompts = sorted({document.prompt for document in everything})
    ids, _ = lm.tree.assign(lm.encoder.encode(prompts))
    leaf = dict(zip(prompts, ids[:, -1].tolist(), strict=True))
    packed = pack(
        (
            (lm.tokenizer.encode(document.text, add_special_tokens=False), leaf[document.prompt])
            for document in everything
        ),
        recipe.sequence_length,
        end_of_text=0,
    )
    np.savez(Path(folder) / "corpus.npz", tokens=packed.tokens, leaves=packed.leaves)


def _run(folder: str, fields: Mapping[str, Any]) -> Result:
    """Train one memory, and ask the questions."""
    from mlx_hiermem.backend import keep_freed_memory, preload_blas

    preload_blas()
    keep_freed_memory()
    import numpy as np

    from apps.atlas.recipe import Recipe
    from mlx_hiermem import load
    from mlx_hiermem.config import AnchorShape, MemoryConfig
    from mlx_hiermem.corpus.packed import PackedCorpus
    from mlx_hiermem.evaluation import facts
    from mlx_hiermem.memories import attach, detach
    from mlx_hiermem.models import find_model
    from mlx_hiermem.training.config import TrainConfig
    from mlx_hiermem.training.trainer import Trainer

    task = Task(**fields)
    home, lm = find_model("atlas"), load("atlas")
    anchor = detach(facts.load_control(lm, home / facts.CONTROL_FILE).model)
    base = {"name": "atlas control", "shape": asdict(AnchorShape.of(anchor))}
    config = MemoryConfig(
        task.ranks, kind=task.kind, branching=lm.bank.config.branching, layers=task.layers,
        encoder=lm.bank.config.encoder, dtype="float32", base_anchor=base,
    )  # fmt: skip
    with np.load(Path(folder) / "corpus.npz") as arrays:
        corpus = PackedCorpus(arrays["tokens"], arrays["leaves"], 0)
    model = attach(anchor, config)
    trainer = Trainer(
        model,
        corpus,
        TrainConfig(
            "frozen", iters=task.steps, batch_size=Recipe().batch_size, learning_rate=task.rate,
            final_learning_rate=task.rate / 10, warmup_steps=min(50, task.steps // 2),
            seed=task.seed,
        ),
    )  # fmt: skip
    losses = [trainer.step().loss for _ in range(task.steps)]
    worth = _ask(Path(tempfile.mkdtemp(dir=folder)), trainer, lm, home, task.questions)
    last = losses[-max(1, task.steps // 10) :]
    return Result(task, config.fetch_size(), config.bank_size(), sum(last) / len(last), *worth)


def _ask(bank: Path, trainer: Any, lm: Any, home: Path, limit: int | None) -> tuple[float, ...]:
    """Facts and perplexity with fetched memory, and with memory off."""
    import numpy as np
    from tqdm import tqdm

    from mlx_hiermem.bank.store import MemoryBank
    from mlx_hiermem.bank.writer import write_bank
    from mlx_hiermem.engine import MemoryLM
    from mlx_hiermem.evaluation import facts
    from mlx_hiermem.evaluation.questions import read_questions
    from mlx_hiermem.memories import GENERIC

    from .quantize import ask

    config, rows = trainer.model.config, trainer.rows
    levels = config.memory_levels
    write_bank(
        bank,
        config,
        {
            level: np.stack(list(rows.values(level, range(config.clusters(level)))))
            for level in levels
        },
        np.concatenate([next(rows.values(level, [GENERIC])) for level in levels]),
    )
    questions, _ = read_questions(home / facts.QUESTIONS_FILE)
    if limit is not None:
        questions = questions[:: max(1, len(questions) // limit)][:limit]
    with MemoryBank.open(bank) as opened, tqdm(disable=True) as bar:
        length = {"max_position_embeddings": lm.context_length}
        ours = MemoryLM(trainer.model, lm.tokenizer, opened, lm.tree, lm.encoder, length)
        on, off = (ask(ours, questions, memory, bar) for memory in ("fetched", "none"))
    return on.facts, on.texts, off.facts, off.texts
