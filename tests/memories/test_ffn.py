"""FFN memories as arrays: how blocks are joined, how they start, what the branch computes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_hiermem.memories import ffn

LAYERS, WIDTH = 3, 8


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def equal(left: mx.array, right: mx.array) -> bool:
    return left.shape == right.shape and bool((left == right).all())


def test_join_puts_the_levels_behind_each_other_in_their_order():
    ranks = (4, 1, 2)
    parts = [normal(LAYERS, 3, rank, WIDTH, seed=rank) for rank in ranks]
    joined = ffn.join([part.reshape(-1) for part in parts], LAYERS, WIDTH)
    assert joined.shape == (LAYERS, 3, 7, WIDTH)
    assert equal(joined[:, :, :4], parts[0])
    assert equal(joined[:, :, 4:5], parts[1])
    assert equal(joined[:, :, 5:], parts[2])


def test_join_keeps_leading_axes():
    blocks = [normal(5, LAYERS * 3 * rank * WIDTH, seed=rank) for rank in (2, 1)]
    joined = ffn.join(blocks, LAYERS, WIDTH)
    assert joined.shape == (5, LAYERS, 3, 3, WIDTH)
    for row in range(5):
        assert equal(joined[row], ffn.join([block[row] for block in blocks], LAYERS, WIDTH))


def test_join_of_one_block_moves_nothing():
    block = normal(LAYERS * 3 * 2 * WIDTH)
    assert equal(ffn.join([block], LAYERS, WIDTH).reshape(-1), block)


def test_start_values():
    rank, width = 50, 64
    block = ffn.init_block(LAYERS, rank, width, np.random.default_rng(0))
    assert block.shape == (LAYERS * 3 * rank * width,) and block.dtype == np.float32
    block = mx.array(block)
    m1, m2, m3 = block.reshape(LAYERS, 3, rank, width).swapaxes(0, 1)
    assert equal(m3, mx.zeros_like(m3))
    for matrix in (m1, m2):
        assert matrix.std().item() == pytest.approx(2 * 0.8796 * width**-0.5, rel=0.03)
        assert mx.abs(matrix).max().item() <= 4 * width**-0.5 * 1.0001
    assert mx.abs(m1 - m2).max() > 0.1


@pytest.mark.parametrize("batch", [1, 2])
def test_branch_is_a_small_swiglu(batch):
    x = normal(2, 5, WIDTH)
    memory = normal(batch, 3, 4, WIDTH, seed=1)
    out = ffn.branch(x, ffn.matrices(memory[:, None])[0])
    assert out.shape == x.shape
    for row in range(2):
        m1, m2, m3 = np.array(memory[row % batch])
        inner = np.array(x[row]) @ m1.T
        expected = (inner / (1 + np.exp(-inner)) * (np.array(x[row]) @ m2.T)) @ m3
        np.testing.assert_allclose(np.array(out[row]), expected, atol=1e-4)


def test_branch_takes_the_anchors_activation():
    x, memory = normal(1, 5, WIDTH), normal(1, 3, 4, WIDTH, seed=1)
    m1, m2, m3 = memory[0]
    expected = (mx.maximum(x @ m1.T, 0) * (x @ m2.T)) @ m3
    np.testing.assert_allclose(
        np.array(
            ffn.branch(x, ffn.matrices(memory[:, None])[0], lambda inner: mx.maximum(inner, 0))
        ),
        np.array(expected),
        atol=1e-5,
    )


def test_branch_keeps_half_precision():
    x, memory = normal(1, 5, WIDTH).astype(mx.bfloat16), normal(1, 3, 4, WIDTH).astype(mx.bfloat16)
    assert ffn.branch(x, ffn.matrices(memory[:, None])[0]).dtype == mx.bfloat16


def test_split_undoes_join():
    blocks = [normal(2, LAYERS * 3 * rank * WIDTH, seed=rank) for rank in (4, 2, 1)]
    found = ffn.split(ffn.matrices(ffn.join(blocks, LAYERS, WIDTH)), (4, 2, 1))
    assert all(equal(left, right) for left, right in zip(found, blocks, strict=True))
