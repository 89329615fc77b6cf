"""Independent jobs: one per level-1 subtree, merged, against one job that saw the same sequences.

A job's batches hold sequences of its own subtree only. So the one job that it is compared with sees
the batches of one subtree after the other, and the learning rate is constant: every block sees the
same sequences in the same order, in batches with the same clipping and the same mean.
"""

import dataclasses

import mlx.core as mx
import numpy as np

from mlx_hiermem.anchors.openlm import Model, ModelArgs, init_weights
from mlx_hiermem.config import AnchorShape, MemoryConfig
from mlx_hiermem.corpus.packed import PackedCorpus, pack
from mlx_hiermem.memories import GENERIC, attach, start_block
from mlx_hiermem.training.config import TrainConfig
from mlx_hiermem.training.rows import BankRows
from mlx_hiermem.training.trainer import Trainer

ARGS = ModelArgs(16, 2, 32, 2, 8, vocab_size=40, tie_word_embeddings=True)
K, STEPS, BATCH = 3, 4, 2
CONFIG = MemoryConfig(
    (3, 2),
    branching=K,
    base_anchor={"name": "t", "shape": dataclasses.asdict(AnchorShape.of(ARGS))},
)


def job(sequences, steps, order=None, seed=7):
    mx.random.seed(0)
    anchor = Model(ARGS)
    init_weights(anchor)
    settings = TrainConfig(
        "frozen", iters=steps, batch_size=BATCH, learning_rate=0.01, final_learning_rate=0.01,
        generic_probability=0.0, seed=seed,
    )  # fmt: skip
    rows = BankRows(CONFIG, lambda level, cluster: start_block(CONFIG, level, cluster, seed))
    trainer = Trainer(attach(anchor, CONFIG), sequences, settings, rows)
    trainer._order = order or trainer._order
    for _ in range(steps):
        trainer.step()
    return trainer


def values(rows, level):
    return np.stack(list(rows.values(level, range(CONFIG.clusters(level)))))


def test_jobs_of_subtrees_make_the_bank_of_one_job():
    rng = np.random.default_rng(0)
    documents = [(rng.integers(1, 40, 5).tolist(), leaf) for leaf in range(K**2) for _ in range(9)]
    sequences = pack(documents, 12, 0)
    jobs, seen = [], []
    for subtree in range(K):
        part = sequences.select(sequences.leaves // K == subtree)
        trainer = job(part, STEPS)
        jobs.append(trainer)
        seen += [trainer.corpus.take(trainer._order.indices(0, STEPS * BATCH))]
    tokens, leaves = (np.concatenate(column) for column in zip(*seen, strict=True))

    class InOrder:
        def indices(self, start, count):
            return np.arange(start, start + count)

    single = job(PackedCorpus(tokens, leaves, 0), K * STEPS, InOrder())
    for level in (1, 2):
        whole, width = values(single.rows, level), K ** (level - 1)
        for subtree, trainer in enumerate(jobs):
            mine = slice(subtree * width, (subtree + 1) * width)
            assert np.array_equal(whole[mine], values(trainer.rows, level)[mine])
            # A job leaves the blocks of the others, and the generic memory, where they start.
            others = np.delete(np.arange(CONFIG.clusters(level)), np.r_[mine])
            assert not trainer.rows.steps[level][others].any()
            assert not trainer.rows.steps[level][GENERIC]
        assert all(single.rows.steps[level][: CONFIG.clusters(level)])
