"""Memories on mlx-lm's own architectures, tiny and random: each is the anchor with other matrices.

The oracle for FFN memories is the same model with wider matrices, that for LoRA memories the same
model with other weights; both run mlx-lm's code alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3
from mlx_lm.models.cache import make_prompt_cache

from mlx_hiermem.anchors import context_length
from mlx_hiermem.anchors.vocabulary import vocabulary
from mlx_hiermem.config import AnchorShape, MemoryConfig
from mlx_hiermem.errors import ConfigError
from mlx_hiermem.memories import MemoryModel, attach, detach
from tests.anchors.tiny import FFN, GATED, INNER, LAYERS, NESTED, VOCAB, WINDOW, D, make

RANKS = (4, 2)
R, LENGTH = sum(RANKS), 11
assert LENGTH > 2 * WINDOW

every_anchor = pytest.mark.parametrize("name", [*GATED, *NESTED])


def config(kind: str = "ffn", **options) -> MemoryConfig:
    return MemoryConfig(RANKS, kind=kind, branching=2, **options)


def tokens(rows: int = 2) -> mx.array:
    return mx.array(np.random.default_rng(0).integers(0, VOCAB, (rows, LENGTH)))


def numbers(*shape: int, seed: int = 1) -> np.ndarray:
    return 0.3 * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def ffn_memory(count: int = 1) -> mx.array:
    return mx.array(numbers(count, LAYERS * 3 * R * D))


def ffns(name: str, anchor: nn.Module) -> list[nn.Module]:
    return [layer[FFN.get(name, "mlp")] for layer in anchor.layers]


def close(found: mx.array, expected: mx.array) -> None:
    """Equal but for rounding, which grows with the logits."""
    size = mx.abs(expected).max().item()
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-4 * size)


def differs(found: mx.array, bare: mx.array) -> None:
    assert mx.abs(found - bare).max() > 0.1 * mx.abs(bare).max()


def widen(ffn: nn.Module, m1: mx.array, m2: mx.array, m3: mx.array) -> None:
    """Concatenate rows (R, d) to an FFN's matrices; biases of new inner units are zero."""
    for linear, rows in ((ffn.gate_proj, m1), (ffn.up_proj, m2)):
        linear.weight = mx.concatenate([linear.weight, rows])
        if "bias" in linear:
            linear.bias = mx.concatenate([linear.bias, mx.zeros(len(rows))])
    ffn.down_proj.weight = mx.concatenate([ffn.down_proj.weight, m3.T], axis=1)


@every_anchor
def test_no_memory_and_a_new_memory_change_nothing(name):
    anchor = make(name)
    bare, cached = anchor(tokens()), anchor(tokens(), cache=make_prompt_cache(anchor))
    weights = dict(tree_flatten(anchor.parameters()))
    model = attach(anchor, config())
    start = model.join([mx.array(model.init_block(level, 0))[None] for level in (1, 2)])
    assert mx.abs(start).max() > 0
    for memory in (None, start, mx.zeros_like(start)):
        assert mx.array_equal(model(tokens(), memory=memory), bare)
        assert mx.array_equal(model(tokens(), cache=model.make_cache(memory)), cached)
    after = dict(tree_flatten(anchor.parameters()))
    assert after.keys() == weights.keys() and all(after[key] is weights[key] for key in weights)


@every_anchor
def test_an_ffn_memory_is_the_anchor_with_wider_matrices(name):
    anchor, memory = make(name), ffn_memory()
    bare = anchor(tokens())
    model = attach(anchor, config())
    found = model(tokens(), memory=memory)
    assert detach(model) is anchor
    rows = memory.reshape(LAYERS, 3, R, D)
    for ffn, (m1, m2, m3) in zip(ffns(name, anchor), rows, strict=True):
        widen(ffn, m1, m2, m3)
    close(found, anchor(tokens()))
    differs(found, bare)


@every_anchor
def test_decoding_in_pieces_with_a_memory_of_each_sequence(name):
    model = attach(make(name), config())
    memory = ffn_memory(2)
    alone = [model(tokens()[row : row + 1], memory=memory[row : row + 1]) for row in range(2)]
    whole = mx.concatenate(alone)
    close(model(tokens(), memory=memory), whole)
    cache = model.make_cache(memory)
    pieces = [model(tokens()[:, :7], cache=cache)]
    pieces += [model(tokens()[:, at : at + 1], cache=cache) for at in range(7, LENGTH)]
    close(mx.concatenate(pieces, axis=1), whole)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen2", "falcon_h1", "deepseek"])
def test_only_some_layers(name):
    anchor = make(name)
    model = attach(anchor, config(layers=(0,)))  # of deepseek's, the only one without experts
    memory = ffn_memory()[:, : 3 * R * D]
    found = model(tokens(), memory=memory)
    widen(ffns(name, detach(model))[0], *memory.reshape(3, R, D))
    close(found, anchor(tokens()))


def test_sizes_that_a_config_leaves_to_its_defaults():
    """As the config.json of Gemma 3 4B does."""
    inner = dict(
        model_type="gemma3_text", hidden_size=D, intermediate_size=INNER, num_hidden_layers=LAYERS
    )
    config = {"model_type": "gemma3", "text_config": inner, "vocab_size": VOCAB}
    anchor = gemma3.Model(gemma3.ModelArgs.from_dict(config))
    assert AnchorShape.of(anchor) == AnchorShape(LAYERS, D, INNER, 8, 256, 4)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 8}, 8),
        ({"text_config": {"max_position_embeddings": 8}}, 8),
        ({"max_position_embeddings": 8, "text_config": {"max_position_embeddings": 9}}, 8),
        ({"text_config": {}}, None),
        ({"text_config": "none"}, None),
    ],
)
def test_the_length_of_the_context(config, length):
    assert context_length(config) == length


@pytest.mark.parametrize("name", ["gemma3", "qwen2", "falcon_h1"])
def test_the_tokens_that_an_anchor_has(name):
    model = attach(make(name), config())
    assert vocabulary(model) == VOCAB
    vars(model)["modules"] = list  # its embeddings are of no kind of MLX's
    assert vocabulary(model) == VOCAB


# ---- LoRA kinds ------------------------------------------------------------------------

LORA = {
    "lora_qk": ("self_attn", "q_proj", "k_proj"),
    "lora_vo": ("self_attn", "v_proj", "o_proj"),
    "lora_ffn": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
NONE = "layer 0 .* has no attention with q_proj, k_proj, v_proj, o_proj"
#: Where layers have no such attention, or not one as wide as the config says for all.
NO_ATTENTION = {
    "qwen3_5": NONE,
    "minicpm3": NONE,
    "spark2_5": NONE,
    "recurrent_gemma": NONE,
    "jamba": NONE,
    "youtu_llm": NONE,
    "baichuan_m1": NONE,
    "gemma4_text": "layer 1 .* from 32 to .* where the anchor's config says 32 to",
    "olmo_hybrid": "layer 0 .* 16 .* where the anchor's config says .*32",
    "plamo": "layer 0 .* 32 to 16 numbers, where the anchor's config says 32 to 32",
}
#: Its config has the width of gate and up together.
NO_FFN = {"recurrent_gemma": f"from {D} to {INNER // 2} numbers, where .* says {D} to {INNER}"}


def adapted(name: str, kind: str, layer: nn.Module) -> Iterator[nn.Module]:
    part, *names = LORA[kind]
    part = FFN.get(name, part) if part == "mlp" else part
    yield from (layer[part][one] for one in names)


@pytest.mark.parametrize("kind", LORA)
@every_anchor
def test_a_lora_memory_is_the_anchor_with_other_weights(name, kind):
    anchor = make(name)
    bare = anchor(tokens())
    reason = (NO_FFN if kind == "lora_ffn" else NO_ATTENTION).get(name)
    if reason is not None:
        with pytest.raises(ConfigError, match=reason):
            attach(anchor, config(kind))
        assert mx.array_equal(anchor(tokens()), bare)
        return
    model = attach(anchor, config(kind))
    parts, merged = [], []
    for layer in anchor.layers:
        for linear in adapted(name, kind, layer):
            out, width = linear.weight.shape
            a, b = numbers(R, width, seed=len(parts)), numbers(R, out, seed=len(parts) + 1)
            parts += [a.reshape(-1), b.reshape(-1)]
            merged.append((linear, linear.weight + 2 * mx.array(b.T @ a)))
    found = model(tokens(), memory=mx.array(np.concatenate(parts))[None])
    detach(model)
    for linear, weight in merged:
        linear.weight = weight
    close(found, anchor(tokens()))
    differs(found, bare)


# ---- quantised anchors -----------------------------------------------------------------

MODES = {"4 bits": (32, 4, "affine"), "8 bits": (32, 8, "affine"), "mxfp4": (32, 4, "mxfp4")}


def quantised(name: str, mode: str, dtype: mx.Dtype = mx.float32) -> nn.Module:
    anchor = make(name)
    anchor.set_dtype(dtype)
    group_size, bits, how = MODES[mode]
    nn.quantize(anchor, group_size, bits, mode=how)
    for ffn in ffns(name, anchor):
        assert all(isinstance(ffn[one], nn.QuantizedLinear) for one in LORA["lora_ffn"][1:])
    return anchor


def dequantised(linear: nn.QuantizedLinear) -> nn.Linear:
    weight = mx.dequantize(
        linear.weight, linear.scales, linear.get("biases"), linear.group_size, linear.bits,
        mode=linear.mode,
    )  # fmt: skip
    plain = nn.Linear(1, 1, bias=False)
    plain.weight = weight.astype(mx.float32)
    if "bias" in linear:
        plain.bias = linear.bias
    return plain


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_a_memory_on_a_quantised_anchor_is_not_quantised(name, mode):
    """What is added is exact: the same as wider matrices of the numbers that the anchor has."""
    anchor, memory = quantised(name, mode), ffn_memory().astype(mx.bfloat16)
    bare = anchor(tokens())
    weights = dict(tree_flatten(anchor.parameters()))
    model = attach(anchor, config())
    assert mx.array_equal(model(tokens()), bare)
    found = model(tokens(), memory=memory)
    after = dict(tree_flatten(detach(model).parameters()))
    assert after.keys() == weights.keys() and all(after[key] is weights[key] for key in weights)
    rows = memory.astype(mx.float32).reshape(LAYERS, 3, R, D)
    for ffn, (m1, m2, m3) in zip(ffns(name, anchor), rows, strict=True):
        for one in LORA["lora_ffn"][1:]:
            ffn[one] = dequantised(ffn[one])
        widen(ffn, m1, m2, m3)
    close(found, anchor(tokens()))
    differs(found, bare)


@pytest.mark.parametrize("kind", ["ffn", "kv", *LORA])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_memory_of_another_dtype_leaves_that_of_the_anchor(mode, dtype, kind):
    """A bfloat16 memory: the logits, and the keys and values that are cached, stay as they were."""
    if mode is None:
        anchor = make("llama")
        anchor.set_dtype(dtype)
    else:
        anchor = quantised("llama", mode, dtype)
    model = attach(anchor, config(kind))
    memory = mx.array(numbers(1, model.config.fetch_size(model))).astype(mx.bfloat16)
    bare, dtypes = cached(model, None)
    if mode != "mxfp4":  # what it is multiplied out to is bfloat16, whatever the norms are
        assert dtypes == {dtype}
    found, with_memory = cached(model, memory)
    assert with_memory == dtypes
    differs(found, bare)


def cached(model: MemoryModel, memory: mx.array | None) -> tuple[mx.array, set[mx.Dtype]]:
    """Logits, and all dtypes of them and of the cached keys and values."""
    cache = model.make_cache(memory)
    logits = model(tokens(1), cache=cache)
    arrays = [logits, *(array for entry in cache[:-1] for array in entry.state[:2])]
    return logits, {array.dtype for array in arrays}
