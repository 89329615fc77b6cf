"""Rows of a bank in training: against dense AdamW, under a budget, in files."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import BudgetError, FormatError
from mlx_hiermem.memories import GENERIC
from mlx_hiermem.training.adamw import adamw
from mlx_hiermem.training.rows import BankRows

SHAPE = dict(
    num_hidden_layers=1, hidden_size=2, intermediate_size=4, num_attention_heads=1, head_dim=2
)
CONFIG = MemoryConfig((2, 0, 1), branching=2, base_anchor={"name": "t", "shape": SHAPE})
SIZES = {1: 12, 3: 6}
ROW = {level: 12 * size for level, size in SIZES.items()}  # bytes of a row with its state


def start(level, cluster):
    rng = np.random.default_rng([level, cluster + 1])
    return rng.standard_normal(SIZES[level], dtype=np.float32)


def bank(folder=None, budget=None):
    return BankRows(CONFIG, start, folder, budget)


def ids_of(rows, leaves, generic=()):
    use = np.isin(np.arange(len(leaves)), generic)
    return rows.ids(np.array(leaves), use)


def everything(rows):
    return {
        level: np.stack(list(rows.values(level, [GENERIC, *range(CONFIG.clusters(level))])))
        for level in rows.levels
    }


def test_ids_follow_the_tree_and_the_generic_memory():
    rows = bank()
    assert ids_of(rows, [7, 0, 6, 3], generic=[1]).tolist() == [
        [1, 7], [GENERIC, GENERIC], [1, 6], [0, 3],
    ]  # fmt: skip


def test_gather_gives_each_sequence_its_rows():
    rows = bank()
    ids = ids_of(rows, [7, 0, 6, 0], generic=[2])
    for level, column, values in zip(rows.levels, ids.T, rows.gather(ids), strict=True):
        assert np.array_equal(values, np.stack([start(level, cluster) for cluster in column]))
    same = rows.gather(ids_of(rows, [5, 5, 5]))
    assert [values.shape for values in same] == [(1, 12), (1, 6)]


def test_equals_mlx_adamw_when_every_row_is_visited():
    rows = bank()
    keys = [(3, cluster) for cluster in range(8)]
    dense = {"w": mx.array(np.stack([start(*key) for key in keys]))}
    optimizer = optim.AdamW(0.1, betas=[0.9, 0.95], weight_decay=0.01, bias_correction=True)
    rng = np.random.default_rng(0)
    for _ in range(20):
        gradient = rng.standard_normal((8, 6), dtype=np.float32)
        rows.update(dict(zip(keys, gradient, strict=True)), 0.1, 0.01)
        dense = optimizer.apply_gradients({"w": mx.array(gradient)}, dense)
        found = np.stack(list(rows.values(3, range(8))))
        np.testing.assert_allclose(found, np.array(dense["w"]), rtol=2e-6, atol=2e-7)


def test_adamw_is_its_formula_and_does_not_depend_on_its_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    row = np.abs(rng.standard_normal((3, 100), dtype=np.float32))
    gradient = rng.standard_normal(100, dtype=np.float32)
    values, first, second = row.astype(np.float64)
    scaled = 0.5 * gradient.astype(np.float64)
    first, second = 0.9 * first + 0.1 * scaled, 0.95 * second + 0.05 * scaled**2
    direction = first / (1 - 0.9**7) / (np.sqrt(second / (1 - 0.95**7)) + 1e-8)
    expected = values * (1 - 0.01 * 0.3) - 0.01 * direction
    whole, pieces = row.copy(), row.copy()
    adamw(whole, gradient, 7, 0.01, 0.3, scale=0.5)
    np.testing.assert_allclose(whole, [expected, first, second], rtol=1e-5)
    monkeypatch.setattr("mlx_hiermem.training.adamw._PIECE", 7)
    adamw(pieces, gradient, 7, 0.01, 0.3, scale=0.5)
    assert np.array_equal(whole, pieces)


def test_rows_that_are_not_visited_do_not_change_and_keep_their_own_count():
    rows = bank()
    before = everything(rows)
    for leaf in (6, 6, 7):
        keys = rows.keys(ids_of(rows, [leaf]))
        rows.update({key: np.ones(SIZES[key[0]], np.float32) for key in keys}, 0.1, 0.0)
    assert rows.steps[3].tolist() == [0, 0, 0, 0, 0, 0, 2, 1, 0]
    assert rows.steps[1].tolist() == [0, 3, 0]
    moved = {level: before[level] - values for level, values in everything(rows).items()}
    # With a constant gradient a bias-corrected Adam step is exactly the learning rate, so a row's
    # way tells its own number of steps. The first row is the generic memory's.
    assert not moved[3][:7].any() and not moved[1][:2].any()
    assert np.allclose(moved[3][7], 0.2, atol=1e-5) and np.allclose(moved[3][8], 0.1, atol=1e-5)
    assert np.allclose(moved[1][2], 0.3, atol=1e-5)


STEPS = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=2), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, spare=st.integers(0, 300), saves=st.sets(st.integers(0, 11)), data=st.data())
def test_a_budget_changes_nothing_but_memory(tmp_path_factory, steps, spare, saves, data):
    """Under any budget that can hold a batch, with checkpoints and resumes: the same bits."""
    need = 2 * sum(ROW.values())
    folder = tmp_path_factory.mktemp("rows")
    plain, tight = bank(), bank(folder, need + spare)
    saved = None
    for number, leaves in enumerate(steps):
        after = steps[number + 1 :]
        for rows in (plain, tight):
            ids = ids_of(rows, leaves)
            values = rows.gather(ids)
            if after and data.draw(st.booleans()):
                rows.prefetch(ids_of(rows, after[0]))
            gradients = {
                key: np.full(SIZES[key[0]], 1 + number + values[0][0, 0], np.float32)
                for key in rows.keys(ids)
            }
            rows.update(gradients, 0.1, 0.01)
        assert tight.bytes <= need + spare
        if number in saves:
            saved = {name: array.copy() for name, array in tight.flush().items()}
            tight.committed()
            at_save = everything(tight)
    for level, values in everything(plain).items():
        assert np.array_equal(values, everything(tight)[level])
        assert np.array_equal(plain.steps[level], tight.steps[level])
    if saved is not None:  # what came after the checkpoint has not touched what it refers to
        tight.close()
        again = bank(folder, need)
        again.restore(saved)
        for level, values in everything(again).items():
            assert np.array_equal(values, at_save[level])
        again.close()


def test_only_rows_that_were_written_take_room(tmp_path):
    rows = bank(tmp_path, 10**6)
    rows.gather(ids_of(rows, [0, 5]))
    rows.flush()
    assert (tmp_path / "rows-3.bin").stat().st_size == 0
    rows.update({(3, 5): np.ones(6, np.float32)}, 0.1, 0.0)
    for _ in range(5):
        rows.update({(3, 5): np.ones(6, np.float32)}, 0.1, 0.0)
        rows.flush()
        rows.committed()
    # One record for the row, and one for where it goes next.
    assert (tmp_path / "rows-3.bin").stat().st_size == 2 * ROW[3]


def test_a_batch_beyond_the_budget_is_refused(tmp_path):
    rows = bank(tmp_path, sum(ROW.values()) + ROW[3] - 1)
    rows.gather(ids_of(rows, [0]))
    with pytest.raises(BudgetError, match=r"cannot hold .* 288 bytes; give --memory-budget more"):
        rows.gather(ids_of(rows, [0, 1]))


def test_a_truncated_file_is_named(tmp_path):
    rows = bank(tmp_path, 10**6)
    rows.update({(3, 5): np.ones(6, np.float32)}, 0.1, 0.0)
    state = rows.flush()
    rows.close()
    (tmp_path / "rows-3.bin").write_bytes(b"")
    again = bank(tmp_path, 10**6)
    with pytest.raises(FormatError, match="rows-3.bin: truncated"):
        again.restore(state)
