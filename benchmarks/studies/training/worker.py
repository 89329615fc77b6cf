"""One run of a training study, in a process of its own: train, then ask the held-out questions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlx_hiermem.backend import keep_freed_memory, preload_blas

preload_blas()
keep_freed_memory()

import numpy as np  # noqa: E402  (after the BLAS)

from mlx_hiermem.bank.store import MemoryBank  # noqa: E402
from mlx_hiermem.bank.writer import write_bank  # noqa: E402
from mlx_hiermem.config import AnchorShape, MemoryConfig  # noqa: E402
from mlx_hiermem.engine import MemoryLM  # noqa: E402
from mlx_hiermem.evaluation import facts, routing  # noqa: E402
from mlx_hiermem.memories import GENERIC, MemoryModel, attach, detach  # noqa: E402
from mlx_hiermem.training.rows import BankRows  # noqa: E402
from mlx_hiermem.training.trainer import Trainer, parameter_count  # noqa: E402

from .parts import Parts, Routed, settings  # noqa: E402
from .routes import Way  # noqa: E402
from .task import Anchor, Result, Score, Task  # noqa: E402

Note = Callable[[], object]


@cache
def _parts(work: str) -> Parts:
    """Of all runs of this process, so that model and questions are read once."""
    return Parts(Path(work))


def make_anchor(work: str, fields: dict[str, Any], seed: int, note: Note) -> None:
    """Train an anchor that several runs want, unless it is there."""
    _parts(work).make_anchor(Anchor(**fields), seed, note)


def route(work: str, fields: dict[str, Any], note: Note) -> None:
    """Grow a tree that several runs want, and pack the corpus under it."""
    _parts(work).routed(Way(**fields))
    note()


def run(work: str, fields: dict[str, Any], note: Note) -> str:
    """Do a task.

    Args:
        work: the folder of shared parts.
        fields: of the task.
        note: called after each step.

    Returns:
        Its ``Result``, as JSON.
    """
    return Run(Task.of(fields), _parts(work), note).do().to_json()


class Run:
    """A task while it is done."""

    def __init__(self, task: Task, parts: Parts, note: Note) -> None:
        self.task, self.parts, self._note = task, parts, note
        self.recipe = parts.recipe
        everything, self.buckets = parts.questions
        limit = len(everything) if task.questions is None else task.questions
        step = max(1, len(everything) // limit)
        self._chosen = list(range(0, len(everything), step))[:limit]
        self.questions = [everything[i] for i in self._chosen]

    def do(self) -> Result:
        """Train and ask."""
        task = self.task
        anchor = self.parts.anchor(task.anchor, task.seed)
        if task.regime == "anchor":
            return self._bare(anchor)
        routed = self.parts.routed(Way(task.branching, task.levels, task.encoder, task.views))
        encoder = self.parts.lm.bank.config.encoder
        config = MemoryConfig(
            task.ranks, kind=task.kind, branching=task.branching, layers=task.layers,
            encoder=encoder, dtype="float32",
            base_anchor=self._base(anchor),
        )  # fmt: skip
        model = attach(anchor, config)
        if task.regime == "cotrain":
            anchor.model.embed_tokens.freeze()  # as in the recipe; they are trained already
        trainer = Trainer(model, routed.corpus, settings(task, self.recipe))

        def score() -> Score:
            trainer.settle()
            return self._scores(model, trainer.rows, routed, ("fetched",))["fetched"]

        losses, curve = self._train(trainer, score)
        if task.generic:
            self._train_generic(model, trainer.rows, routed)
        scores = self._scores(model, trainer.rows, routed, ("none", "fetched", *self._generic()))
        return Result(
            task, parameter_count(anchor), config.fetch_size(), config.bank_size(),
            self._tokens(), _last(losses), scores, self._landed(routed),
            sum(map(len, routed.leaves)) / len(routed.leaves), curve,
        )  # fmt: skip

    def _generic(self) -> tuple[str, ...]:
        return ("generic",) if self.task.generic else ()

    def _tokens(self) -> int:
        return self.task.steps * self.recipe.batch_size * self.recipe.sequence_length

    def _bare(self, anchor: Any) -> Result:
        """Train the anchor alone for as many steps."""
        trainer = Trainer(anchor, self.parts.mixed(), settings(self.task, self.recipe))
        config = MemoryConfig((1,), base_anchor=self._base(anchor))  # which no step uses

        def score() -> Score:
            trainer.settle()
            model = attach(anchor, config)
            try:
                return self._ask_all(model, None, None, ("none",))["none"]
            finally:
                detach(model)

        losses, curve = self._train(trainer, score)
        size, scores = parameter_count(anchor), {"none": score()}
        return Result(self.task, size, 0, 0, self._tokens(), _last(losses), scores, curve=curve)

    def _base(self, anchor: Any) -> dict[str, Any]:
        return {"name": "atlas study", "shape": vars(AnchorShape.of(anchor))}

    def _step(self, trainer: Trainer) -> float:
        loss = trainer.step().loss
        self._note()
        return loss

    def _train(
        self, trainer: Trainer, score: Callable[[], Score]
    ) -> tuple[list[float], list[tuple[int, float, float]]]:
        """All steps; the losses, and the curve."""
        losses: list[float] = []
        curve: list[tuple[int, float, float]] = []
        every, last = self.task.every, 0
        for number in range(1, self.task.steps + 1):
            losses.append(self._step(trainer))
            if every and (number % every == 0 or number == self.task.steps):
                part, last = losses[last:], number
                curve.append((number, sum(part) / len(part), score().facts))
        trainer.settle()
        return losses, curve

    def _train_generic(self, model: MemoryModel, rows: BankRows, routed: Routed) -> None:
        """Train the generic memory on, alone, for as many steps again, as the atlas's was."""
        levels = model.config.memory_levels
        start = {level: next(rows.values(level, [GENERIC])) for level in levels}
        alone = BankRows(model.config, lambda level, cluster: start[level])
        trainer = Trainer(
            model, routed.corpus, settings(self.task, self.recipe, generic=True), alone
        )
        for _ in range(self.task.steps):
            self._step(trainer)
        self._alone = alone

    # ---- asking ------------------------------------------------------------------------

    def _scores(
        self, model: MemoryModel, rows: BankRows, routed: Routed, memories: Sequence[str]
    ) -> dict[str, Score]:
        """The questions with a bank of what was learned."""
        config = model.config
        generic = self._alone if "generic" in memories else rows
        with tempfile.TemporaryDirectory(dir=self.parts.work) as folder:
            write_bank(
                Path(folder),
                config,
                {
                    level: np.stack(list(rows.values(level, range(config.clusters(level)))))
                    for level in config.memory_levels
                },
                np.concatenate(
                    [next(generic.values(level, [GENERIC])) for level in config.memory_levels]
                ),
            )
            with MemoryBank.open(folder) as bank:
                return self._ask_all(model, bank, routed, memories)

    def _ask_all(
        self, model: MemoryModel, bank: Any, routed: Routed | None, memories: Sequence[str]
    ) -> dict[str, Score]:
        lm = self.parts.lm
        length = {"max_position_embeddings": lm.context_length}
        way = (None, None) if routed is None else (routed.tree, routed.encoder)
        own = MemoryLM(model, lm.tokenizer, bank, *way, length)
        return {memory: self._ask(own, memory) for memory in memories}

    def _ask(self, lm: MemoryLM, memory: str) -> Score:
        memories: list[Any] = [memory] * len(self.questions)
        if memory == "fetched":
            paths = lm.assign([question.prompt for question in self.questions])
            memories = [tuple(path) for path in paths.tolist()]
        pairs = [(question.prompt, question.continuation) for question in self.questions]
        right = facts.ask(lm, pairs, memories).right
        shares = facts.by_bucket(self.questions, self.buckets, {memory: right})[memory]
        # Texts of about one length follow each other, so that little is padding.
        texts = sorted((one.prompt + one.continuation for one in self.questions), key=len)
        return Score(float(right.mean()), shares, lm.perplexity(texts, memory))

    def _landed(self, routed: Routed) -> float:
        """Whether questions arrive where their facts were trained."""
        prompts = [question.prompt for question in self.questions]
        ids, _ = routed.tree.assign(routed.encoder.encode(prompts))
        leaves = [routed.leaves[i] for i in self._chosen]
        return float(routing.lands(ids, leaves, self.task.branching)[:, -1].mean())


def _last(losses: Sequence[float]) -> float:
    part = losses[-max(1, len(losses) // 10) :]
    return sum(part) / len(part)
