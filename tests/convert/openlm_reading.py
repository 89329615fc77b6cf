"""Reading the config of a checkpoint on disk, and how it is refused: shared by two test files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlx_hiermem.anchors.openlm import ModelArgs
from mlx_hiermem.convert.openlm.config import OpenLMConfig, read_openlm_config
from mlx_hiermem.convert.openlm.weights import without_prefix
from mlx_hiermem.convert.sources import open_source
from mlx_hiermem.errors import ConfigError, HierMemError
from tests.convert.openlm_states import HEAD_DIM, HEADS, INNER, LAYERS, VOCAB, D

ARGS = ModelArgs(
    D, LAYERS, INNER, HEADS, HEAD_DIM, vocab_size=VOCAB, rope_theta=10_000.0,
    max_position_embeddings=64,
)  # fmt: skip
PARAMS = {
    "name": "run", "lr": 0.003, "train_data": "['a: b']", "precision": "fp32", "fsdp": False,
    "fsdp_amp": False, "model_norm": "gain_only_layer_norm", "qk_norm": True, "moe_freq": 0,
    "ffn_type": "swiglu", "positional_embedding_type": "rotary", "attn_name": "auto",
    "attn_activation": None, "seq_len": 64, "vocab_size": VOCAB,
}  # fmt: skip


def read(path: Path, **options) -> OpenLMConfig:
    with open_source(path) as source:
        return read_openlm_config(path, without_prefix(source.tensors), **options)


def refused(path: Path, says: str, kind: type = ConfigError, **options) -> str:
    with pytest.raises(HierMemError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert re.search(says, text), text
    assert "\n" not in text and len(text) < 900
    return text


def without(values: dict, *names: str) -> dict:
    return {key: value for key, value in values.items() if key not in names}
