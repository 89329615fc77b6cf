"""A tiny model folder with a memory bank, made of random numbers in well under a second.

It is whole: anchor, tokenizer, encoder, tree, bank and manifest are the real formats, so
``mlx_hiermem.load`` opens it and every subcommand runs on it. Notable:
- tokens are bytes, so any text can be its prompt;
- only letters, digits and signs of ASCII have rows in the output head, so what it writes is text
  that the tokenizer turns back into the same tokens (without spaces, which mlx-lm's detokenizer
  drops at the start), and a greedy answer never ends by itself; at a temperature one may;
- the blocks are large enough for each memory to change what is written.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_hiermem.anchors import openlm
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.config import AnchorShape, MemoryConfig
from mlx_hiermem.routing.embeddings import EmbeddingEncoder, embedding_table
from mlx_hiermem.routing.grow import grow
from mlx_hiermem.routing.tree import ClusterTree

END_OF_TEXT = "<|endoftext|>"

# The 256 letters that stand for bytes in a byte-level tokenizer, in the order of their ids.
# Printable ASCII stands for itself, but for the space.
_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
_WRITTEN = [i for i, letter in enumerate(_LETTERS) if " " < letter <= "~"]


def make_tiny_model(
    folder: str | Path,
    seed: int = 0,
    ranks: Sequence[int] = (4, 2),
    branching: int = 3,
    dtype: str = "float32",
) -> Path:
    """Write a model folder: OpenLM, 2 layers, d 16, context 256, one bank under ``memory/``.

    Args:
        folder: is made if need be.
        seed: of all numbers in it.
        ranks: the memory config; one level per rank.
        branching: k of the tree.
        dtype: of the blocks; the anchor is float32.

    Returns:
        ``folder``.
    """
    folder = Path(folder)
    memory = folder / "memory"
    memory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    anchor = write_tiny_anchor(folder, seed)
    rng = np.random.default_rng(seed)

    tokenizer = load_tokenizer(folder)
    table = embedding_table(anchor)
    weights = rng.uniform(0.5, 1.5, len(table)).astype(np.float32)
    component = np.ones((1, table.shape[1]), np.float32) / table.shape[1] ** 0.5
    encoder = EmbeddingEncoder(table, tokenizer, weights, component)
    encoder.save(memory)
    vectors = encoder.encode(random_texts(20 * branching ** len(ranks), seed))
    tree = grow(lambda: [vectors], branching, len(ranks), seed=seed, steps=5)
    ClusterTree(tree.centroids, encoder.to_config()).save(memory / "tree.safetensors")

    config = MemoryConfig(
        ranks=tuple(ranks),
        branching=branching,
        dtype=dtype,
        encoder=encoder.to_config(),
        base_anchor={"name": "tiny", "shape": asdict(AnchorShape.of(anchor))},
    )

    def numbers(*shape: int) -> np.ndarray:
        return 0.5 * rng.standard_normal(shape, dtype=np.float32)

    blocks = {
        level: numbers(config.clusters(level), config.block_size(level))
        for level in config.memory_levels
    }
    write_bank(memory, config, blocks, numbers(config.fetch_size()))
    return folder


def write_tiny_anchor(folder: Path, seed: int, name: str = "model.safetensors") -> openlm.Model:
    """Write random weights of the tiny anchor to ``folder``/``name``, and its config.json."""
    args = openlm.ModelArgs(
        hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2,
        head_dim=8, vocab_size=257, max_position_embeddings=256,
    )  # fmt: skip
    model = openlm.Model(args)
    rng = np.random.default_rng(seed)
    weights = {
        key: mx.array(rng.standard_normal(value.shape, dtype=np.float32) * value.shape[-1] ** -0.5)
        if value.ndim == 2
        else value
        for key, value in tree_flatten(model.parameters())
    }
    written = np.zeros((257, 1), np.float32)
    written[_WRITTEN] = 1
    weights["lm_head.weight"] *= mx.array(written)
    model.load_weights(list(weights.items()))
    mx.save_safetensors(str(folder / name), weights, {"format": "mlx"})
    config = {**asdict(args), "eos_token_id": 256}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Short texts of made-up words."""
    rng = random.Random(seed)
    return [
        " ".join(
            "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 8)))
            for _ in range(rng.randint(2, 6))
        )
        for _ in range(count)
    ]


def _write_tokenizer(folder: Path) -> None:
    """One token per byte; 256 is the end of the text."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(_LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
