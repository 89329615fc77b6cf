"""The regimes: what learns, what stays, and that learning happens."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_hiermem.anchors.openlm import Model, ModelArgs, init_weights
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.corpus.packed import pack
from mlx_hiermem.errors import TrainingError
from mlx_hiermem.memories import GENERIC, attach
from mlx_hiermem.training.config import PAPER, TrainConfig
from mlx_hiermem.training.objective import next_token_loss
from mlx_hiermem.training.order import SequenceOrder
from mlx_hiermem.training.trainer import Trainer
from mlx_hiermem.training.validation import validate

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


def blocks(rows, level, clusters=None):
    clusters = range(CONFIG.clusters(level)) if clusters is None else clusters
    return np.stack(list(rows.values(level, clusters)))


def down(block):
    """M3 of a block: what is not zero there has an effect."""
    return block.reshape(*block.shape[:-1], 2, 3, -1, 16)[..., :, 2, :, :]


def run(model, regime, steps=3, sequences=None, **options):
    options = {
        "learning_rate": 0.01, "batch_size": 4, "generic_probability": 0.0, "warmup_steps": 0,
    } | options  # fmt: skip
    trainer = Trainer(model, sequences or corpus(), TrainConfig(regime, iters=steps, **options))
    for _ in range(steps):
        trainer.step()
    trainer.settle()
    return trainer


def same(left, right):
    return all(np.array_equal(left[name], right[name]) for name in left)


def test_frozen_leaves_the_anchor_and_unvisited_rows_alone():
    model = attach(anchor(), CONFIG)
    before = weights(model.anchor)
    trainer = run(model, "frozen", steps=8)
    assert same(before, weights(model.anchor))
    assert trainer.rows.steps[2][3] == 0
    m3 = down(blocks(trainer.rows, 2))
    assert not m3[3].any() and all(m3[leaf].any() for leaf in range(3))
    assert not trainer.rows.steps[1][GENERIC] and trainer.rows.steps[1][:2].all()


@pytest.mark.parametrize("regime", ["cotrain", "scratch"])
def test_cotrain_moves_anchor_rows_and_generic(regime):
    model = attach(anchor(), CONFIG)
    before = weights(model.anchor)
    trainer = run(model, regime, generic_probability=0.5)
    after = weights(model.anchor)
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert trainer.rows.steps[1][:2].sum() > 0
    assert all(down(blocks(trainer.rows, level, [GENERIC])).any() for level in (1, 2))


def test_cotrain_keeps_what_is_frozen_and_takes_a_share_of_the_rate():
    model = attach(anchor(), CONFIG)
    model.anchor.model.embed_tokens.freeze()
    before = weights(model.anchor)
    run(model, "cotrain", weight_decay=0.0)
    after = weights(model.anchor)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == set(before) - {"model.embed_tokens.weight"}
    model = attach(anchor(), CONFIG)
    before = weights(model.anchor)
    run(model, "cotrain", anchor_share=0.0)
    assert same(before, weights(model.anchor))


def test_generic_alone_touches_no_cluster():
    trainer = run(attach(anchor(), CONFIG), "frozen", generic_probability=1.0)
    assert not trainer.rows.steps[1][:2].any() and not trainer.rows.steps[2][:4].any()
    assert trainer.rows.steps[2][GENERIC] == 3
    assert down(blocks(trainer.rows, 1, [GENERIC])).any()


def test_the_default_generic_probability_is_one_in_k_plus_one():
    sequences = pack([([1, 2], leaf % 4) for leaf in range(4000)], 3, 0)
    config = TrainConfig("cotrain", iters=1, batch_size=3000)
    trainer = Trainer(attach(anchor(), CONFIG), sequences, config)
    ids = trainer._batch(0)[1]
    share = (ids[:, 0] == GENERIC).mean()
    assert share == pytest.approx(1 / 3, abs=0.03)
    assert ((ids == GENERIC).all(axis=1) == (ids == GENERIC).any(axis=1)).all()


def test_a_step_is_dense_adamw_on_the_blocks_that_were_used():
    """One step of co-training, written out: each sequence with its own memory, rows that several
    sequences use with the sum of their gradients, one clipping for everything."""
    model, sequences = attach(anchor(), CONFIG), corpus((0, 1))
    config = TrainConfig(
        "cotrain", iters=1, batch_size=4, learning_rate=0.01, weight_decay=0.1, clip=0.05,
        generic_probability=0.4, seed=3,
    )  # fmt: skip
    trainer = Trainer(model, sequences, config)
    keys = [(level, cluster) for level in (1, 2) for cluster in (GENERIC, 0, 1)]
    bank = {key: mx.array(model.init_block(*key, seed=3)) for key in keys}
    # Not from zero: M3 = 0 would give M1 and M2 no gradient.
    for number, key in enumerate(keys):
        noise = 0.1 * np.random.default_rng(number).standard_normal(bank[key].shape)
        trainer.rows._row(key).data[0] += noise.astype(np.float32)
        bank[key] = mx.array(trainer.rows._row(key).data[0])
    tokens, ids = trainer._batch(0)
    assert GENERIC in ids and len(set(ids[:, 0].tolist())) < 4, "wanted: both, and a repeat"

    def loss(bank, parameters):
        model.anchor.update(parameters)
        total, count = 0, 0
        for row, (first, second) in zip(tokens, ids.tolist(), strict=True):
            memory = model.join([bank[1, first][None], bank[2, second][None]])
            part, number = next_token_loss(model, mx.array(row[None]), memory, 0)
            total, count = total + part, count + number
        return total / count

    start = {name: mx.array(value) for name, value in weights(model.anchor).items()}
    nested = model.anchor.trainable_parameters()
    value, (rows, anchors) = mx.value_and_grad(loss, argnums=(0, 1))(bank, nested)
    gradients = {**{k: g for k, g in rows.items() if mx.abs(g).max().item()}}
    anchors = dict(tree_flatten(anchors))
    norm = math.sqrt(sum(g.square().sum().item() for g in [*gradients.values(), *anchors.values()]))
    report = trainer.step()
    trainer.settle()
    assert report.loss == pytest.approx(value.item(), rel=1e-5)
    assert report.gradient_norm == pytest.approx(norm, rel=1e-4) and norm > 0.1

    def step(value, gradient):  # the first step of AdamW goes in the direction of the sign
        gradient = gradient * (0.05 / norm)
        direction = gradient / (mx.abs(gradient) + 1e-8)
        return np.array(value * (1 - 0.01 * 0.1) - 0.01 * direction)

    assert set(gradients) == set(trainer.rows.keys(ids))
    for key, gradient in gradients.items():
        found = trainer.rows._row(key).data[0]
        # Where a gradient is about zero its sign is rounding.
        clear = np.abs(np.array(gradient)) > 1e-5
        np.testing.assert_allclose(found[clear], step(bank[key], gradient)[clear], atol=1e-4)
    after = weights(model.anchor)
    for name, gradient in anchors.items():
        clear = np.abs(np.array(gradient)) > 1e-5
        np.testing.assert_allclose(
            after[name][clear], step(start[name], gradient)[clear], atol=1e-4
        )


@pytest.mark.parametrize("regime", ["anchor", "frozen", "cotrain"])
@pytest.mark.parametrize("change", [{"grad_checkpoint": True}, {"accumulate": True}])
def test_recomputing_and_accumulating_change_nothing(regime, change):
    def losses(**options):
        model = anchor() if regime == "anchor" else attach(anchor(), CONFIG)
        trainer = run(model, regime, steps=6, generic_probability=0.3, **options)
        trainer.settle()
        found = weights(trainer.anchor)
        if trainer.rows is not None:
            found |= {f"level{level}": blocks(trainer.rows, level) for level in (1, 2)}
        return found

    if "accumulate" in change:
        change = {"batch_size": 1, "grad_accumulation_steps": 4}
    plain, changed = losses(), losses(**change)
    for name in plain:
        np.testing.assert_allclose(plain[name], changed[name], atol=2e-4, err_msg=name)


def test_bfloat16_computes_rounded_and_learns_in_float32():
    trainer = run(attach(anchor(), CONFIG), "cotrain", steps=40, dtype="bfloat16")
    exact = run(attach(anchor(), CONFIG), "cotrain", steps=40)
    assert trainer.model.anchor.model.norm.weight.dtype == mx.bfloat16
    assert all(value.dtype == mx.float32 for _, value in tree_flatten(trainer.weights))
    rounded, plain = (validate(t, corpus(), 3)["fetched"] for t in (trainer, exact))
    assert rounded != plain and rounded == pytest.approx(plain, abs=0.05)


@pytest.mark.parametrize("regime", ["anchor", "frozen", "cotrain", "scratch"])
def test_the_loss_falls(regime):
    model = anchor() if regime == "anchor" else attach(anchor(), CONFIG)
    config = TrainConfig(
        regime, iters=40, batch_size=4, learning_rate=0.02, warmup_steps=0, generic_probability=0.0
    )
    trainer = Trainer(model, corpus(), config)
    losses = [trainer.step().loss for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_a_fetched_memory_tells_what_the_generic_one_cannot():
    """After token 5 each leaf goes on with its own token: only the fetched memory can know."""
    settings = {"steps": 100, "learning_rate": 0.02, "batch_size": 8}
    fetched = run(attach(anchor(), CONFIG), "frozen", **settings)
    generic = run(attach(anchor(), CONFIG), "frozen", **settings, generic_probability=1.0)
    own = validate(fetched, corpus(), 3)["fetched"]
    shared = validate(generic, corpus(), 3)["generic"]
    # Of the three first tokens the generic memory can but guess: ln 3 = 1.1 nats for one token in
    # three, were logits unbounded (those of this untrained anchor end at 4).
    assert own < shared - 0.2


def test_validation_is_the_loss_with_each_memory():
    trainer = run(attach(anchor(), CONFIG), "frozen", steps=20, generic_probability=0.3)
    sequences = corpus()
    found = validate(trainer, sequences, 100)
    sums = dict.fromkeys(found, 0.0)
    for tokens, leaf in zip(sequences.tokens, sequences.leaves, strict=True):
        paths = {"generic": (GENERIC, GENERIC), "fetched": (leaf // 2, leaf)}
        for kind in sums:
            memory = None
            if kind in paths:
                pair = zip((1, 2), paths[kind], strict=True)
                memory = trainer.model.join(
                    [mx.array(blocks(trainer.rows, level, [cluster])) for level, cluster in pair]
                )
            loss, count = next_token_loss(trainer.model, mx.array(tokens[None]), memory, 0)
            sums[kind] += loss.item()
    counted = (sequences.tokens[:, :-1] != 0).sum()
    assert found == pytest.approx({kind: total / counted for kind, total in sums.items()}, rel=1e-4)
    assert len(set(found.values())) == 3
    assert validate(trainer, sequences, 1) != found


def test_same_seed_same_bits():
    def run_once(seed):
        model = attach(anchor(), CONFIG)
        return blocks(run(model, "cotrain", seed=seed, generic_probability=0.3).rows, 2)

    assert np.array_equal(run_once(5), run_once(5))
    assert not np.array_equal(run_once(5), run_once(6))


def test_each_pass_shows_each_sequence_once_and_passes_differ():
    order = SequenceOrder(10, seed=3)
    seen = np.concatenate([order.indices(start, 4) for start in range(0, 20, 4)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    # From any position on, without the ones before.
    assert SequenceOrder(10, seed=3).indices(7, 6).tolist() == seen[7:13].tolist()
    assert SequenceOrder(10, seed=4).indices(0, 10).tolist() != seen[:10].tolist()


def test_rate_follows_warmup_and_cosine():
    config = TrainConfig(
        "anchor", iters=110, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10
    )
    assert config.rate(0) == pytest.approx(0.1) and config.rate(9) == pytest.approx(1.0)
    assert config.rate(60) == pytest.approx(0.55) and config.rate(110) == pytest.approx(0.1)


def test_the_papers_numbers_are_the_defaults():
    assert PAPER["anchor"]["warmup_steps"] == 10_000
    for regime, rate, final, decay in (
        ("anchor", 5e-3, 5e-5, 0.05),
        ("frozen", 1e-4, 1e-5, 1e-3),
        ("cotrain", 1e-4, 1e-5, 1e-3),
        ("scratch", 1e-3, 1e-5, 0.1),
    ):
        config = TrainConfig(regime)
        assert (config.learning_rate, config.final_learning_rate) == (rate, final)
        assert config.weight_decay == decay and config.clip == 1.0
        assert config.generic_share(16) == 1 / 17


def test_misuse_is_named():
    with pytest.raises(TrainingError, match="frozen needs a model with memories"):
        Trainer(anchor(), corpus(), TrainConfig("frozen", iters=1))
    with pytest.raises(TrainingError, match="anchor needs a bare anchor"):
        Trainer(attach(anchor(), CONFIG), corpus(), TrainConfig("anchor", iters=1))
    for options, text in (
        ({"regime": "dense"}, "regime"),
        ({"iters": 0}, "iters"),
        ({"clip": 0.0}, "clip"),
        ({"generic_probability": 1.5}, "generic_probability"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ):
        with pytest.raises(TrainingError, match=text):
            TrainConfig(**options)


def test_a_loss_that_is_no_number_changes_nothing():
    model = attach(anchor(), CONFIG)
    trainer = run(model, "cotrain", steps=2)
    model.anchor.model.norm.weight = mx.full((16,), float("nan"))
    trainer.weights["model"]["norm"]["weight"] = mx.full((16,), float("nan"))
    before = weights(model.anchor), blocks(trainer.rows, 1), trainer.rows.steps[1].copy()
    with pytest.raises(TrainingError, match="step 3: the loss is nan.* lower learning_rate"):
        trainer.step()
    trainer.settle()
    np.testing.assert_equal(weights(model.anchor), before[0])
    assert np.array_equal(blocks(trainer.rows, 1), before[1])
    assert np.array_equal(trainer.rows.steps[1], before[2]) and trainer.done == 2
