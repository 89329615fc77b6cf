"""Open-weight anchors against transformers, in what a user meets beyond one call of one memory.

``test_transformers.py`` compares logits; here are start values, decoding through the cache past the
sliding window, batches of memories, folders as they lie on the Hub (older keys, half precision),
and sizes that the presets there do not have.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.models.cache import make_prompt_cache
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from mlx_hiermem.anchors import load_anchor
from mlx_hiermem.config import MemoryConfig, placement
from mlx_hiermem.memories import MemoryModel, attach
from tests.parity.torch_memory import random_blocks, with_memory

VOCAB, LENGTH, WINDOW, RANKS = 64, 26, 8, (5, 3)
KINDS = ("ffn", "lora_qk", "lora_vo", "lora_ffn", "kv")
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LOCAL = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
GEMMA3 = dict(
    head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=24, layer_types=LOCAL,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        "full_attention": {"rope_type": "default", "rope_theta": 7000.0},
    },
)  # fmt: skip

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters={**LLAMA3, "rope_theta": 500_000.0}
    ),
    "qwen2": lambda: Qwen2Config(
        **SIZES, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 3000.0},
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **GEMMA3),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "olmo2": lambda: Olmo2Config(**SIZES),  # query norm over all heads together
    # Query norms with gains of their own for each head, under two names.
    "stablelm": lambda: StableLmConfig(**SIZES, qk_layernorm=True),
    "cohere": lambda: CohereConfig(**SIZES, use_qk_norm=True, logit_scale=1.0),
    # All matrices with biases, every head its own keys, a head of its own.
    "llama, biases": lambda: LlamaConfig(
        **SIZES | {"num_key_value_heads": 4}, tie_word_embeddings=False, attention_bias=True,
        mlp_bias=True, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
    ),
    # One head of keys for all, heads wider together than the residuals.
    "qwen3, one key head": lambda: Qwen3Config(**SIZES | {"num_key_value_heads": 1}, head_dim=32),
}  # fmt: skip


def perturbed(config: PretrainedConfig, made=AutoModelForCausalLM.from_config) -> torch.nn.Module:
    """A random model whose gains and biases are no ones and zeros."""
    torch.manual_seed(0)
    model = made(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.12))
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A torch model, and the folder that it was saved to."""
    model = perturbed(CONFIGS[request.param]())
    folder = tmp_path_factory.mktemp("anchor")
    model.save_pretrained(folder)
    return model, folder


def tokens(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, (rows, LENGTH))


def torch_logits(model: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(rows), use_cache=False).logits.numpy()


def attached(folder: Path, kind: str = "ffn", **options) -> MemoryModel:
    return attach(load_anchor(folder)[0], MemoryConfig(RANKS, kind=kind, branching=2, **options))


def close(found: mx.array, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-4)


def in_pieces(model: MemoryModel, memory: mx.array | None, first: int) -> mx.array:
    """Logits of all tokens, through a cache: some at once, some two by two, the rest one by one."""
    given, cache = mx.array(tokens()), model.make_cache(memory)
    ends = [first, *range(first + 2, LENGTH - 6, 2), *range(LENGTH - 6, LENGTH + 1)]
    starts = [0, *ends[:-1]]
    steps = [model(given[:, a:b], cache=cache) for a, b in zip(starts, ends, strict=True) if b > a]
    return mx.concatenate(steps, axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_memory_changes_no_bit(pair, kind):
    anchor, _ = load_anchor(pair[1])
    given = mx.array(tokens())
    bare, cached = anchor(given), anchor(given, cache=make_prompt_cache(anchor))
    close(bare, torch_logits(pair[0], tokens()))
    model = attach(anchor, MemoryConfig(RANKS, kind=kind, branching=2))
    blocks = [mx.array(model.init_block(level, 1))[None] for level in (1, 2)]
    assert all(mx.abs(block).max() > 0 for block in blocks)
    memory = model.join(blocks)
    assert mx.array_equal(model(given, memory=memory), bare)
    assert mx.array_equal(model(given, memory=mx.repeat(memory, 2, axis=0)), bare)
    assert mx.array_equal(model(given, cache=model.make_cache(memory)), cached)


@pytest.mark.parametrize("first", [WINDOW - 3, WINDOW + 5], ids=["in window", "past window"])
def test_decoding_without_memory(pair, first):
    close(in_pieces(attached(pair[1]), None, first), torch_logits(pair[0], tokens()))


@pytest.mark.parametrize(
    ("kind", "where"), [*((kind, "uniform") for kind in KINDS), ("ffn", "late"), ("kv", "late")]
)
def test_a_memory_of_two_levels_in_one_call_and_in_pieces(pair, kind, where):
    layers = placement(where, SIZES["num_hidden_layers"])
    model = attached(pair[1], kind, layers=layers)
    blocks, joined = random_blocks(model, seed=1)
    assert list(joined) == (list(range(4)) if where == "uniform" else [2, 3])
    assert [block.shape[1] for block in blocks] == [
        model.config.block_size(level, model.anchor) for level in (1, 2)
    ]
    expected = torch_logits(with_memory(pair[0], kind, joined), tokens())
    assert np.abs(expected - torch_logits(pair[0], tokens())).max() > 0.05
    memory = model.join(blocks)
    close(model(mx.array(tokens()), memory=memory), expected)
    close(in_pieces(model, mx.repeat(memory, 2, axis=0), WINDOW + 3), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_two_memories_and_none(pair, kind):
    model, rows, expected = attached(pair[1], kind), tokens(3), []
    memories = []
    for row in range(2):
        blocks, joined = random_blocks(model, seed=row)
        memories.append(model.join(blocks))
        reference = with_memory(pair[0], kind, joined)
        expected.append(torch_logits(reference, rows[row : row + 1]))
    memories.append(mx.zeros_like(memories[0]))
    expected.append(torch_logits(pair[0], rows[2:]))
    close(model(mx.array(rows), memory=mx.concatenate(memories)), np.concatenate(expected))


# ---- folders as they lie on the Hub ----------------------------------------------------


def older(config: dict) -> dict:
    """A config.json as transformers 4 wrote it."""
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("layer_types").index("full_attention") + 1
        return config
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config


def test_a_folder_with_the_older_keys(pair, tmp_path):
    pair[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = older(json.loads(path.read_text()))
    assert "rope_parameters" not in config and "rope_theta" in config
    path.write_text(json.dumps(config))
    found = load_anchor(tmp_path)[0](mx.array(tokens()))
    close(found, torch_logits(pair[0], tokens()))


def test_a_folder_in_half_precision(pair, tmp_path):
    """Widened on the CPU: the same numbers, computed in float32 on both sides."""
    copy.deepcopy(pair[0]).to(torch.bfloat16).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = attached(tmp_path)
    blocks, joined = random_blocks(model, seed=1)
    expected = torch_logits(with_memory(reference, "ffn", joined), tokens())
    assert np.abs(expected - torch_logits(pair[0], tokens())).max() > 0.05
    close(model(mx.array(tokens()), memory=model.join(blocks)), expected)


def test_the_language_model_of_one_that_sees(tmp_path):
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**SIZES, **GEMMA3), vision_config=vision,
        image_token_index=1, mm_tokens_per_image=4,
    )  # fmt: skip
    reference = perturbed(config, Gemma3ForConditionalGeneration)
    reference.save_pretrained(tmp_path)
    path = tmp_path / "config.json"  # mlx-lm takes the vocabulary's size from the outer config
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": VOCAB}))
    model = attached(tmp_path)
    expected = torch_logits(reference, tokens())
    close(model(mx.array(tokens())), expected)
    close(in_pieces(model, None, WINDOW + 3), expected)
