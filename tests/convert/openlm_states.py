"""Small state dicts of OpenLM, written with torch.save, for the tests of configs and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

D, LAYERS, HEADS, HEAD_DIM, INNER, VOCAB = 16, 2, 2, 8, 24, 30
CONFIG: dict[str, Any] = {
    "hidden_dim": D, "n_layers": LAYERS, "n_heads": HEADS, "seq_len": 64, "vocab_size": VOCAB,
    "post_embed_norm": False, "weight_tying": False, "model_norm": "gain_only_layer_norm",
    "qk_norm": True, "positional_embedding_type": "rotary",
}  # fmt: skip


def state_dict(
    *,
    head_dim: int = HEAD_DIM,
    norm_parts: tuple[str, ...] = ("weight",),
    qk_norm: bool = True,
    tied: bool = False,
    post_embed_norm: bool = False,
    base: float | None = 10_000.0,
    buffer_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    layers: int = LAYERS,
) -> dict[str, torch.Tensor]:
    """Random numbers under OpenLM's names; ``base`` None: no buffers."""
    random = torch.Generator().manual_seed(0)
    width = HEADS * head_dim
    sizes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCAB, D)}

    def norm(name: str, size: int) -> None:
        sizes.update({f"{name}.{part}": (size,) for part in norm_parts})

    if post_embed_norm:
        norm("post_embed_norm", D)
    for n in range(layers):
        norm(f"layers.{n}.attention_norm", D)
        sizes[f"layers.{n}.attention.in_proj.weight"] = (3 * width, D)
        sizes[f"layers.{n}.attention.out_proj.weight"] = (D, width)
        if qk_norm:
            norm(f"layers.{n}.attention.q_norm", width)
            norm(f"layers.{n}.attention.k_norm", width)
        norm(f"layers.{n}.ffn_norm", D)
        sizes[f"layers.{n}.feed_forward.w12.weight"] = (2 * INNER, D)
        sizes[f"layers.{n}.feed_forward.w3.weight"] = (D, INNER)
    norm("norm", D)
    if not tied:
        sizes["output.weight"] = (VOCAB, D)
    found = {name: torch.randn(size, generator=random).to(dtype) for name, size in sizes.items()}
    if tied:
        found["output.weight"] = found["tok_embeddings.weight"]
    if base is not None:
        inv_freq = base ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        for n in range(layers):
            found[f"layers.{n}.attention.pos_embed.inv_freq"] = inv_freq.to(buffer_dtype)
    return found


def save(folder: Path, state: dict[str, torch.Tensor], **files: Any) -> Path:
    """``<folder>/checkpoints/epoch_1.pt`` and, beside the folder ``checkpoints``, more files.

    ``files``: a name with ``__`` for the dot; an object becomes JSON, for .txt lines of params.txt.
    """
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoints" / "epoch_1.pt"
    torch.save({"epoch": 1, "name": "run", "state_dict": state}, path)
    for name, values in files.items():
        write(folder / name.replace("__", "."), values)
    return path


def write(path: Path, values: dict[str, Any]) -> Path:
    """A file with values, as OpenLM writes params.txt or as JSON."""
    if path.suffix == ".txt":
        path.write_text("".join(f"{key}: {value}\n" for key, value in sorted(values.items())))
    else:
        path.write_text(json.dumps(values))
    return path
