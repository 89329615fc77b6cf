"""What the tests of ``init`` share: a llama, running the command, and looking at what it made."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hiermem import cli

#: The options of a small bank.
SMALL = ["--config", "4,2", "--branching", "3"]


def save_llama(folder: Path, tokenizer: Path, **sizes) -> Path:
    """A random Llama, saved by transformers, with the tokenizer of another folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 257,
        "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 256,
    } | sizes  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def init(model: Path | str, out: Path, *more: str) -> int:
    return cli.main(["init", "--model", str(model), "--mlx-path", str(out), *more])


def logits(lm, memory) -> np.ndarray:
    cache = lm.prompt_cache(memory, "some words.")
    tokens = mx.array([lm.tokenize("some words.")])
    return np.array(lm.model(tokens, cache=cache)[0].astype(mx.float32))


def zeros(model: Path) -> list[str]:
    """Names of the files in a memory folder that hold zeros."""
    return [
        path.name
        for path in (model / "memory").iterdir()
        if path.name.startswith(("level-", "generic"))
    ]


def disk_bytes(model: Path) -> int:
    return sum(512 * (model / "memory" / name).stat().st_blocks for name in zeros(model))
