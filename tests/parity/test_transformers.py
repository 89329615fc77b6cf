"""Open-weight architectures against transformers: tiny random models, saved there and loaded here.

Memories are put into the torch model by formula: FFN memories concatenated to its matrices, LoRA
merged into them, key/value pairs by attention written out in hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)

from mlx_hiermem import kinds
from mlx_hiermem.anchors import load_anchor
from mlx_hiermem.config import AnchorShape, MemoryConfig
from mlx_hiermem.memories import MemoryModel, attach, detach
from mlx_hiermem.memories.layout import JoinedLayout

VOCAB, LENGTH, RANKS = 64, 24, (5, 3)
COMMON = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip

CONFIGS = {
    # Llama 3.2: tied, its own scaling of the rotary embedding
    "llama": lambda: LlamaConfig(
        **COMMON, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    # Qwen 2.5: biases of queries, keys and values
    "qwen2": lambda: Qwen2Config(**COMMON, tie_word_embeddings=True),
    # Gemma 3: GeGLU, local and global attention, query norms, its own scale
    "gemma3": lambda: Gemma3TextConfig(
        # Wide 64, whose root is exact in bfloat16, as which mlx-lm keeps it.
        **COMMON | {"num_key_value_heads": 1, "hidden_size": 64}, head_dim=16, sliding_window=8,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
        sliding_window_pattern=3,
    ),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=16),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None),
    "olmo2": lambda: Olmo2Config(**COMMON),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The torch model, and the folder that it was saved to."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases start as ones and zeros
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.15))
    model.eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH))


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens()), use_cache=False).logits.numpy()


def assert_close(found: mx.array, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-4)


def attached(folder, kind: str = "ffn", layers: tuple[int, ...] | None = None) -> MemoryModel:
    anchor, _ = load_anchor(folder)
    return attach(anchor, MemoryConfig(RANKS, kind=kind, branching=2, layers=layers))


def random_memory(model: MemoryModel) -> tuple[mx.array, dict[int, list[np.ndarray]]]:
    """A memory (1, N), and its matrices by layer."""
    shape, config = AnchorShape.of(model.anchor), model.config
    rng = np.random.default_rng(1)
    layers, flat = {}, []
    for layer in config.memory_layers(shape):
        widths = kinds.find(config.kind).row_widths(shape)
        layers[layer] = [
            0.3 * rng.standard_normal((sum(RANKS), width), np.float32) for width in widths
        ]
        flat += [matrix.reshape(-1) for matrix in layers[layer]]
    memory = mx.array(np.concatenate(flat))[None]
    assert memory.shape[1] == JoinedLayout(config, shape).size
    return memory, layers


def test_logits_without_memory(pair):
    model, folder = pair
    expected = torch_logits(model)
    anchor, _ = load_anchor(folder)
    bare = anchor(mx.array(tokens()))
    assert_close(bare, expected)
    with_place = attached(folder)
    assert mx.array_equal(with_place(mx.array(tokens())), bare)
    cache = with_place.make_cache()
    pieces = [with_place(mx.array(tokens()[:, :9]), cache=cache)]
    pieces += [with_place(mx.array(tokens()[:, t : t + 1]), cache=cache) for t in range(9, LENGTH)]
    assert_close(mx.concatenate(pieces, axis=1), expected)
    assert detach(with_place) is with_place.anchor


# ---- with a memory ---------------------------------------------------------------------


def widen(model: torch.nn.Module, layers: dict[int, list[np.ndarray]]) -> None:
    for index, matrices in layers.items():
        mlp = model.model.layers[index].mlp
        m1, m2, m3 = map(torch.from_numpy, matrices)
        mlp.gate_proj.weight.data = torch.cat([mlp.gate_proj.weight, m1])
        mlp.up_proj.weight.data = torch.cat([mlp.up_proj.weight, m2])
        mlp.down_proj.weight.data = torch.cat([mlp.down_proj.weight, m3.T], dim=1)


def merge(model: torch.nn.Module, layers: dict[int, list[np.ndarray]], part: str, names) -> None:
    for index, matrices in layers.items():
        module = getattr(model.model.layers[index], part)
        for at, name in enumerate(names):
            a, b = map(torch.from_numpy, matrices[2 * at : 2 * at + 2])
            getattr(module, name).weight.data += 2 * b.T @ a


@contextmanager
def attending(model: torch.nn.Module, layers: dict[int, list[np.ndarray]]) -> Iterator[None]:
    """Adds each head's attention to the learned pairs before the output projection."""
    config, handles = model.config, []
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    scale = (getattr(config, "query_pre_attn_scalar", None) or size) ** -0.5

    def hook(index: int, matrices: list[np.ndarray]) -> None:
        attention, seen = model.model.layers[index].self_attn, {}
        keys, values = (torch.from_numpy(m).reshape(-1, shared, size) for m in matrices)
        keys, values = (t.repeat_interleave(heads // shared, dim=1) for t in (keys, values))

        def remember(_, __, out):
            seen["q"] = out

        def add(_, args):
            q = seen["q"].reshape(*args[0].shape[:2], heads, size)
            if norm is not None and norm.weight.shape == (size,):
                q = norm(q)
            weights = (torch.einsum("bthd,rhd->bthr", q, keys) * scale).softmax(-1)
            extra = torch.einsum("bthr,rhd->bthd", weights, values)
            return (args[0] + extra.reshape(args[0].shape),)

        norm = getattr(attention, "q_norm", None)
        whole = norm is not None and norm.weight.shape != (size,)
        handles.append((norm if whole else attention.q_proj).register_forward_hook(remember))
        handles.append(attention.o_proj.register_forward_pre_hook(add))

    for index, matrices in layers.items():
        hook(index, matrices)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["ffn", "lora_qk", "lora_vo", "lora_ffn", "kv"])
def test_logits_with_a_memory(pair, kind, layers):
    reference, folder = copy.deepcopy(pair[0]), pair[1]
    bare = torch_logits(reference)
    model = attached(folder, kind, layers)
    memory, matrices = random_memory(model)
    found = model(mx.array(tokens()), memory=memory)
    if kind == "kv":
        with attending(reference, matrices), torch.no_grad():
            expected = torch_logits(reference)
    else:
        if kind == "ffn":
            widen(reference, matrices)
        elif kind == "lora_ffn":
            merge(reference, matrices, "mlp", ("gate_proj", "up_proj", "down_proj"))
        else:
            names = ("q_proj", "k_proj") if kind == "lora_qk" else ("v_proj", "o_proj")
            merge(reference, matrices, "self_attn", names)
        expected = torch_logits(reference)
    assert np.abs(expected - bare).max() > 0.05
    assert_close(found, expected)
