"""An encoder made of the anchor's own token embeddings: no second network.

A text's vector is the weighted sum of its tokens' unit vectors, with one weight per token,
less the common components of the corpus, normalised: SIF, "A simple but tough-to-beat baseline
for sentence embeddings" (Arora, Liang, Ma 2017). Rare tokens, which name things, weigh much;
common ones, which carry the wording, weigh little, so wordings of one fact lie close together.

Notable: only the weights and the components are stored (``encoder.safetensors``); the embedding
table is read from the anchor. So the encoder, and with it the tree, belongs to one
state of the anchor: train the anchor's embeddings further and routes change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, InputError
from .encoder import Encoder, check_texts
from .files import read_tensors, write_tensors

FILE = "encoder.safetensors"


class EmbeddingEncoder(Encoder):
    """Weighted token embeddings without their common components.

    Args:
        embeddings: (V, d) float32, the anchor's token embeddings.
        tokenizer: the anchor's tokenizer: anything with
            ``encode(text, add_special_tokens=False) -> list of ids``.
        weights: (V,) float32, >= 0, one per token.
        components: (m, d) float32, orthonormal rows; their span is taken out. m may be 0.
        lowercase: lower the text before it is tokenised.
        file: the name under which ``save`` writes weights and components.

    A text of which nothing is left (it is empty, all its tokens weigh 0, or it lies in the span of
    the components) gets the fixed unit vector (1, 0, ..., 0): it has to go somewhere, and always
    to the same place.

    Raises:
        FormatError: shapes do not fit together.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        tokenizer: Any,
        weights: np.ndarray,
        components: np.ndarray,
        lowercase: bool = True,
        file: str = FILE,
    ) -> None:
        tokens, width = embeddings.shape
        for name, array, shape in (
            ("weights", weights, (tokens,)),
            ("components", components, (len(components), width)),
        ):
            if array.shape != shape:
                raise FormatError(
                    f"encoder: tensor {name} has shape {array.shape}; expected {shape} for an "
                    f"anchor with {tokens} tokens and embeddings {width} wide"
                )
        if weights.min() < 0:
            raise FormatError(
                f"encoder: tensor weights holds {weights.min()}; expected values >= 0"
            )
        self.tokenizer = tokenizer
        self.weights = np.asarray(weights, np.float32)
        self.components = np.asarray(components, np.float32)
        self.lowercase = lowercase
        self.file = file
        # Each token's unit vector times its weight, so that encoding is a sum of rows.
        self._table = _unit_rows(embeddings) * self.weights[:, None]  # (V, d)

    @property
    def width(self) -> int:
        """d, the width of the anchor's embeddings."""
        return self._table.shape[1]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32, unit length. A text's vector does not depend on its batch.

        Raises:
            InputError: ``texts`` is not a list of strings.
            ConfigError: the tokenizer has ids beyond the anchor's embeddings.
        """
        texts = check_texts(texts)
        vectors = np.empty((len(texts), self.width), np.float32)
        for row, text in enumerate(texts):
            ids = _token_ids(self.tokenizer, text, self.lowercase, len(self._table))
            vectors[row] = self._vector(ids)
        return vectors

    def _vector(self, ids: np.ndarray) -> np.ndarray:
        total = self._table[ids].sum(axis=0, dtype=np.float64)
        rest = total - (self.components @ total) @ self.components
        length = float(np.linalg.norm(rest))
        # Next to nothing left means that what is left is rounding, whose direction is noise.
        if length <= 1e-5 * np.linalg.norm(total):
            rest = np.zeros_like(rest)
            rest[0] = length = 1.0
        return rest / length

    @classmethod
    def fit(
        cls,
        embeddings: np.ndarray,
        tokenizer: Any,
        texts: Iterable[str],
        *,
        a: float = 1e-3,
        components: int = 1,
        lowercase: bool = True,
        extra_counts: Mapping[str, float] | None = None,
        sample: int = 20_000,
        seed: int = 0,
    ) -> EmbeddingEncoder:
        """Find weights and common components from a corpus (section 3 of Arora et al. 2017).

        A token weighs a / (a + p) with p its share of all tokens of the corpus. A token that the
        corpus never has weighs 0, not the 1 that the formula would give it: an anchor trained on
        this corpus never moved its vector away from the random start, so it would add noise,
        and at full weight.

        Args:
            texts: the corpus, read once.
            a: share of the tokens at which a token weighs one half.
            components: how many common components to take out; 0 for none.
            extra_counts: frequencies of ordinary words (word -> share of ordinary text). p is
                then the mean of both shares, so that a word common in the language weighs
                little even where a small or uniform corpus hardly has it.
            sample: texts that the components are computed from, drawn evenly from the corpus.
            seed: of that draw.

        Raises:
            InputError: no text, an entry that is not a string, or a value out of range.
        """
        tokens, width = embeddings.shape
        if not a > 0 or not 0 <= components < width or sample < 1:
            raise InputError(
                f"fit an encoder: a is {a}, components {components}, sample {sample}; expected "
                f"a > 0, components from 0 to {width - 1} and sample >= 1"
            )
        rng = np.random.default_rng(seed)
        counts = np.zeros(tokens)
        drawn: list[np.ndarray] = []
        for position, text in enumerate(texts):
            check_texts([text])
            ids = _token_ids(tokenizer, text, lowercase, tokens)
            np.add.at(counts, ids, 1)
            # Reservoir sampling: each text so far is in the sample with the same chance.
            if len(drawn) < sample:
                drawn.append(ids)
            elif (slot := rng.integers(position + 1)) < sample:
                drawn[slot] = ids
        if not counts.any():
            raise InputError("fit an encoder: the texts hold no token; give a corpus")
        share = counts / counts.sum()
        if extra_counts:
            share = (share + _ordinary_shares(tokenizer, extra_counts, lowercase, tokens)) / 2
        weights = np.where(counts > 0, a / (a + share), 0).astype(np.float32)

        plain = cls(embeddings, tokenizer, weights, np.empty((0, width), np.float32), lowercase)
        if components:
            vectors = np.stack([plain._vector(ids) for ids in drawn])
            plain.components = _common_components(vectors, components)
        return plain

    def save(self, folder: str | Path) -> None:
        """Write weights and components to ``folder``/``file``, whole or not at all."""
        write_tensors(
            Path(folder) / self.file, {"weights": self.weights, "components": self.components}
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        embeddings: np.ndarray,
        tokenizer: Any,
        lowercase: bool = True,
        file: str = FILE,
    ) -> EmbeddingEncoder:
        """Read what :meth:`save` wrote.

        Raises:
            FormatError: the file is missing, damaged, or of another anchor.
        """
        if Path(file).name != file:
            raise ConfigError(f"encoder: file is {file!r}; expected a name without a folder")
        path = Path(folder) / file
        tensors, _ = read_tensors(path)
        if set(tensors) != {"weights", "components"}:
            raise FormatError(
                f"{path}: tensors are {', '.join(sorted(tensors)) or 'none'}; expected "
                "components, weights"
            )
        try:
            return cls(embeddings, tokenizer, lowercase=lowercase, file=file, **tensors)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None

    def to_config(self) -> dict[str, Any]:
        """``{"type": "embeddings", "lowercase": ..., "file": ...}``"""
        return {"type": "embeddings", "lowercase": self.lowercase, "file": self.file}


def embedding_table(anchor: Any) -> np.ndarray:
    """The token embeddings (V, d) float32 of an MLX model, dequantised where need be.

    Taken is the embedding with the most rows: tables of positions or types are shorter.

    Raises:
        ConfigError: the model has no embedding.
    """
    import mlx.core as mx
    import mlx.nn as nn

    tables = [
        module
        for _, module in anchor.named_modules()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
    ]
    if not tables:
        raise ConfigError(
            "encoder: type embeddings needs an anchor with a token embedding; this one has none"
        )
    table = max(tables, key=lambda module: module.weight.shape[0])
    rows = table(mx.arange(table.weight.shape[0]))
    return np.array(rows.astype(mx.float32))


def _token_ids(tokenizer: Any, text: str, lowercase: bool, tokens: int) -> np.ndarray:
    if lowercase:
        text = text.lower()
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int64)
    if len(ids) and ids.max() >= tokens:
        raise ConfigError(
            f"encoder: the tokenizer gives id {ids.max()}, but the anchor has {tokens} token "
            "embeddings; use the tokenizer of this anchor"
        )
    return ids


def _ordinary_shares(
    tokenizer: Any, words: Mapping[str, float], lowercase: bool, tokens: int
) -> np.ndarray:
    """Share of each token (V,) in ordinary text, from the frequencies of its words."""
    shares = np.zeros(tokens)
    for word, frequency in words.items():
        # Tokenizers tell a word at the start of a text from one after a space.
        for form in (word, " " + word):
            np.add.at(shares, _token_ids(tokenizer, form, lowercase, tokens), frequency / 2)
    total = shares.sum()
    return shares / total if total else shares


def _common_components(vectors: np.ndarray, count: int) -> np.ndarray:
    """The first right singular vectors (count, d) of the unit vectors (n, d), not centred."""
    # Of the d x d Gram matrix: n may be large, d is not. eigh sorts ascending.
    vectors = vectors.astype(np.float64)
    _, directions = np.linalg.eigh(vectors.T @ vectors)
    return np.ascontiguousarray(directions[:, ::-1][:, :count].T, np.float32)


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length; a zero row (padding) stays zero."""
    rows = np.asarray(rows, np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
