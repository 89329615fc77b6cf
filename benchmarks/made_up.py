"""Made-up things to measure with: an anchor, packed sequences, documents, a sentence encoder.

Their sizes are those that a claim is about; their numbers are random, which takes as long.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_hiermem.anchors import openlm
from mlx_hiermem.backend import backend_name
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.corpus.packed import PackedCorpus
from mlx_hiermem.files import write_safetensors

#: Memory configs of one fetch size (336 rows a layer) on k = 16: the paper's for its 160M anchor,
#: and one whose deeper levels make the bank 104 times as large.
RANKS, RANKS_100X = (256, 64, 16, 0), (256, 64, 0, 8, 8)


@dataclass(frozen=True)
class Sizes:
    """What a step is measured on.

    Attributes:
        anchor: its sizes.
        ranks, ranks_100x: memory configs of one fetch size.
        branching: k.
        length: T.
        batch_size: sequences of a step.
        dtype: of the computation.
        rounds: of the comparison.
    """

    anchor: openlm.ModelArgs
    ranks: tuple[int, ...] = RANKS
    ranks_100x: tuple[int, ...] = RANKS_100X
    branching: int = 16
    length: int = 512
    batch_size: int = 4
    dtype: str = "float32"
    rounds: int = 7


def sizes(smoke: bool) -> Sizes:
    """The sizes for this machine: on a GPU longer sequences, more of them, and bfloat16.

    The anchor has the width of the paper's 160M and 8 of its 35 layers. Its vocabulary is cut down
    likewise: with all of it the head would be half of a step, and memories would look cheap.
    """
    if smoke:
        args = openlm.ModelArgs(32, 2, 64, 2, 16, vocab_size=64, tie_word_embeddings=True)
        return Sizes(args, (8, 4, 2, 0), (8, 4, 0, 1, 1), length=32, batch_size=2, rounds=2)
    args = openlm.ModelArgs(512, 8, 2048, 12, 32, vocab_size=8192, tie_word_embeddings=True)
    if backend_name() == "cpu":
        return Sizes(args)
    return Sizes(args, length=2048, batch_size=16, dtype="bfloat16", rounds=15)


def make_anchor(sizes: Sizes) -> openlm.Model:
    """An anchor with start values."""
    mx.random.seed(0)
    model = openlm.Model(sizes.anchor)
    openlm.init_weights(model)
    mx.eval(model.parameters())
    return model


def make_config(sizes: Sizes, ranks: tuple[int, ...]) -> MemoryConfig:
    """A memory config on k children."""
    return MemoryConfig(ranks=ranks, branching=sizes.branching)


def make_corpus(sizes: Sizes, levels: int, sequences: int = 4096) -> PackedCorpus:
    """Sequences of random tokens, each under a random leaf of ``levels`` levels.

    Leaves are uniform, so hardly two sequences of a batch share a row: no case costs more.
    """
    rng = np.random.default_rng(0)
    shape = (sequences, sizes.length)
    tokens = rng.integers(1, sizes.anchor.vocab_size, shape, np.int32)
    tokens[rng.random(shape) < 1 / 300] = 0  # documents of 300 tokens
    leaves = rng.integers(0, sizes.branching**levels, sequences)
    return PackedCorpus(tokens, leaves, end_of_text=0)


def flops_per_token(model: openlm.Model, length: int) -> int:
    """Floating-point operations of forward and backward for one token of a step.

    Three times the forward's: two for each weight of a matrix (the tied table counts once, as the
    head), and attention's two products over the tokens before, half of T on average.
    """
    weights = sum(value.size for _, value in tree_flatten(model.parameters()) if value.ndim == 2)
    args = model.args
    attention = 2 * 2 * args.num_hidden_layers * args.num_attention_heads * args.head_dim
    return 3 * (2 * weights + attention * length // 2)


# ---- documents and an encoder ----------------------------------------------------------


def make_documents(count: int, words: int, seed: int = 0) -> list[str]:
    """Texts of made-up words, of which a few are frequent; about ``words`` in each."""
    rng = random.Random(seed)
    known = sorted({_word(rng) for _ in range(20_000)})
    weights = [1 / rank for rank in range(1, len(known) + 1)]
    return [
        " ".join(rng.choices(known, weights, k=rng.randint(words // 2, 3 * words // 2)))
        for _ in range(count)
    ]


def _word(rng: random.Random) -> str:
    syllables = ("ba", "ce", "di", "fo", "gu", "han", "kel", "lim", "mor", "nur", "pas", "tre")
    return "".join(rng.choices(syllables, k=rng.randint(1, 4)))


def write_documents(path: Path, texts: list[str]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def write_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> None:
    """A byte-level BPE tokenizer, as anchors have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def write_bert(folder: Path, texts: list[str], layers: int, width: int) -> None:
    """A BERT with random weights and a WordPiece tokenizer: 6 layers of 384 are MiniLM's size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=30_522, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {name.strip("[]").lower() + "_token": name for name in special}
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(table), "utf-8")
    config = {
        "model_type": "bert", "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": width // 32, "intermediate_size": 4 * width,
        "max_position_embeddings": 512, "vocab_size": 30_522, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    write_safetensors(folder / "model.safetensors", _bert_weights(config))


def _bert_weights(config: dict) -> dict[str, np.ndarray]:
    """Random weights under the names that Hugging Face gives them."""
    rng = np.random.default_rng(0)
    d, inner = config["hidden_size"], config["intermediate_size"]
    weights: dict[str, np.ndarray] = {}

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = np.ones(d), np.zeros(d)

    def linear(name: str, out: int, into: int) -> None:
        weights[f"{name}.weight"] = rng.standard_normal((out, into)) * into**-0.5
        weights[f"{name}.bias"] = np.zeros(out)

    for name, rows in (
        ("word", config["vocab_size"]),
        ("position", config["max_position_embeddings"]),
        ("token_type", config["type_vocab_size"]),
    ):
        weights[f"embeddings.{name}_embeddings.weight"] = rng.standard_normal((rows, d))
    norm("embeddings.LayerNorm")
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{name}", d, d)
        linear(f"{layer}.attention.output.dense", d, d)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, d)
        linear(f"{layer}.output.dense", d, inner)
        norm(f"{layer}.output.LayerNorm")
    return {name: value.astype(np.float32) for name, value in weights.items()}
