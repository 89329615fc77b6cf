"""Memories by formula: random ones, and the torch model that has one in its own weights.

A block of rank r holds, for each layer with memory, the matrices (r, width) of its kind, one behind
the other; ``WIDTHS`` says which. Blocks of several levels join along their rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import torch

from mlx_hiermem.config import AnchorShape
from mlx_hiermem.memories import MemoryModel

#: For each layer with memory its matrices (R, width), rows of all levels.
Joined = dict[int, list[torch.Tensor]]

WIDTHS: dict[str, Callable[[AnchorShape], list[int]]] = {
    "ffn": lambda s: [s.hidden_size] * 3,
    "lora_qk": lambda s: [s.hidden_size, s.attention_width, s.hidden_size, s.key_value_width],
    "lora_vo": lambda s: [s.hidden_size, s.key_value_width, s.attention_width, s.hidden_size],
    "lora_ffn": lambda s: [
        s.hidden_size, s.intermediate_size, s.hidden_size, s.intermediate_size,
        s.intermediate_size, s.hidden_size,
    ],
    "kv": lambda s: [s.key_value_width] * 2,
}  # fmt: skip
ADAPTED = {
    "lora_qk": ("self_attn", "q_proj", "k_proj"),
    "lora_vo": ("self_attn", "v_proj", "o_proj"),
    "lora_ffn": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def random_blocks(model: MemoryModel, seed: int) -> tuple[list[mx.array], Joined]:
    """A block (1, s_l) for each level of a model, and the same numbers joined."""
    config, shape = model.config, AnchorShape.of(model.anchor)
    rng, layers = np.random.default_rng(seed), config.memory_layers(shape)
    blocks: list[list[np.ndarray]] = [[] for _ in config.ranks]
    joined: Joined = {layer: [] for layer in layers}
    for layer in layers:
        for width in WIDTHS[config.kind](shape):
            pieces = [
                0.15 * rng.standard_normal((rank, width), np.float32) for rank in config.ranks
            ]
            for block, piece in zip(blocks, pieces, strict=True):
                block.append(piece.reshape(-1))
            joined[layer].append(torch.from_numpy(np.concatenate(pieces)))
    return [mx.array(np.concatenate(block))[None] for block in blocks], joined


def with_memory(model: torch.nn.Module, kind: str, joined: Joined) -> torch.nn.Module:
    """A copy of a torch model with a memory in its weights, or, of keys and values, in hooks."""
    model = copy.deepcopy(model)
    for index, matrices in joined.items():
        layer = model.model.layers[index]
        if kind == "kv":
            attend_to_pairs(layer.self_attn, model.config, *matrices)
        elif kind == "ffn":
            m1, m2, m3 = matrices
            add_rows(layer.mlp.gate_proj, m1)
            add_rows(layer.mlp.up_proj, m2)
            down = layer.mlp.down_proj.weight
            down.data = torch.cat([down, m3.T], dim=1)
        else:
            part, *names = ADAPTED[kind]
            for name, a, b in zip(names, matrices[::2], matrices[1::2], strict=True):
                getattr(getattr(layer, part), name).weight.data += 2 * b.T @ a
    return model


def add_rows(linear: torch.nn.Linear, rows: torch.Tensor) -> None:
    linear.weight.data = torch.cat([linear.weight, rows])
    if linear.bias is not None:
        linear.bias.data = torch.cat([linear.bias, torch.zeros(len(rows))])


def attend_to_pairs(
    attention: torch.nn.Module, config, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Add each head's attention to learned pairs to what the output projection is given.

    The queries are those behind the query norm, if there is one, and before the rotary
    embedding; nothing is masked.
    """
    heads, size = config.num_attention_heads, attention.head_dim
    per_key = heads // config.num_key_value_heads
    keys, values = (pairs.reshape(len(pairs), -1, size) for pairs in (keys, values))
    seen = {}

    def remember(_module, _inputs, out):
        # (B, T, heads * size), or by head: some norm before heads and time change places
        out = out.reshape(*out.shape[:2], heads, size) if out.ndim == 3 else out
        seen["queries"] = out if out.shape[2] == heads else out.transpose(1, 2)

    def add(_module, inputs):
        queries = seen["queries"]
        extra = torch.empty_like(queries)
        for head in range(heads):  # one by one: nothing hangs on how libraries share keys
            scores = queries[:, :, head] @ keys[:, head // per_key].T * attention.scaling
            extra[:, :, head] = scores.softmax(-1) @ values[:, head // per_key]
        return (inputs[0] + extra.reshape(inputs[0].shape),)

    norm = getattr(attention, "q_norm", None) or getattr(attention, "q_layernorm", None)
    (norm or attention.q_proj).register_forward_hook(remember)
    attention.o_proj.register_forward_pre_hook(add)
