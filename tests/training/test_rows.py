"""AdamW on rows against mlx's dense AdamW."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.training.rows import BankRows

SHAPE = dict(
    num_hidden_layers=1, hidden_size=2, intermediate_size=4, num_attention_heads=1, head_dim=2
)
CONFIG = MemoryConfig((2, 0, 1), branching=2, base_anchor={"name": "t", "shape": SHAPE})


def bank():
    mx.random.seed(1)
    return BankRows(CONFIG, lambda level: mx.random.normal((CONFIG.block_size(level),)))


def test_gather_takes_each_distinct_row_once():
    rows = bank()
    leaves = np.array([7, 0, 6, 0])
    ids, gathered, places = rows.gather(leaves)
    assert {level: chosen.tolist() for level, chosen in ids.items()} == {1: [0, 1], 3: [0, 6, 7]}
    for level, row, place in zip(ids, gathered, places, strict=True):
        clusters = leaves // 2 ** (3 - level)
        assert np.array_equal(np.array(row[place]), rows.levels[level].values[clusters])


def test_equals_dense_adamw_when_every_row_is_visited():
    rows = bank()
    dense = {"w": mx.array(rows.levels[3].values)}
    optimizer = optim.AdamW(0.1, betas=[0.9, 0.95], weight_decay=0.01, bias_correction=True)
    for step in range(5):
        ids, gathered, _ = rows.gather(np.arange(8))
        gradients = [mx.random.normal(row.shape, key=mx.random.key(step)) for row in gathered]
        rows.update(ids, gathered, gradients, 0.1, 0.01)
        dense = optimizer.apply_gradients({"w": gradients[1]}, dense)
        assert np.allclose(rows.levels[3].values, np.array(dense["w"]), atol=1e-6)


def test_rows_that_are_not_visited_do_not_change_and_keep_their_own_count():
    rows = bank()
    before = {level: state.values.copy() for level, state in rows.levels.items()}
    for leaf in (6, 6, 7):
        ids, gathered, _ = rows.gather(np.array([leaf]))
        rows.update(ids, gathered, [mx.ones_like(row) for row in gathered], 0.1, 0.0)
    assert rows.levels[3].steps.tolist() == [0, 0, 0, 0, 0, 0, 2, 1]
    assert rows.levels[1].steps.tolist() == [0, 3]
    assert np.array_equal(rows.levels[3].values[:6], before[3][:6])
    assert np.array_equal(rows.levels[1].values[0], before[1][0])
    # With a constant gradient a bias-corrected Adam step is exactly the learning rate, so a row's
    # way tells its own number of steps.
    moved = before[3] - rows.levels[3].values
    assert np.allclose(moved[6], 0.2, atol=1e-5) and np.allclose(moved[7], 0.1, atol=1e-5)
    assert np.allclose(before[1][1] - rows.levels[1].values[1], 0.3, atol=1e-5)
