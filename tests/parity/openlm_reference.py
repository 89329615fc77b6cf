"""OpenLM with a memory, written from the formulas in torch: one head, one position at a time.

Independent of everything in ``mlx_hiermem`` and ``convert``: float64, the state dict under OpenLM's
own names, the model_config under OpenLM's own keys. Slow and simple, so that it can be read against
section 3 and appendix A of the paper (architecture, kinds of memory), section 2 (FFN memories as
wider matrices), and model.py, norms.py and positional_embedding/ of mlfoundations/open_lm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: For each layer with memory its matrices, R rows each, in the order of docs/format.md.
Memory = Mapping[int, Sequence[Tensor]]


def logits(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokens: Sequence[int],
    kind: str | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """Logits (T, V) float64.

    ``config`` has OpenLM's keys, and ``head_dim``, ``rope_theta`` and ``bf16_frequencies``.
    """
    w = {name: tensor.double() for name, tensor in state.items()}
    memory = memory or {}
    x = w["tok_embeddings.weight"][list(tokens)]
    if config["post_embed_norm"]:
        x = norm(w, "post_embed_norm", x, config)
    for n in range(config["n_layers"]):
        mine = [matrix.double() for matrix in memory[n]] if n in memory else None
        h = norm(w, f"layers.{n}.attention_norm", x, config)
        x = x + attention(w, n, h, config, kind, mine)
        h = norm(w, f"layers.{n}.ffn_norm", x, config)
        x = x + feed_forward(w, n, h, kind, mine)
    x = norm(w, "norm", x, config)
    head = "tok_embeddings" if config["weight_tying"] else "output"
    return x @ w[f"{head}.weight"].T


def norm(w: Mapping[str, Tensor], name: str, x: Tensor, config: Mapping[str, Any]) -> Tensor:
    rows = []
    for row in x:
        centre = 0.0 if config["model_norm"] == "rms_norm" else row.sum() / len(row)
        spread = ((row - centre) ** 2).sum() / len(row)
        row = (row - centre) / math.sqrt(spread + config["norm_eps"])
        if config["model_norm"] != "no_wb_layer_norm":
            row = row * w[f"{name}.weight"]
        if config["model_norm"] in ("default_layer_norm", "lp_layer_norm"):
            row = row + w[f"{name}.bias"]
        rows.append(row)
    return torch.stack(rows)


def turned(vector: Tensor, position: int, config: Mapping[str, Any]) -> Tensor:
    """One head's query or key at a position."""
    kind, size = config["positional_embedding_type"], len(vector)
    if kind == "none":
        return vector
    out = torch.empty_like(vector)
    for i in range(size // 2):
        frequency = torch.tensor(config["rope_theta"] ** (-2 * i / size), dtype=torch.float32)
        if config["bf16_frequencies"]:
            frequency = frequency.to(torch.bfloat16)
        angle = position * float(frequency)
        a, b = (2 * i, 2 * i + 1) if kind == "llama_rotary" else (i, i + size // 2)
        out[a] = vector[a] * math.cos(angle) - vector[b] * math.sin(angle)
        out[b] = vector[b] * math.cos(angle) + vector[a] * math.sin(angle)
    return out


def attention(
    w: Mapping[str, Tensor],
    n: int,
    x: Tensor,
    config: Mapping[str, Any],
    kind: str | None,
    memory: Sequence[Tensor] | None,
) -> Tensor:
    name = f"layers.{n}.attention"
    heads, size = config["n_heads"], config["head_dim"]
    width = heads * size
    in_proj = w[f"{name}.in_proj.weight"]
    w_q, w_k, w_v = in_proj[:width], in_proj[width : 2 * width], in_proj[2 * width :]
    w_o = w[f"{name}.out_proj.weight"]
    if memory is not None and kind == "lora_qk":  # alpha is 2; B is stored transposed
        w_q, w_k = w_q + 2 * memory[1].T @ memory[0], w_k + 2 * memory[3].T @ memory[2]
    if memory is not None and kind == "lora_vo":
        w_v, w_o = w_v + 2 * memory[1].T @ memory[0], w_o + 2 * memory[3].T @ memory[2]
    q, k, v = x @ w_q.T, x @ w_k.T, x @ w_v.T
    if config["qk_norm"]:  # over all heads together
        q, k = norm(w, f"{name}.q_norm", q, config), norm(w, f"{name}.k_norm", k, config)
    out = torch.zeros_like(q)
    for head in range(heads):
        at = slice(head * size, (head + 1) * size)
        keys = torch.stack([turned(row, j, config) for j, row in enumerate(k[:, at])])
        for t in range(len(x)):
            query = turned(q[t, at], t, config)
            share = torch.softmax(keys[: t + 1] @ query / math.sqrt(size), 0)
            out[t, at] = share @ v[: t + 1, at]
            if memory is not None and kind == "kv":  # neither mask nor position
                pairs, values = memory[0][:, at], memory[1][:, at]
                out[t, at] += torch.softmax(pairs @ q[t, at] / math.sqrt(size), 0) @ values
    return out @ w_o.T


def feed_forward(
    w: Mapping[str, Tensor], n: int, x: Tensor, kind: str | None, memory: Sequence[Tensor] | None
) -> Tensor:
    w12, w3 = w[f"layers.{n}.feed_forward.w12.weight"], w[f"layers.{n}.feed_forward.w3.weight"]
    w1, w2 = w12[: len(w12) // 2], w12[len(w12) // 2 :]
    if memory is not None and kind == "ffn":
        w1, w2 = torch.cat([w1, memory[0]]), torch.cat([w2, memory[1]])
        w3 = torch.cat([w3, memory[2].T], 1)
    if memory is not None and kind == "lora_ffn":
        w1 = w1 + 2 * memory[1].T @ memory[0]
        w2 = w2 + 2 * memory[3].T @ memory[2]
        w3 = w3 + 2 * memory[5].T @ memory[4]
    gate = x @ w1.T
    return (gate / (1 + torch.exp(-gate)) * (x @ w2.T)) @ w3.T
