"""How blocks are joined and cut, for every kind: each matrix holds the rows of all levels."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem import kinds
from mlx_hiermem.config import KINDS, AnchorShape, MemoryConfig
from mlx_hiermem.memories.layout import JoinedLayout

SHAPE = AnchorShape(3, 8, 12, 4, 2, 2)


def _blocks(config: MemoryConfig, batch: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [config.block_size(level, SHAPE) for level in config.memory_levels]
    return [rng.standard_normal((batch, size), np.float32) for size in sizes]


def _matrices(config: MemoryConfig, level: int, block: np.ndarray) -> list[np.ndarray]:
    """One block cut as docs/format.md says, with plain slices."""
    rank, start, found = config.ranks[level - 1], 0, []
    for width in config.row_widths(SHAPE):
        found.append(block[start : start + rank * width].reshape(rank, width))
        start += rank * width
    assert start == len(block)
    return found


@given(
    kind=st.sampled_from(KINDS),
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any),
    layers=st.sampled_from([None, (1,), (0, 2)]),
    batch=st.integers(1, 2),
)
def test_join_cut_and_split(kind, ranks, layers, batch):
    config = MemoryConfig(ranks, kind=kind, layers=layers)
    layout, blocks = JoinedLayout(config, SHAPE), _blocks(config, batch)
    joined = layout.join([mx.array(block) for block in blocks])
    assert joined.shape == (batch, layout.size)

    matrices = layout.matrices(joined)
    assert len(matrices) == len(config.memory_layers(SHAPE))
    for row in range(batch):
        per_level = [
            _matrices(config, level, block[row])
            for level, block in zip(config.memory_levels, blocks, strict=True)
        ]
        expected = [np.concatenate(parts) for parts in zip(*per_level, strict=True)]
        flat = np.concatenate([matrix.reshape(-1) for matrix in expected])
        np.testing.assert_array_equal(np.array(joined[row]), flat)
        found = [
            part
            for layer in matrices
            for array, count in zip(layer, kinds.find(kind).groups, strict=True)
            for part in np.split(np.array(array[row]), count)
        ]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)

    for ours, theirs in zip(layout.split(matrices), blocks, strict=True):
        np.testing.assert_array_equal(np.array(ours), theirs)
    again = layout.of_entry([array for layer in matrices for array in layer])
    assert [len(layer) for layer in again] == [len(layer) for layer in matrices]
    assert layout.arrays == sum(map(len, matrices))
    assert layout.of_entry([None] * layout.arrays) is None
