"""Running prompts through the original in torch and the result in MLX, and comparing the logits.

The reference (``convert/reference``) computes from the tensors of the source; of the blocks it gets
the matrices that the source has, and knows nothing of banks, shards or slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_hiermem.anchors import compute_dtype, load_anchor
from mlx_hiermem.backend import backend_name
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.memories import attach

from .bank.rows import BlockRows

#: What is run where there is a tokenizer whose tokens the anchor has.
PROMPTS = (
    "The atomic number of gold is",
    "Water is made of hydrogen and oxygen. It freezes at zero degrees Celsius, and boils at",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "In 1969 the first people walked on the moon. Their names were",
)
#: Tokens of each prompt at most, and of each one where there is no such tokenizer.
MOST_TOKENS, WITHOUT_TOKENIZER = 64, 24
#: Paths that are fetched, evenly spaced over the leaves.
PATHS = 4
#: In float32 without quantisation, the largest difference over the largest logit that rounding
#: explains.
TOLERANCE = 1e-3

#: One layer's matrices of a memory, (R, w) float32 each, the rows of level 1 first.
Joined = dict[int, list[np.ndarray]]


class Reference(Protocol):
    """A torch model that can have a memory."""

    def logits(self, tokens: np.ndarray, memory: Joined | None) -> np.ndarray:
        """(T,) tokens -> (T, V) float32."""


@dataclass(frozen=True)
class Difference:
    """How far MLX is from torch with one memory, over all prompts.

    Attributes:
        memory: "none", "generic", or "path i,j,...".
        largest, mean: of the absolute differences of logits.
        scale: the largest absolute logit of the original.
        same: share of positions whose most likely token is the same.
        positions: tokens that were compared.
    """

    memory: str
    largest: float
    mean: float
    scale: float
    same: float
    positions: int


@dataclass(frozen=True)
class Verification:
    """The differences, and what they were computed in.

    ``exact``: float32 on both sides and nothing quantised, so that only rounding explains them.
    """

    differences: Sequence[Difference]
    backend: str
    dtype: str
    exact: bool

    @property
    def agrees(self) -> bool | None:
        """Whether rounding explains all differences; None where it cannot be told."""
        if not self.exact:
            return None
        return all(one.largest <= TOLERANCE * max(one.scale, 1) for one in self.differences)

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON."""
        return {**asdict(self), "agrees": self.agrees}


def verify(
    folder: Path,
    reference: Reference,
    rows: BlockRows | None,
    prompts: Sequence[np.ndarray],
    *,
    exact: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare a converted model with its original.

    Args:
        folder: the model folder that was written.
        reference: the original.
        rows: the blocks of the source; None: the model has no bank.
        prompts: tokens (T,) each.
        exact: nothing was quantised or rounded to another dtype.
        progress: called with (runs in all, runs done since the call before).

    Raises:
        FormatError, ConfigError: the model cannot be loaded.
    """
    anchor, _ = load_anchor(folder)
    bank = None if rows is None else MemoryBank.open(folder / "memory", tiers="disk")
    model = anchor if bank is None else attach(anchor, bank.config)
    dtype = compute_dtype(anchor)
    memories: list[tuple[str, Joined | None, mx.array | None]] = [("none", None, None)]
    if bank is not None and rows is not None:
        memories.append(("generic", joined(rows, None), bank.generic().joined))
        for path in paths(bank.config):
            name = "path " + ",".join(map(str, path))
            memories.append((name, joined(rows, path), bank.fetch(path).joined))
    differences = []
    for name, theirs, ours in memories:
        memory = None if ours is None else ours[None].astype(dtype)
        pairs = []
        for tokens in prompts:
            inputs = mx.array(tokens)[None]
            # A bare anchor takes no memory.
            found = model(inputs) if memory is None else model(inputs, memory=memory)
            pairs.append((np.array(found[0].astype(mx.float32)), reference.logits(tokens, theirs)))
            if progress is not None:
                progress(len(memories) * len(prompts), 1)
        differences.append(_difference(name, pairs))
    if bank is not None:
        bank.close()
    return Verification(
        differences, backend_name(), str(dtype).split(".")[-1], exact and dtype == mx.float32
    )


def _difference(name: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Difference:
    ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
    far = np.abs(ours - theirs)
    same = ours.argmax(-1) == theirs.argmax(-1)
    return Difference(
        name,
        float(far.max()),
        float(far.mean()),
        float(np.abs(theirs).max()),
        float(same.mean()),
        len(same),
    )


def paths(config: MemoryConfig) -> list[tuple[int, ...]]:
    """Cluster paths of leaves that are evenly spaced, the first and the last among them."""
    k, depth = config.branching, config.levels
    leaves = k**depth
    chosen = sorted({round(i * (leaves - 1) / (PATHS - 1)) for i in range(PATHS)})
    return [tuple(leaf // k ** (depth - level) for level in range(1, depth + 1)) for leaf in chosen]


def joined(rows: BlockRows, path: Sequence[int] | None) -> Joined:
    """The matrices of a path (None: of the generic memory) as the source has them."""
    config = rows.plan.config
    blocks = [
        rows.matrices(level, None if path is None else path[level - 1])
        for level in config.memory_levels
    ]
    return {
        layer: [
            np.concatenate(same)
            for same in zip(*(block[position] for block in blocks), strict=True)
        ]
        for position, layer in enumerate(config.memory_layers())
    }


def prompt_tokens(tokenizer: Any | None, vocabulary: int) -> list[np.ndarray]:
    """Tokens of the prompts that lie in the vocabulary.

    Where none do, as without a tokenizer: random ones, always the same.
    """
    if tokenizer is not None:
        encoded = [np.array(tokenizer.encode(text)[:MOST_TOKENS]) for text in PROMPTS]
        if found := [tokens for tokens in encoded if tokens.size and tokens.max() < vocabulary]:
            return found
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, WITHOUT_TOKENIZER) for _ in PROMPTS]
