"""Fetch and bank sizes of the paper, to the digit, from the config.json of real models.

The three open-weight models' sizes are those of their own ``config.json``; their parameter counts
show that.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from mlx.utils import tree_flatten
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

from mlx_hiermem.anchors import get_model_classes
from mlx_hiermem.anchors.openlm import PRESETS
from mlx_hiermem.config import KINDS, AnchorShape, MemoryConfig
from mlx_hiermem.memories import start_block

GEMMA = dict(
    model_type="gemma3_text", vocab_size=262_144, hidden_size=640, intermediate_size=2048,
    num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
    query_pre_attn_scalar=256, sliding_window=512, max_position_embeddings=32_768,
    rope_theta=1_000_000.0, rope_local_base_freq=10_000.0, rms_norm_eps=1e-6,
)  # fmt: skip
QWEN = dict(
    model_type="qwen2", vocab_size=151_936, hidden_size=896, intermediate_size=4864,
    num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    max_position_embeddings=32_768, rope_theta=1_000_000.0, rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)  # fmt: skip
LLAMA = dict(
    model_type="llama", vocab_size=128_256, hidden_size=2048, intermediate_size=8192,
    num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
    max_position_embeddings=131_072, rope_theta=500_000.0, rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope_scaling=dict(
        rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)  # fmt: skip

#: Name: config.json, transformers' class of it, parameters.
OPEN_WEIGHTS = {
    "Gemma 3 270M": (GEMMA, Gemma3TextConfig, 268_098_176),
    "Qwen 2.5 0.5B": (QWEN, Qwen2Config, 494_032_768),
    "Llama 3.2 1B": (LLAMA, LlamaConfig, 1_235_814_400),
}
ANCHORS = {name: config for name, (config, *_) in OPEN_WEIGHTS.items()} | {
    name: asdict(args) for name, args in PRESETS.items()
}

#: Anchor, ranks, fetch size, bank size; one row of the paper is told to three digits only.
TABLE = [
    ("160M", (256, 64, 16, 0), 18_063_360, 4_624_220_160),
    ("160M", (256, 64, 16, 4), 18_278_400, "18.7B"),
    ("410M", (512, 128, 32, 0), 49_545_216, 12_683_575_296),
    ("1.4B", (768, 256, 16, 0), 153_354_240, 21_139_292_160),
    ("Gemma 3 270M", (512, 128, 32, 0), 23_224_320, 5_945_425_920),
    ("Qwen 2.5 0.5B", (512, 128, 32, 0), 43_352_064, 11_098_128_384),
    ("Llama 3.2 1B", (768, 256, 16, 0), 102_236_160, 14_092_861_440),
]


@pytest.mark.parametrize(("name", "ranks", "fetch", "bank"), TABLE)
def test_the_size_table(name, ranks, fetch, bank):
    config = MemoryConfig(ranks)
    assert config.kind == "ffn" and config.branching == 16
    found = config.bank_size(ANCHORS[name])
    assert config.fetch_size(ANCHORS[name]) == fetch
    assert (f"{found / 1e9:.1f}B" if isinstance(bank, str) else found) == bank


@pytest.mark.parametrize("name", OPEN_WEIGHTS)
def test_the_configs_are_those_of_the_models(name):
    config, _, parameters = OPEN_WEIGHTS[name]
    network, arguments = get_model_classes(dict(config))
    model = network(arguments.from_dict(dict(config)))
    if config["model_type"] == "gemma3_text":
        model.sanitize({})  # a checkpoint without a head of its own: tied
    # Never evaluated, so the weights take no memory.
    assert sum(array.size for _, array in tree_flatten(model.parameters())) == parameters


@pytest.mark.parametrize("name", OPEN_WEIGHTS)
def test_the_shape_is_the_same_wherever_it_is_read(name):
    """config.json as on the Hub, as transformers writes it today, mlx-lm's arguments, a model."""
    config, transformers_class, _ = OPEN_WEIGHTS[name]
    expected = AnchorShape(
        config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"],
        config["num_attention_heads"],
        config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
        config["num_key_value_heads"],
    )  # fmt: skip
    rewritten = json.loads(transformers_class(**config).to_json_string(use_diff=False))
    network, arguments = get_model_classes(dict(config))
    args = arguments.from_dict(dict(config))
    for source in (config, rewritten, args, network(args)):
        assert AnchorShape.of(source) == expected


# ---- all kinds -------------------------------------------------------------------------

#: Numbers that one unit of rank adds, written out: the formulas of section 3 of the paper. In the
#: 160M anchor every head has its own keys; heads x head size is 12 x 32 = 384.
UNIT = {
    "160M": {
        "ffn": 3 * 35 * 512,
        "lora_qk": 2 * 35 * (512 + 384),
        "lora_vo": 2 * 35 * (512 + 384),
        "lora_ffn": 3 * 35 * (512 + 2048),
        "kv": 2 * 35 * 384,
    },
    # Keys and values are 8 x 64 = 512 wide, queries 32 x 64 = 2048.
    "Llama 3.2 1B": {
        "ffn": 3 * 16 * 2048,
        "lora_qk": 16 * ((2048 + 2048) + (2048 + 512)),
        "lora_vo": 16 * ((2048 + 512) + (2048 + 2048)),
        "lora_ffn": 3 * 16 * (2048 + 8192),
        "kv": 2 * 16 * 512,
    },
    # Queries are 4 x 256 = 1024 wide, more than the residuals; keys and values 256.
    "Gemma 3 270M": {
        "ffn": 3 * 18 * 640,
        "lora_qk": 18 * ((640 + 1024) + (640 + 256)),
        "lora_vo": 18 * ((640 + 256) + (640 + 1024)),
        "lora_ffn": 3 * 18 * (640 + 2048),
        "kv": 2 * 18 * 256,
    },
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, unit in UNIT.items() for kind in unit]
)
def test_sizes_of_every_kind(name, kind):
    assert set(UNIT[name]) <= set(KINDS)
    unit, config = UNIT[name][kind], MemoryConfig((8, 3, 0, 1), kind=kind)
    anchor = ANCHORS[name]
    assert [config.block_size(level, anchor) for level in (1, 2, 3, 4)] == [
        8 * unit, 3 * unit, 0, unit
    ]  # fmt: skip
    assert config.fetch_size(anchor) == 12 * unit
    assert config.bank_size(anchor) == unit * (8 * 16 + 3 * 16**2 + 16**4)
    assert start_block(config, 4, 7, anchor=anchor).shape == (unit,)


@pytest.mark.parametrize("kind", UNIT["160M"])
def test_only_layers_with_memory_count(kind):
    config = MemoryConfig((8, 3), kind=kind, layers=(0, 5, 34))
    assert config.fetch_size(ANCHORS["160M"]) == 11 * UNIT["160M"][kind] * 3 // 35
