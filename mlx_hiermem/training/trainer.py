"""One optimizer step after the other, for each regime of ``config.py``.

With memories each sequence uses the fetched memory of its leaf or, with the generic probability,
the generic memory. Only the rows of a batch get gradients (section 3 of the paper).

Notable: everything random in a step follows from the seed and the step's number, so a run that
resumes sees what it would have seen. Weights and optimizer state are float32; with ``bfloat16`` the
computation sees them rounded. A step whose loss or gradient is no number changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..arrays import real_number
from ..corpus.packed import PackedCorpus
from ..errors import TrainingError
from ..memories import MemoryModel
from ..memories.recompute import recompute_layers
from .config import TrainConfig
from .distributed import Processes
from .objective import next_token_loss, predicted_tokens
from .order import SequenceOrder
from .rows import BankRows, Key

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: its number, from 1.
        loss: mean over the tokens predicted, in nats.
        learning_rate: of the memories, or of a bare anchor.
        gradient_norm: of all gradients together, before clipping.
        tokens: predicted in this step, over all processes.
        tokens_per_second: of them.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float


class LossError(TrainingError):
    """A loss is no number any more."""


class Trainer:
    """Trains an anchor, or a :class:`MemoryModel` with its bank's rows, on a packed corpus.

    Args:
        model: a bare anchor (regime ``anchor``) or a ``MemoryModel``; its trainable parameters
            learn, those that are frozen (``Module.freeze``) stay as they are.
        corpus: packed sequences.
        config: the run's settings.
        rows: the bank in training; a fresh one in memory by default.
        processes: of a distributed run; those that ``mlx.launch`` started by default.

    Attributes:
        done: steps done.
        rows: the bank in training, the generic memory included; None without memories.

    Raises:
        TrainingError: the regime and the model do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        corpus: PackedCorpus,
        config: TrainConfig,
        rows: BankRows | None = None,
        processes: Processes | None = None,
    ) -> None:
        if config.with_memory != isinstance(model, MemoryModel):
            needed = "a model with memories" if config.with_memory else "a bare anchor"
            raise TrainingError(
                f"regime {config.regime} needs {needed}, got {type(model).__name__}; see "
                "memories.attach and memories.detach"
            )
        self.processes = processes or Processes()
        if config.batch_size % self.processes.size:
            raise TrainingError(
                f"batch_size is {config.batch_size}: expected a multiple of the "
                f"{self.processes.size} processes"
            )
        self.model, self.corpus, self.config = model, corpus, config
        self.anchor: nn.Module = model.anchor if isinstance(model, MemoryModel) else model
        self.done = 0
        self.rows = rows
        self._generic_share = 0.0
        if isinstance(model, MemoryModel):
            self._generic_share = config.generic_share(model.config.branching)
            if rows is None:
                self.rows = BankRows(
                    model.config,
                    lambda level, cluster: model.init_block(level, cluster, config.seed),
                    anchor=self.anchor,
                )
        self._order = SequenceOrder(len(corpus), config.seed)
        #: Of the computation.
        self.dtype = _DTYPES[config.dtype]
        if config.grad_checkpoint:
            recompute_layers(model)
        #: The anchor's weights that learn, float32.
        self.weights: dict[str, Any] = {}
        if config.trains_anchor:
            trainable = self.anchor.trainable_parameters()
            self.weights = tree_map(lambda weight: weight.astype(mx.float32), trainable)
        self.anchor.set_dtype(self.dtype)
        self.optimizer = optim.AdamW(
            config.learning_rate,
            betas=[0.9, 0.95],
            weight_decay=config.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(self.weights)

    @property
    def memory_rows(self) -> BankRows:
        """``rows``, of a trainer with memories."""
        assert self.rows is not None, "a model with memories has rows"
        return self.rows

    # ---- a step ------------------------------------------------------------------------

    def step(self, before_update: Callable[[], None] | None = None) -> StepReport:
        """Do one optimizer step.

        Args:
            before_update: called when loss and gradients are known to be numbers, before anything
                is changed: the time for a checkpoint that training can go on from.

        Raises:
            LossError: loss or gradient is no number; nothing was changed.
        """
        started = time.perf_counter()
        config, rate = self.config, self.config.rate(self.done)
        tokens, ids = self._batch(self.done)
        count = predicted_tokens(tokens, self.corpus.end_of_text)
        with self.processes.together():
            loss, anchor_gradients, row_gradients = self._gradients(tokens, ids, max(1, count))
        if ids is not None:
            keys, sizes = self.memory_rows.keys(ids), self.memory_rows.sizes
            row_gradients = self.processes.sum_rows(row_gradients, keys, sizes)
        anchor_gradients, loss = self.processes.sum((anchor_gradients, loss))

        # Equal gradients, but their norm may be rounded otherwise on another processor.
        norm = self.processes.first(_norm(anchor_gradients, row_gradients))
        if not math.isfinite(loss.item()) or not math.isfinite(norm):
            with self.processes.together():
                raise LossError(
                    f"step {self.done + 1}: the loss is {loss.item():.4g}, its gradient's norm "
                    f"{norm:.4g}; this step was not taken: lower learning_rate "
                    f"({config.learning_rate:g}) or clip ({config.clip:g})"
                )
        if before_update is not None:
            computed = time.perf_counter()
            before_update()
            started += time.perf_counter() - computed
        scale = min(1.0, config.clip / (norm + 1e-6))
        if self.weights:
            share = config.anchor_share if self.rows is not None else 1.0
            self.optimizer.learning_rate = rate * share
            scaled = tree_map(lambda gradient: gradient * scale, anchor_gradients)
            self.weights = self.optimizer.apply_gradients(scaled, self.weights)
            mx.eval(self.weights, self.optimizer.state)
        if self.rows is not None:
            with self.processes.together():
                self.rows.update(row_gradients, rate, config.decay, scale)
        self.done += 1
        seconds = time.perf_counter() - started
        return StepReport(self.done, loss.item(), rate, norm, count, count / seconds)

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens (B, T) and ids of rows (B, levels) of a whole step, over all processes."""
        size = self.config.sequences_per_step
        tokens, leaves = self.corpus.take(self._order.indices(step * size, size))
        if self.rows is None:
            return tokens, None
        draws = np.random.default_rng([self.config.seed, 1, step]).random(size)
        return tokens, self.rows.ids(leaves, draws < self._generic_share)

    def _gradients(
        self, tokens: np.ndarray, ids: np.ndarray | None, count: int
    ) -> tuple[mx.array, Any, dict[Key, np.ndarray]]:
        """This process's share of a step: loss, the anchor's gradients, and those of rows."""
        config, processes = self.config, self.processes
        width = config.batch_size // processes.size
        starts = [
            part * config.batch_size + processes.rank * width
            for part in range(config.grad_accumulation_steps)
        ]
        total, anchor_gradients = mx.array(0.0), None
        row_gradients: dict[Key, np.ndarray] = {}
        differentiate = mx.value_and_grad(self._loss)
        for number, start in enumerate(starts):
            part = slice(start, start + width)
            learned: dict[str, Any] = {"anchor": self.weights} if self.weights else {}
            if ids is not None:
                learned["memory"] = self.memory(ids[part])
            loss, gradients = differentiate(learned, mx.array(tokens[part]), 1 / count)
            if "anchor" in learned:
                found = gradients["anchor"]
                anchor_gradients = (
                    found if anchor_gradients is None else tree_map(mx.add, anchor_gradients, found)
                )
            row_parts = self.model.split(gradients["memory"]) if ids is not None else []
            total = total + loss
            # The next batch's rows are read while this one computes.
            # MLX's stub of it has no types.
            mx.async_eval(total, anchor_gradients, row_parts)  # type: ignore[no-untyped-call]
            if ids is not None:
                if number + 1 < len(starts):
                    at = starts[number + 1]
                    self.memory_rows.prefetch(ids[at : at + width])
                elif self.done + 1 < config.iters:
                    coming = self._batch(self.done + 1)[1]
                    assert coming is not None, "rows are used in every step, or in none"
                    self.memory_rows.prefetch(coming[starts[0] : starts[0] + width])
            mx.eval(total, anchor_gradients, row_parts)
            if ids is not None:
                _add_rows(row_gradients, self.memory_rows.levels, ids[part], row_parts)
        return total, anchor_gradients if anchor_gradients is not None else {}, row_gradients

    def _loss(self, learned: dict[str, Any], tokens: mx.array, scale: float) -> mx.array:
        if "anchor" in learned:
            self.anchor.update(tree_map(lambda w: w.astype(self.dtype), learned["anchor"]))
        memory = None
        if "memory" in learned:
            memory = tree_map(lambda matrix: matrix.astype(self.dtype), learned["memory"])
        loss, _ = next_token_loss(
            self.model, tokens, memory, self.corpus.end_of_text, self.config.document_mask
        )
        return loss * scale

    def memory(self, ids: np.ndarray) -> list[tuple[mx.array, ...]]:
        """The matrices of rows (B, levels), float32; see ``MemoryModel.matrices``."""
        joined = self.model.join([mx.array(block) for block in self.memory_rows.gather(ids)])
        return tree_map(mx.contiguous, self.model.matrices(joined))

    def settle(self) -> None:
        """Put the weights that were learned so far into the model, in the computation's dtype."""
        self.anchor.update(tree_map(lambda weight: weight.astype(self.dtype), self.weights))


def _add_rows(
    sums: dict[Key, np.ndarray], levels: tuple[int, ...], ids: np.ndarray, parts: list[mx.array]
) -> None:
    """Add a batch's gradients (B or 1, s_l) per level to those of the rows that were used."""
    for level, column, part in zip(levels, ids.T, parts, strict=True):
        for cluster, gradient in zip(column.tolist(), np.array(part, copy=False)):  # noqa: B905
            # A batch whose sequences share all rows has one gradient, which is their sum already.
            key = (level, cluster)
            if key in sums:
                sums[key] += gradient
            else:
                sums[key] = gradient.copy()


def _norm(anchor_gradients: Any, row_gradients: dict[Key, np.ndarray]) -> float:
    """The norm of all gradients together."""
    squares = [gradient.square().sum() for _, gradient in tree_flatten(anchor_gradients)]
    total = real_number(mx.stack(squares).sum()) if squares else 0.0
    # In the order of the keys: the sum must not depend on which sequence came first.
    total += sum(
        float(np.dot(row_gradients[key], row_gradients[key])) for key in sorted(row_gradients)
    )
    return math.sqrt(total)


def parameter_count(model: nn.Module) -> int:
    """Numbers in a model's parameters."""
    return sum(value.size for _, value in tree_flatten(model.parameters()))
