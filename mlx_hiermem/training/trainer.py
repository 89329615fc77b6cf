"""The training loop for the regimes ``anchor``, ``frozen`` and ``cotrain``.

- ``anchor``: the bare anchor, no memories.
- ``frozen``: only memories learn (post-hoc).
- ``cotrain``: anchor and memories learn together, from a trained anchor.

With memories each sequence uses the fetched memory of its leaf, or, with probability
``generic_probability``, the generic memory. Only the rows of a batch get gradients.
Source: section 3 and appendix A of the paper.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from ..corpus.packed import PackedCorpus
from ..errors import TrainingError
from ..memories import MemoryModel
from .objective import next_token_loss
from .rows import BankRows

REGIMES = ("anchor", "frozen", "cotrain")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that steers one training run. The defaults are the paper's, for memories.

    Attributes:
        regime: one of ``REGIMES``.
        steps: optimizer steps.
        batch_size: sequences per step.
        learning_rate, final_learning_rate: peak, and where the cosine ends.
        anchor_share: in co-training the anchor's learning rate as a share of the memories'; 1 in
            the paper. Parameters that are frozen (``Module.freeze``) stay as they are.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's decoupled decay (1e-3 for memories, 0.05 for anchors).
        clip: largest global gradient norm.
        generic_probability: share of sequences that use the generic memory; None means
            1 / (k + 1). 1.0 trains the generic memory alone.
        mask_documents: keep attention inside documents.
        seed: order of the sequences and choice of those that use the generic memory.
    """

    regime: Literal["anchor", "frozen", "cotrain"]
    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    anchor_share: float = 1.0
    warmup_steps: int = 0
    weight_decay: float = 1e-3
    clip: float = 1.0
    generic_probability: float | None = None
    mask_documents: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise TrainingError(f"regime {self.regime!r}: expected one of {', '.join(REGIMES)}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.generic_probability is not None and not 0 <= self.generic_probability <= 1:
            raise TrainingError(
                f"generic_probability is {self.generic_probability}: expected 0 to 1"
            )

    def rate(self, step: int) -> float:
        """Learning rate at ``step`` (from 0): linear warm-up, then a cosine to the final rate."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine


@dataclass(frozen=True)
class StepReport:
    """What one step did: step (from 1), loss in nats, learning rate, gradient norm, tokens/s."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float


class Trainer:
    """Trains an anchor, or a :class:`MemoryModel` with its bank's rows, on a packed corpus.

    Args:
        model: a bare anchor (regime ``anchor``) or a ``MemoryModel``.
        corpus: packed sequences.
        config: the run's settings.
        rows: the bank in training; made fresh when memories are trained and none are given.
        generic: the generic memory, one (s_l,) float32 per level with memory, likewise.

    After ``run`` the results are in ``model``, ``rows`` and ``generic``.

    Raises:
        TrainingError: the regime and the model do not fit, or the loss is no longer a number.
    """

    def __init__(
        self,
        model: nn.Module,
        corpus: PackedCorpus,
        config: TrainConfig,
        rows: BankRows | None = None,
        generic: list[mx.array] | None = None,
    ):
        with_memory = config.regime != "anchor"
        if with_memory != isinstance(model, MemoryModel):
            needed = "a model with memories" if with_memory else "a bare anchor"
            raise TrainingError(
                f"regime {config.regime} needs {needed}, got {type(model).__name__}; see "
                "memories.attach and memories.detach"
            )
        self.model, self.corpus, self.config = model, corpus, config
        self.rows, self.generic = rows, generic
        self._generic_probability = 0.0
        if with_memory:
            memory = model.config
            mx.random.seed(config.seed)
            probability = config.generic_probability
            self._generic_probability = (
                1 / (memory.branching + 1) if probability is None else probability
            )
            if self.generic is None:
                self.generic = [model.init_block(level) for level in memory.memory_levels]
            if self.rows is None and self._generic_probability < 1:
                self.rows = BankRows(memory, model.init_block)
        self._trains_anchor = config.regime != "frozen"
        # One each, since a step without a generic sequence must not count for the generic memory.
        self._optimizers = {
            name: optim.AdamW(
                config.learning_rate,
                betas=[0.9, 0.95],
                weight_decay=config.weight_decay,
                bias_correction=True,
            )
            for name in ("anchor", "generic")
        }
        self._rng = np.random.default_rng([config.seed, 1])

    def run(
        self, on_step: Callable[[StepReport], None] | None = None, progress: bool = True
    ) -> float:
        """Train for ``config.steps`` steps; returns the mean loss of the last tenth, in nats."""
        losses = []
        with tqdm(
            total=self.config.steps, desc=self.config.regime, unit="step", disable=not progress
        ) as bar:
            for report in self.steps():
                losses.append(report.loss)
                bar.update()
                bar.set_postfix_str(
                    f"loss {report.loss:.3f}, {report.tokens_per_second:,.0f} tokens/s",
                    refresh=False,
                )
                if on_step is not None:
                    on_step(report)
        return float(np.mean(losses[-max(1, len(losses) // 10) :]))

    def steps(self) -> Iterator[StepReport]:
        """The steps, one report each."""
        batches = self.corpus.batches(self.config.batch_size, self.config.seed)
        for step in range(self.config.steps):
            started = time.perf_counter()
            tokens, leaves = next(batches)
            loss, norm, count = self._step(tokens, leaves, self.config.rate(step))
            if not math.isfinite(loss):
                raise TrainingError(
                    f"step {step + 1}: the loss is {loss}; lower the learning rate "
                    f"({self.config.learning_rate}) or the clipping ({self.config.clip})"
                )
            seconds = time.perf_counter() - started
            yield StepReport(step + 1, loss, self.config.rate(step), norm, count / seconds)

    def _step(
        self, tokens: np.ndarray, leaves: np.ndarray, rate: float
    ) -> tuple[float, float, int]:
        """One optimizer step; returns loss, gradient norm before clipping, tokens predicted."""
        use_generic = self._rng.random(len(leaves)) < self._generic_probability
        ids: dict[int, np.ndarray] = {}
        rows: list[mx.array] = []
        places: list[mx.array] = []
        if self.rows is not None and not use_generic.all():
            # Sequences that use the generic memory must not leave their mark on a block: rows are
            # gathered for the others alone.
            ids, rows, places = self.rows.gather(leaves[~use_generic])
        learned: dict[str, Any] = {"rows": rows}
        if self._trains_anchor:
            learned["anchor"] = self._anchor.trainable_parameters()
        if use_generic.any():
            learned["generic"] = self.generic
        order = np.argsort(np.argsort(use_generic, kind="stable"), kind="stable")

        def loss_of(learned: dict[str, Any], tokens: mx.array) -> tuple[mx.array, mx.array]:
            if "anchor" in learned:
                self._anchor.update(learned["anchor"])
            memory = self._memory(learned, places, use_generic, order)
            return next_token_loss(
                self.model, tokens, memory, self.corpus.end_of_text, self.config.mask_documents
            )

        (loss, count), gradients = mx.value_and_grad(loss_of)(learned, mx.array(tokens))
        gradients, norm = optim.clip_grad_norm(gradients, self.config.clip)
        if ids:
            self.rows.update(ids, rows, gradients["rows"], rate, self.config.weight_decay)
        for name, optimizer in self._optimizers.items():
            if name in learned:
                share = self.config.anchor_share if name == "anchor" else 1.0
                optimizer.learning_rate = rate * share
                learned |= optimizer.apply_gradients({name: gradients[name]}, {name: learned[name]})
        if "anchor" in learned:
            self._anchor.update(learned["anchor"])
        if "generic" in learned:
            self.generic = learned["generic"]
        mx.eval(learned, [optimizer.state for optimizer in self._optimizers.values()])
        return loss.item(), norm.item(), int(count.item())

    def _memory(
        self,
        learned: dict[str, Any],
        places: list[mx.array],
        use_generic: np.ndarray,
        order: np.ndarray,
    ) -> mx.array | None:
        """The batch's memory (B or 1, L, 3, R, d), from compact rows and the generic memory."""
        if not isinstance(self.model, MemoryModel):
            return None
        parts = []
        if learned["rows"]:
            # (U_l, s_l) -> (sequences with fetched memory, s_l) -> (..., L, 3, R, d)
            parts.append(
                self.model.join(
                    [row[place] for row, place in zip(learned["rows"], places, strict=True)]
                )
            )
        if "generic" in learned:
            generic = self.model.join([block[None] for block in learned["generic"]])
            if not parts:
                return generic
            parts.append(mx.repeat(generic, int(use_generic.sum()), axis=0))
        if len(parts) == 1:
            return parts[0]
        # Fetched memories stand first and generic ones last; put them back in the batch's order.
        return mx.concatenate(parts)[mx.array(order)]

    @property
    def _anchor(self) -> nn.Module:
        return self.model.anchor if isinstance(self.model, MemoryModel) else self.model


def parameter_count(model: nn.Module) -> int:
    """Numbers in a model's parameters."""
    return sum(value.size for _, value in tree_flatten(model.parameters()))
