"""The numbers of a tiny OpenLM anchor and its memory bank, and what converting should give.

What is expected is computed here from docs/format.md, and not by the converter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

#: For each kind its matrices, in the order of a block, and what their rows are as wide as.
MATRICES: dict[str, dict[str, str]] = {
    "ffn": {"w1": "d", "w2": "d", "w3": "d"},
    "lora_qk": {"q_a": "d", "q_b": "A", "k_a": "d", "k_b": "K"},
    "lora_vo": {"v_a": "d", "v_b": "K", "o_a": "A", "o_b": "d"},
    "lora_ffn": {"w1_a": "d", "w1_b": "f", "w2_a": "d", "w2_b": "f", "w3_a": "f", "w3_b": "d"},
    "kv": {"keys": "K", "values": "K"},
}


@dataclass(frozen=True)
class Example:
    """The numbers of an anchor and its bank.

    Attributes:
        kind, branching, ranks: of the memory; ``layers``: the anchor's layers that have it.
        anchor: OpenLM's state dict.
        blocks: level -> matrix -> (k^l, L, r, w); only levels with memory.
        generic: matrix -> (L, R, w), the rows of level 1 first.
        tree: centroids of level 1, 2, ...: (k^l, c) float32.
        model_config: as in OpenLM's model_configs/*.json; ``head_dim`` is in it only where it is
            not d / heads (OpenLM itself has no such key).
        params: what is in ``params.txt``, besides a few more.
        memory_config: as ``memory_config.json`` has it, without ``transposed``.
    """

    kind: str
    branching: int
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    anchor: dict[str, torch.Tensor]
    blocks: dict[int, dict[str, torch.Tensor]]
    generic: dict[str, torch.Tensor]
    tree: list[np.ndarray]
    model_config: dict[str, Any]
    params: dict[str, Any]
    memory_config: dict[str, Any]

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels with memory, from 1."""
        return tuple(self.blocks)

    def block(self, level: int, cluster: int) -> np.ndarray:
        """The block (s_l,) float32 as docs/format.md orders it: by layer, by matrix, by row."""
        parts = [array[cluster] for array in self.blocks[level].values()]
        return _flat(parts)

    def generic_memory(self) -> np.ndarray:
        """The generic memory (fetch_size,) float32: a block of each level with memory."""
        blocks, start = [], 0
        for level in self.levels:
            end = start + self.ranks[level - 1]
            parts = [array[:, start:end] for array in self.generic.values()]
            blocks.append(_flat(parts))
            start = end
        return np.concatenate(blocks)

    def with_dtype(self, dtype: torch.dtype) -> Example:
        """The same, its bank converted to another dtype."""
        return replace(
            self,
            blocks={
                level: {name: array.to(dtype) for name, array in arrays.items()}
                for level, arrays in self.blocks.items()
            },
            generic={name: array.to(dtype) for name, array in self.generic.items()},
        )


def _flat(parts: Sequence[torch.Tensor]) -> np.ndarray:
    """Matrices (L, r, w) in the order of a block: layer after layer."""
    layers = range(len(parts[0]))
    return np.concatenate(
        [part[layer].float().numpy().reshape(-1) for layer in layers for part in parts]
    )


def make_numbers(
    seed: int = 0,
    kind: str = "ffn",
    branching: int = 3,
    ranks: Sequence[int] = (4, 2),
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    anchor_dtype: torch.dtype | None = None,
    d: int = 16,
    n_layers: int = 2,
    heads: int = 2,
    head_dim: int | None = None,
    f: int = 32,
    vocab: int = 64,
    seq_len: int = 64,
    norm: str = "gain_only_layer_norm",
    qk_norm: bool = True,
    tied: bool = False,
    post_embed_norm: bool = False,
    rotary: str = "rotary",
    width: int = 8,
) -> Example:
    """Random numbers of an anchor, a bank and a tree.

    Args:
        layers: of the anchor that have memory; None: all.
        dtype: of the bank; ``anchor_dtype`` of the anchor, the same by default.
        head_dim: d / heads by default.
        norm, qk_norm, tied, post_embed_norm, rotary: OpenLM's ``model_norm``, ``qk_norm``,
            ``weight_tying``, ``post_embed_norm``, ``positional_embedding_type``.
        width: c of the tree.
    """
    rng = torch.Generator().manual_seed(seed)
    hd = d // heads if head_dim is None else head_dim
    config: dict[str, Any] = {
        "hidden_dim": d, "n_layers": n_layers, "n_heads": heads, "seq_len": seq_len,
        "vocab_size": vocab, "post_embed_norm": post_embed_norm, "weight_tying": tied,
        "model_norm": norm, "qk_norm": qk_norm, "positional_embedding_type": rotary,
    }  # fmt: skip
    if hd * heads != d:
        config["head_dim"] = hd
    anchor = _anchor(rng, config, hd, f)
    widths = {"d": d, "A": heads * hd, "K": heads * hd, "f": f}
    matrices = {name: widths[width] for name, width in MATRICES[kind].items()}
    having = tuple(range(n_layers)) if layers is None else tuple(layers)

    def numbers(*shape: int) -> torch.Tensor:
        return (0.5 * torch.randn(shape, generator=rng)).to(dtype)

    blocks = {
        level: {
            name: numbers(branching**level, len(having), rank, width)
            for name, width in matrices.items()
        }
        for level, rank in enumerate(ranks, 1)
        if rank
    }
    generic = {name: numbers(len(having), sum(ranks), width) for name, width in matrices.items()}
    points = torch.randn(
        (sum(branching**n for n in range(1, len(ranks) + 1)), width), generator=rng
    )
    sizes = [branching**level for level in range(1, len(ranks) + 1)]
    tree = [part.numpy().copy() for part in points.split(sizes)]
    return Example(
        kind=kind, branching=branching, ranks=tuple(ranks), layers=having,
        anchor={
            name: tensor if name.endswith("inv_freq") else tensor.to(anchor_dtype or dtype)
            for name, tensor in anchor.items()
        },
        blocks=blocks, generic=generic, tree=tree, model_config=config,
        params={
            "model_norm": norm, "qk_norm": qk_norm, "positional_embedding_type": rotary,
            "ffn_type": "swiglu", "seq_len": seq_len, "precision": "amp_bfloat16", "fsdp": True,
        },
        memory_config={
            "kind": kind, "branching": branching, "ranks": list(ranks), "layers": list(having)
        },
    )  # fmt: skip


def _anchor(
    rng: torch.Generator, config: Mapping[str, Any], hd: int, f: int
) -> dict[str, torch.Tensor]:
    """OpenLM's state dict, in OpenLM's order."""
    d, width, vocab = config["hidden_dim"], config["n_heads"] * hd, config["vocab_size"]
    found: dict[str, torch.Tensor] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = torch.randn((rows, columns), generator=rng) * columns**-0.5

    def norm(name: str, size: int) -> None:
        if config["model_norm"] != "no_wb_layer_norm":
            found[f"{name}.weight"] = 0.5 + torch.rand(size, generator=rng)
        if config["model_norm"] in ("default_layer_norm", "lp_layer_norm"):
            found[f"{name}.bias"] = 0.1 * torch.randn(size, generator=rng)

    if config["post_embed_norm"]:
        norm("post_embed_norm", d)
    matrix("tok_embeddings", vocab, d)
    for n in range(config["n_layers"]):
        attention = f"layers.{n}.attention"
        matrix(f"{attention}.in_proj", 3 * width, d)
        matrix(f"{attention}.out_proj", d, width)
        inv_freq = 10_000.0 ** -(torch.arange(0, hd, 2).float() / hd)
        found[f"{attention}.pos_embed.inv_freq"] = inv_freq
        if config["qk_norm"]:
            norm(f"{attention}.q_norm", width)
            norm(f"{attention}.k_norm", width)
        matrix(f"layers.{n}.feed_forward.w12", 2 * f, d)
        matrix(f"layers.{n}.feed_forward.w3", d, f)
        norm(f"layers.{n}.attention_norm", d)
        norm(f"layers.{n}.ffn_norm", d)
    norm("norm", d)
    if config["weight_tying"]:
        found["output.weight"] = found["tok_embeddings.weight"]
    else:
        matrix("output", vocab, d)
    return found
