"""Small random configs and banks."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_hiermem.bank.dtypes import to_storage
from mlx_hiermem.bank.manifest import write_manifest
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.config import MemoryConfig
from tests.tiny import make_tiny_model


def _config(ranks=(3, 2), branching=2, dtype="bfloat16", hidden=4, layers=2, **more):
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 2,
        "head_dim": 2,
    }
    anchor = {"name": "test", "revision": None, "shape": shape}
    return MemoryConfig(ranks=ranks, branching=branching, dtype=dtype, base_anchor=anchor, **more)


def _rows(config, seed=0):
    random = np.random.default_rng(seed)
    return {
        level: random.standard_normal(
            (config.clusters(level), config.block_size(level)), dtype=np.float32
        )
        for level in config.memory_levels
    }


def _generic(config, seed=0):
    return np.random.default_rng(seed + 1).standard_normal(config.fetch_size(), dtype=np.float32)


def _bank(folder, config=None, seed=0):
    config = config or _config()
    rows, generic = _rows(config, seed), _generic(config, seed)
    revision = write_bank(folder, config, rows, generic)
    return SimpleNamespace(
        folder=Path(folder),
        config=config,
        revision=revision,
        stored={level: to_storage(block, config.dtype) for level, block in rows.items()},
        generic=to_storage(generic, config.dtype),
    )


@pytest.fixture(scope="session", autouse=True)
def no_sync():
    """No waiting for the disk: test_bank_layout looks at the syncs, elsewhere they only cost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def make():
    """make.config(...), make.rows(config), make.generic(config), make.bank(folder, config)."""
    return SimpleNamespace(config=_config, rows=_rows, generic=_generic, bank=_bank)


@pytest.fixture
def bank(tmp_path, make):
    """A bank of two levels with 2 and 4 clusters, bfloat16."""
    return make.bank(tmp_path / "memory")


@pytest.fixture
def even_bank(tmp_path, make):
    """A bank of two levels with 2 and 4 clusters and equal ranks, so that files look alike."""
    made = make.bank(tmp_path / "memory", make.config((2, 2), hidden=32))
    (made.folder / "blocked.json").write_text('{"blocked": [[1, 1]]}\n')
    write_manifest(made.folder)
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("attacks") / "tiny")
