"""A BERT sentence encoder in MLX, for all-MiniLM-L6-v2 and its like: the paper's encoder.

Post-LN transformer (Devlin et al. 2019), mean pooling over the attention mask, L2
normalisation (Reimers and Gurevych 2019). float32 throughout: it is small, and a route should
not depend on the rounding of a half-precision format.

Notable: foreign parameter names are mapped in ``sanitize`` alone; texts are batched by length,
so that little of a batch is padding; only safetensors are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..arrays import load_arrays
from ..errors import ConfigError, FormatError, one_line
from .encoder import Encoder, check_texts

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class BertArgs:
    """The fields of a Hugging Face ``config.json`` that the forward pass depends on."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BertArgs:
        """Pick the fields; refuse what this architecture is not.

        Raises:
            ConfigError: a field is missing, or the model is not a plain BERT.
        """
        for key, expected in (
            ("model_type", "bert"),
            ("hidden_act", "gelu"),
            ("position_embedding_type", "absolute"),
        ):
            if config.get(key, expected) != expected:
                raise ConfigError(f"{key} is {config[key]!r}; this encoder reads {expected!r}")
        known = {f.name: f.type for f in fields(cls)}
        values = {key: config[key] for key in known if key in config}
        for key, value in values.items():
            number = (int,) if known[key] == "int" else (int, float)
            if isinstance(value, bool) or not isinstance(value, number) or value <= 0:
                raise ConfigError(f"{key} is {value!r}; expected a positive number")
        try:
            args = cls(**values)
        except TypeError as error:
            raise ConfigError(f"a field is missing ({error})") from None
        if args.hidden_size % args.num_attention_heads:
            raise ConfigError(
                f"hidden_size {args.hidden_size} is not a multiple of num_attention_heads "
                f"{args.num_attention_heads}"
            )
        return args


class Embeddings(nn.Module):
    """Word, position and type embeddings, added and normalised."""

    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        self.words = nn.Embedding(args.vocab_size, args.hidden_size)
        self.positions = nn.Embedding(args.max_position_embeddings, args.hidden_size)
        self.types = nn.Embedding(args.type_vocab_size, args.hidden_size)
        self.norm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)

    def __call__(self, ids: mx.array) -> mx.array:
        # One sentence, so each token is of type 0.
        positions = self.positions.weight[: ids.shape[1]]
        return self.norm(self.words(ids) + positions + self.types.weight[0])


class Layer(nn.Module):
    """Self-attention and feed-forward, each added and then normalised (post-LN)."""

    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        d, eps = args.hidden_size, args.layer_norm_eps
        self.heads = args.num_attention_heads
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.out = nn.Linear(d, d)
        self.attention_norm = nn.LayerNorm(d, eps=eps)
        self.up = nn.Linear(d, args.intermediate_size)
        self.down = nn.Linear(args.intermediate_size, d)
        self.norm = nn.LayerNorm(d, eps=eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        B, T, d = x.shape

        def split(y: mx.array) -> mx.array:  # (B, T, d) -> (B, heads, T, d / heads)
            return y.reshape(B, T, self.heads, -1).transpose(0, 2, 1, 3)

        y = mx.fast.scaled_dot_product_attention(
            split(self.query(x)),
            split(self.key(x)),
            split(self.value(x)),
            scale=(d // self.heads) ** -0.5,
            mask=mask,
        )
        y = y.transpose(0, 2, 1, 3).reshape(B, T, d)
        x = self.attention_norm(x + self.out(y))
        return self.norm(x + self.down(nn.gelu(self.up(x))))


class Bert(nn.Module):
    """BERT without a head: ids (B, T) and mask (B, T) bool -> states (B, T, d)."""

    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        self.embeddings = Embeddings(args)
        self.layers = [Layer(args) for _ in range(args.num_hidden_layers)]

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        return x

    @staticmethod
    def sanitize(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face names to ours; the pooler, position ids and heads are dropped."""
        ours = {}
        for name, weight in weights.items():
            name = name.removeprefix("bert.")
            if not name.startswith(("embeddings.", "encoder.")) or "position_ids" in name:
                continue
            for theirs, mine in _NAMES:
                name = name.replace(theirs, mine)
            ours[name] = weight.astype(mx.float32)
        return ours


#: In this order: the long names hold the short ones.
_NAMES = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    ("embeddings.word_embeddings", "embeddings.words"),
    ("embeddings.position_embeddings", "embeddings.positions"),
    ("embeddings.token_type_embeddings", "embeddings.types"),
    ("embeddings.LayerNorm", "embeddings.norm"),
    ("encoder.layer.", "layers."),
    ("attention.self.", ""),
    ("attention.output.dense", "out"),
    ("attention.output.LayerNorm", "attention_norm"),
    ("intermediate.dense", "up"),
    ("output.dense", "down"),
    ("output.LayerNorm", "norm"),
)


class BertEncoder(Encoder):
    """Texts to the normalised mean of their BERT states.

    Args:
        model: the network.
        tokenizer: a Hugging Face tokenizer; adds the special tokens ([CLS], [SEP]).
        max_length: tokens after which a text is cut, special tokens included.
        config: what :meth:`to_config` returns.
    """

    def __init__(
        self, model: Bert, tokenizer: Any, max_length: int, config: Mapping[str, Any]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._config = dict(config)

    @property
    def width(self) -> int:
        """The network's hidden size (384 for all-MiniLM-L6-v2)."""
        return self.model.embeddings.words.weight.shape[1]

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """(n, c) float32, unit length; a text longer than ``max_length`` tokens is cut.

        Raises:
            InputError: ``texts`` is not a list of strings.
        """
        texts = check_texts(texts)
        vectors = np.empty((len(texts), self.width), np.float32)
        if not texts:
            return vectors
        ids = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, add_special_tokens=True
        )["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            vectors[rows] = self._encode_ids([ids[row] for row in rows])
        return vectors

    def _encode_ids(self, batch: Sequence[Sequence[int]]) -> np.ndarray:
        # At least one position, so that a tokenizer without special tokens may give nothing.
        longest = max(1, *map(len, batch))
        ids = np.zeros((len(batch), longest), np.int32)
        mask = np.zeros((len(batch), longest), bool)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens
            mask[row, : max(1, len(tokens))] = True
        real = mx.array(mask)
        states = self.model(mx.array(ids), real)  # (B, T, d)
        # The division by the number of tokens would be undone by the normalisation.
        total = (states * real[..., None]).sum(axis=1)  # (B, d)
        length = mx.linalg.norm(total, axis=-1, keepdims=True)
        return np.array(total / mx.maximum(length, 1e-12))

    @classmethod
    def load(
        cls,
        *,
        folder: str | Path,
        model: str = DEFAULT_MODEL,
        revision: str | None = None,
        max_length: int = 256,
    ) -> BertEncoder:
        """Load from a folder or from the Hub.

        Args:
            folder: where a relative ``model`` is looked for first (the memory folder).
            model: a folder in the Hugging Face layout (``config.json``, ``model.safetensors``,
                tokenizer), or the name of a Hub repo.
            revision: branch, tag or commit of a Hub repo.

        Raises:
            ConfigError: the model cannot be found, or is not a plain BERT.
            FormatError: its weights or its tokenizer are missing or damaged.
        """
        source = _find(model, revision, Path(folder))
        args = _read_args(source / "config.json")
        if not 2 < max_length <= args.max_position_embeddings:
            raise ConfigError(
                f"encoder: max_length is {max_length}; {model} takes 3 to "
                f"{args.max_position_embeddings} tokens"
            )
        network = Bert(args)
        _load_weights(network, source / "model.safetensors")
        tokenizer = _load_tokenizer(source)
        if len(tokenizer) > args.vocab_size:
            raise FormatError(
                f"{source}: the tokenizer has {len(tokenizer)} tokens but config.json has "
                f"vocab_size {args.vocab_size}; get the tokenizer of this model"
            )
        config = {"type": "bert", "model": model, "max_length": max_length}
        if revision is not None:
            config["revision"] = revision
        return cls(network, tokenizer, max_length, config)

    def to_config(self) -> dict[str, Any]:
        """``{"type": "bert", "model": ..., "max_length": ...}``, and ``revision`` if given."""
        return dict(self._config)


def _find(model: str, revision: str | None, folder: Path) -> Path:
    """The folder that holds ``model``: under ``folder``, as a path, or fetched from the Hub."""
    for path in (folder / model, Path(model).expanduser()):
        if path.is_dir():
            return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise ConfigError(
            f"encoder: model {model!r} is neither a folder nor the name of a Hub repo (owner/name)"
        )
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "model.safetensors", "tokenizer*", "vocab.txt", "special_tokens*"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the Hub client raises many kinds: network, missing, gated, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(reason) > 120:
            reason = f"{reason[:119]}…"
        raise ConfigError(
            f"encoder: {model} cannot be fetched from the Hub ({reason}); check the network, or "
            "give a folder that holds the model; `cluster --encoder embeddings` needs neither"
        ) from None


def _read_args(path: Path) -> BertArgs:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ConfigError(f"expected a JSON object, found {type(config).__name__}")
        return BertArgs.from_dict(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None


def _load_weights(network: Bert, path: Path) -> None:
    """Fill ``network`` from a safetensors file, each tensor of it and no other."""
    if not path.is_file():
        raise FormatError(f"{path}: no such file; the encoder's weights must be safetensors")
    try:
        weights = Bert.sanitize(load_arrays(path))
    except (RuntimeError, ValueError) as error:
        reason = one_line(error, 120)
        raise FormatError(f"{path}: not a readable safetensors file ({reason})") from None
    expected = dict(tree_flatten(network.parameters()))
    missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}"
        raise FormatError(f"{path}: {what}, which does not fit its config.json")
    for name, parameter in expected.items():
        if weights[name].shape != parameter.shape:
            raise FormatError(
                f"{path}: tensor for {name} has shape {weights[name].shape}; its config.json "
                f"expects {parameter.shape}"
            )
    network.load_weights(list(weights.items()))
    # Read now: the arrays are lazy, and may only be evaluated by the thread that made them.
    mx.eval(network.parameters())
    network.freeze()


def _load_tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    # Without either, transformers makes a tokenizer that knows no word, and says nothing.
    if not any((source / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise FormatError(
            f"{source}: its tokenizer is missing; expected tokenizer.json or vocab.txt"
        )
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a bad or missing file
        reason = one_line(error, 120)
        raise FormatError(f"{source}: its tokenizer cannot be read ({reason})") from None
