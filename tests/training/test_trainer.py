"""The regimes: what learns, what stays, and that learning happens."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_hiermem.anchors.openlm import Model, ModelArgs, init_weights
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.corpus.packed import pack
from mlx_hiermem.errors import TrainingError
from mlx_hiermem.memories import attach
from mlx_hiermem.training.objective import next_token_loss
from mlx_hiermem.training.trainer import TrainConfig, Trainer

ARGS = ModelArgs(16, 2, 32, 2, 8, vocab_size=40, tie_word_embeddings=True)
CONFIG = MemoryConfig((3, 2), branching=2)


def anchor():
    mx.random.seed(0)
    model = Model(ARGS)
    init_weights(model)
    return model


def corpus(leaves=(0, 1, 2)):
    # Leaf 3 has no documents; in each leaf token 5 is followed by another token.
    return pack([([5, 10 + leaf, 20 + leaf], leaf) for leaf in leaves for _ in range(8)], 8, 0)


def weights(model):
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def run(model, regime, steps=3, **options):
    options = {"learning_rate": 0.01, "batch_size": 4, "generic_probability": 0.0} | options
    trainer = Trainer(model, corpus(), TrainConfig(regime, steps=steps, **options))
    trainer.run(progress=False)
    return trainer


def test_frozen_leaves_the_anchor_and_unvisited_rows_alone():
    model = attach(anchor(), CONFIG)
    before = weights(model.anchor)
    trainer = run(model, "frozen", steps=8)
    after = weights(model.anchor)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert trainer.rows.levels[2].steps[3] == 0
    m3 = trainer.rows.levels[2].values.reshape(4, 2, 3, 2, 16)[:, :, 2]
    assert not m3[3].any() and all(m3[leaf].any() for leaf in range(3))


def test_cotrain_moves_anchor_rows_and_generic():
    model = attach(anchor(), CONFIG)
    before = weights(model.anchor)
    trainer = run(model, "cotrain", generic_probability=0.5)
    after = weights(model.anchor)
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert trainer.rows.levels[1].steps.sum() > 0
    assert any(block.reshape(2, 3, -1, 16)[:, 2].any().item() for block in trainer.generic)


def test_cotrain_keeps_what_is_frozen_and_takes_a_share_of_the_rate():
    model = attach(anchor(), CONFIG)
    model.anchor.model.embed_tokens.freeze()
    before = weights(model.anchor)
    run(model, "cotrain", weight_decay=0.0)
    after = weights(model.anchor)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == set(before) - {"model.embed_tokens.weight"}
    model = attach(anchor(), CONFIG)
    run(model, "cotrain", anchor_share=0.0)
    after = weights(model.anchor)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_generic_alone_makes_no_bank():
    model = attach(anchor(), CONFIG)
    trainer = run(model, "frozen", generic_probability=1.0)
    assert trainer.rows is None
    assert all(block.reshape(2, 3, -1, 16)[:, 2].any().item() for block in trainer.generic)


def test_the_default_generic_probability_is_one_in_k_plus_one():
    model = attach(anchor(), CONFIG)
    trainer = Trainer(model, corpus(), TrainConfig("cotrain", steps=1))
    assert trainer._generic_probability == pytest.approx(1 / 3)


def test_each_sequence_of_a_batch_computes_with_its_own_memory():
    """Fetched and generic memories stand in the batch's order, equal to the blocks joined alone."""
    model = attach(anchor(), CONFIG)
    trainer = Trainer(
        model, corpus(), TrainConfig("frozen", steps=1, generic_probability=0.5, seed=1)
    )
    for state in trainer.rows.levels.values():
        state.values += np.random.default_rng(0).normal(size=state.values.shape) * 0.1
    trainer.generic = [block + 0.05 for block in trainer.generic]
    tokens, leaves = corpus().tokens[:6], corpus().leaves[[0, 0, 3, 3, 6, 6]]
    use_generic = np.array([False, True, False, False, True, False])
    ids, rows, places = trainer.rows.gather(leaves[~use_generic])
    order = np.argsort(np.argsort(use_generic, kind="stable"), kind="stable")
    memory = trainer._memory({"rows": rows, "generic": trainer.generic}, places, use_generic, order)
    for i, leaf in enumerate(leaves.tolist()):
        blocks = (
            trainer.generic
            if use_generic[i]
            else [
                mx.array(trainer.rows.levels[1].values[leaf // 2]),
                mx.array(trainer.rows.levels[2].values[leaf]),
            ]
        )
        assert mx.array_equal(memory[i], model.join(blocks))
    alone, _ = next_token_loss(model, mx.array(tokens[:1]), memory[:1], 0)
    both, _ = next_token_loss(model, mx.array(tokens[:1]), memory[1:2], 0)
    assert alone.item() != both.item()


@pytest.mark.parametrize("regime", ["anchor", "frozen", "cotrain"])
def test_the_loss_falls(regime):
    model = anchor() if regime == "anchor" else attach(anchor(), CONFIG)
    trainer = Trainer(
        model,
        corpus(),
        TrainConfig(regime, steps=40, batch_size=4, learning_rate=0.02, generic_probability=0.0),
    )
    losses = [report.loss for report in trainer.steps()]
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_a_fetched_memory_tells_what_the_generic_one_cannot():
    """After token 5 each leaf goes on with its own token: only the fetched memory can know."""
    settings = {"steps": 100, "learning_rate": 0.02, "batch_size": 8}
    fetched = run(attach(anchor(), CONFIG), "frozen", **settings)
    generic = run(attach(anchor(), CONFIG), "frozen", **settings, generic_probability=1.0)
    tokens = mx.array([[5, 10 + leaf] for leaf in range(3)])
    rows = [
        mx.array(fetched.rows.levels[1].values[[0, 0, 1]]),
        mx.array(fetched.rows.levels[2].values[:3]),
    ]
    own, _ = next_token_loss(fetched.model, tokens, fetched.model.join(rows), 0)
    shared, _ = next_token_loss(
        generic.model, tokens, generic.model.join([b[None] for b in generic.generic]), 0
    )
    # Of three tokens the generic memory can but guess: ln 3 = 1.1 nats more, were logits unbounded
    # (those of this untrained anchor end at 4).
    assert own.item() < shared.item() - 0.5


def test_same_seed_same_bits():
    first, second = (
        run(attach(anchor(), CONFIG), "cotrain", seed=5, generic_probability=0.3) for _ in range(2)
    )
    assert np.array_equal(first.rows.levels[2].values, second.rows.levels[2].values)


def test_rate_follows_warmup_and_cosine():
    config = TrainConfig(
        "anchor", steps=110, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10
    )
    assert config.rate(0) == pytest.approx(0.1) and config.rate(9) == pytest.approx(1.0)
    assert config.rate(60) == pytest.approx(0.55) and config.rate(110) == pytest.approx(0.1)


def test_misuse_is_named():
    with pytest.raises(TrainingError, match="frozen needs a model with memories"):
        Trainer(anchor(), corpus(), TrainConfig("frozen", steps=1))
    with pytest.raises(TrainingError, match="anchor needs a bare anchor"):
        Trainer(attach(anchor(), CONFIG), corpus(), TrainConfig("anchor", steps=1))
    with pytest.raises(TrainingError, match="regime"):
        TrainConfig("dense", steps=1)
    model = attach(anchor(), CONFIG)
    model.anchor.model.norm.weight = mx.full((16,), float("nan"))
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        run(model, "frozen")
