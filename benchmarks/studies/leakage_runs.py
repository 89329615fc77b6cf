"""Twins for the leakage study: a model that saw a topic, and one that never did.

Both have the atlas's sizes, tokenizer, encoder and tree. Of each seed an anchor is trained from
random weights, and then memories on it, frozen; the second twin gets the same steps, from the same
weights, on the corpus without the documents of the facts that are asked about. Runs go side by
side, one processor each.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .workers import processes

if TYPE_CHECKING:
    from mlx_hiermem.engine import MemoryLM
    from mlx_hiermem.evaluation.leakage import Leakage

#: Optimizer steps of each anchor and of the memories on it. Of ``--smoke``, with the documents
#: that are trained on.
STEPS, SMOKE_STEPS, SMOKE_DOCUMENTS = 600, 2, 1500
#: Peak learning rate of the memories, as in ``atlas_runs``.
RATE = 1e-2


@dataclass(frozen=True)
class Topic:
    """What is removed, and what is asked about it.

    Attributes:
        name: of it.
        blocks: pairs (level, cluster).
        questions: indices into the atlas's questions, and into its facts.
    """

    name: str
    blocks: tuple[tuple[int, int], ...]
    questions: tuple[int, ...]


@dataclass(frozen=True)
class Twin:
    """One run. ``saw``: whether the topics were in its corpus."""

    seed: int
    saw: bool
    steps: int

    @property
    def name(self) -> str:
        return f"{'saw' if self.saw else 'never'}-{self.seed}"


def run_all(
    seeds: Sequence[int], steps: int, limit: int, candidates: int, jobs: int | None, smoke: bool
) -> tuple[list[Topic], dict[int, dict[str, Leakage]]]:
    """Train all twins and measure them.

    Args:
        steps: of each anchor, and of the memories on it.
        limit: questions of a topic that are asked, evenly drawn.
        candidates: that a true answer is ranked with, itself included.
        jobs: runs side by side; by default one for each processor.

    Returns:
        The topics, and seed -> topic -> what is left of it.
    """
    jobs = 0 if smoke else jobs or os.cpu_count() or 1
    folder = Path(tempfile.mkdtemp(prefix="leakage-"))
    twins = [Twin(seed, saw, steps) for seed in seeds for saw in (True, False)]
    try:
        documents = SMOKE_DOCUMENTS if smoke else None
        _each(_prepare, [(str(folder), documents, limit)], min(1, jobs), "corpus")
        _each(_train, [(str(folder), asdict(twin)) for twin in twins], jobs, "run")
        found = _each(
            _measure, [(str(folder), seed, candidates) for seed in seeds], jobs, "measured"
        )
        topics = _topics(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return topics, dict(zip(seeds, found, strict=True))


def _each(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int, unit: str
) -> list[Any]:
    """Call a function several times, in processes of their own (0 jobs: in this one); results in
    the order of the calls."""
    from tqdm import tqdm

    if jobs == 0:
        return [function(*call) for call in calls]
    with processes(min(jobs, len(calls))) as pool:
        futures = [pool.submit(function, *call) for call in calls]
        with tqdm(total=len(calls), unit=unit, disable=None) as bar:
            for future in as_completed(futures):
                future.result()
                bar.update()
        return [future.result() for future in futures]


# ---- in a process of its own -------------------------------------------------------------


def _topics(folder: Path) -> list[Topic]:
    return [
        Topic(one["name"], tuple(map(tuple, one["blocks"])), tuple(one["questions"]))
        for one in json.loads((folder / "topics.json").read_text())
    ]


def _prepare(folder: str, documents: int | None, limit: int) -> None:
    """Choose the topics; route and pack both corpora, once for all runs."""
    from mlx_hiermem.backend import preload_blas

    preload_blas()
    import numpy as np

    from apps.atlas import corpus
    from apps.atlas.recipe import Recipe
    from mlx_hiermem import load
    from mlx_hiermem.corpus.packed import pack
    from mlx_hiermem.evaluation.facts import QUESTIONS_FILE, read_questions
    from mlx_hiermem.models import find_model

    recipe, lm = Recipe(), load("atlas")
    questions, _ = read_questions(find_model("atlas") / QUESTIONS_FILE)
    topics = _choose(lm, questions, lm.assign([question.prompt for question in questions]))
    lm.bank.close()
    asked = {index for topic in topics for index in topic.questions}
    drawn = [
        {**asdict(one), "questions": one.questions[:: -(-len(one.questions) // limit)]}
        for one in topics
    ]
    (Path(folder) / "topics.json").write_text(json.dumps(drawn))
    everything = list(corpus.documents(recipe.corpus))[:documents]
    prompts = sorted({document.prompt for document in everything})
    leaf = dict(zip(prompts, lm.assign(prompts)[:, -1].tolist(), strict=True))
    tokens = [
        lm.tokenizer.encode(document.text, add_special_tokens=False) for document in everything
    ]
    for saw in (True, False):
        kept = [
            (ids, leaf[document.prompt])
            for ids, document in zip(tokens, everything, strict=True)
            if saw or document.fact_index not in asked
        ]
        for regime, pairs in (("anchor", [(ids, 0) for ids, _ in kept]), ("memory", kept)):
            packed = pack(iter(pairs), recipe.sequence_length, end_of_text=0)
            name = f"{regime}-{saw}.npz"
            np.savez(Path(folder) / name, tokens=packed.tokens, leaves=packed.leaves)


def _choose(lm: MemoryLM, questions: Sequence[Any], paths: Any) -> list[Topic]:
    """The level-1 subtree with a middling number of questions, and of the leaves outside of it the
    one with the most questions whose documents all lie under it: what its block knows."""
    import numpy as np

    from mlx_hiermem.bank.remove import subtree

    config = lm.bank.config
    roots = np.bincount(paths[:, 0], minlength=config.roots)
    root = int(np.argsort(roots, kind="stable")[config.roots // 2])
    alone = [
        path[-1]
        for question, path in zip(questions, paths.tolist(), strict=True)
        if path[0] != root and question.leaves == [path[-1]]
    ]
    leaf = int(np.bincount(alone).argmax())
    blocks = sorted(pair for pair in subtree(config, root) if pair[0] in config.memory_levels)
    of_root, of_leaf = np.flatnonzero(paths[:, 0] == root), np.flatnonzero(paths[:, -1] == leaf)
    return [
        Topic("leaf", ((config.levels, leaf),), tuple(of_leaf.tolist())),
        Topic("subtree", tuple(blocks), tuple(of_root.tolist())),
    ]


def _config() -> Any:
    """The memory config of the atlas, in float32."""
    from dataclasses import replace

    from mlx_hiermem.config import MemoryConfig
    from mlx_hiermem.models import find_model

    return replace(
        MemoryConfig.load(find_model("atlas") / "memory" / "config.json"), dtype="float32"
    )


def _train(folder: str, fields: dict[str, Any]) -> None:
    """Train an anchor and memories on it; leave both in a folder."""
    from mlx_hiermem.backend import keep_freed_memory, preload_blas

    preload_blas()
    keep_freed_memory()
    import mlx.core as mx
    import numpy as np

    from apps.atlas.recipe import Recipe, save_weights
    from mlx_hiermem.anchors import openlm
    from mlx_hiermem.bank.writer import write_bank
    from mlx_hiermem.corpus.packed import PackedCorpus
    from mlx_hiermem.memories import GENERIC, attach
    from mlx_hiermem.training.config import TrainConfig
    from mlx_hiermem.training.trainer import Trainer

    twin, recipe, out = Twin(**fields), Recipe(), Path(folder)

    def corpus(regime: str) -> PackedCorpus:
        with np.load(out / f"{regime}-{twin.saw}.npz") as arrays:
            return PackedCorpus(arrays["tokens"], arrays["leaves"], 0)

    def train(trainer: Trainer) -> Trainer:
        for _ in range(twin.steps):
            trainer.step()
        trainer.settle()
        return trainer

    mx.random.seed(twin.seed)
    anchor = openlm.Model(recipe.anchor)
    openlm.init_weights(anchor)
    train(Trainer(anchor, corpus("anchor"), recipe.anchor_training(twin.steps, twin.seed)))
    config = _config()
    settings = TrainConfig(
        "frozen", iters=twin.steps, batch_size=recipe.batch_size, learning_rate=RATE,
        final_learning_rate=RATE / 10, warmup_steps=min(50, twin.steps // 2), seed=twin.seed,
    )  # fmt: skip
    trainer = train(Trainer(attach(anchor, config), corpus("memory"), settings))
    levels, rows = config.memory_levels, trainer.rows
    save_weights(trainer.model.anchor, out / f"{twin.name}.safetensors")
    write_bank(
        out / twin.name,
        config,
        {
            level: np.stack(list(rows.values(level, range(config.clusters(level)))))
            for level in levels
        },
        np.concatenate([next(rows.values(level, [GENERIC])) for level in levels]),
    )


def _open(folder: Path, lm: MemoryLM, weights: str, bank: str) -> MemoryLM:
    """A model of the study: its own anchor and bank, the atlas's tokenizer and routing."""
    from apps.atlas.recipe import Recipe, load_anchor_weights
    from mlx_hiermem.bank.store import MemoryBank
    from mlx_hiermem.engine import MemoryLM
    from mlx_hiermem.memories import attach

    model = attach(load_anchor_weights(Recipe(), folder / f"{weights}.safetensors"), _config())
    length = {"max_position_embeddings": lm.context_length}
    opened = MemoryBank.open(folder / bank)
    return MemoryLM(model, lm.tokenizer, opened, lm.tree, lm.encoder, length)


def _measure(folder: str, seed: int, candidates: int) -> dict[str, Leakage]:
    """Remove each topic from a copy of the bank, and measure what is left."""
    from mlx_hiermem.backend import preload_blas

    preload_blas()
    from mlx_hiermem import load
    from mlx_hiermem.bank.remove import remove
    from mlx_hiermem.evaluation import leakage
    from mlx_hiermem.evaluation.facts import QUESTIONS_FILE, read_questions
    from mlx_hiermem.models import find_model

    home, atlas = Path(folder), load("atlas")
    pool, _ = read_questions(find_model("atlas") / QUESTIONS_FILE)
    saw, never = Twin(seed, True, 0).name, Twin(seed, False, 0).name
    before = _open(home, atlas, saw, saw)
    other = _open(home, atlas, never, never)
    found, opened = {}, [atlas, before, other]
    for topic in _topics(home):
        copy = f"{saw}-{topic.name}"
        shutil.copytree(home / saw, home / copy)
        remove(home / copy, topic.blocks)
        opened.append(_open(home, atlas, saw, copy))
        found[topic.name] = leakage.measure(
            opened[-1],
            [pool[index] for index in topic.questions],
            topic.blocks,
            candidates=_candidates(topic, pool, candidates),
            before=before,
            never=other,
        )
    for one in opened:
        one.bank.close()
    return found


def _candidates(topic: Topic, pool: Sequence[Any], most: int) -> list[list[str]]:
    """Wrong answers of the same relation: a code is ranked among codes of its kind."""
    from dataclasses import replace

    from apps.atlas.facts import facts
    from mlx_hiermem.evaluation.leakage import family_candidates

    relations = [
        replace(question, family=f"{fact.family} {fact.relation}")
        for question, fact in zip(pool, facts(), strict=True)
    ]
    return family_candidates([relations[index] for index in topic.questions], relations, most)
