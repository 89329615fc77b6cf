"""Start values: each block's own, the same wherever and in whatever order they are made."""

import numpy as np

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.memories import GENERIC, start_block

SHAPE = dict(
    num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2, head_dim=4
)
CONFIG = MemoryConfig((2, 0, 1), branching=2, base_anchor={"name": "t", "shape": SHAPE})


def test_a_block_depends_on_seed_level_and_cluster_alone():
    blocks = {
        (seed, level, cluster): start_block(CONFIG, level, cluster, seed)
        for seed in (0, 1)
        for level in (1, 3)
        for cluster in (GENERIC, 0, 1)
    }
    for key, block in blocks.items():
        assert block.shape == (CONFIG.block_size(key[1]),) and block.dtype == np.float32
        assert np.array_equal(block, start_block(CONFIG, key[1], key[2], key[0]))
        # Another block of the same size is another one.
        others = [o for other, o in blocks.items() if other != key and o.shape == block.shape]
        assert not any(np.array_equal(block, other) for other in others)
