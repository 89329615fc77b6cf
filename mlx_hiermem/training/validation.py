"""The loss on held-out sequences: memory off, generic, and fetched."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from ..corpus.packed import PackedCorpus
from .objective import next_token_loss
from .trainer import Trainer

#: The memories that are compared, in the order of the report.
MEMORIES = ("none", "generic", "fetched")


def validate(trainer: Trainer, corpus: PackedCorpus, batches: int) -> dict[str, float]:
    """Mean loss in nats on held-out sequences with each memory; nothing in the run changes.

    Args:
        corpus: held-out sequences, of which the first ``batches`` batches are taken.

    Returns:
        ``{"none", "generic", "fetched"}``; only ``none`` for a bare anchor.
    """
    trainer.settle()
    size, processes = trainer.config.batch_size, trainer.processes
    width = size // processes.size
    kinds = MEMORIES[:1] if trainer.rows is None else MEMORIES
    sums, count = mx.zeros(len(kinds)), mx.array(0)
    with processes.together():
        for start in range(0, min(len(corpus), batches * size), size):
            chosen = np.arange(start, min(len(corpus), start + size))
            chosen = chosen[processes.rank * width : (processes.rank + 1) * width]
            if not len(chosen):
                continue
            tokens, leaves = corpus.take(chosen)
            losses = []
            for kind in kinds:
                memory = None
                if kind != "none":
                    ids = trainer.memory_rows.ids(leaves, np.full(len(leaves), kind == "generic"))
                    memory = tree_map(lambda m: m.astype(trainer.dtype), trainer.memory(ids))
                loss, number = next_token_loss(
                    trainer.model,
                    mx.array(tokens),
                    memory,
                    corpus.end_of_text,
                    trainer.config.document_mask,
                )
                losses.append(loss)
            sums, count = sums + mx.stack(losses), count + number
            mx.eval(sums, count)
    sums, count = processes.sum((sums, count))
    return dict(zip(kinds, (sums / mx.maximum(count, 1)).tolist(), strict=True))
