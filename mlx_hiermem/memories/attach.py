"""Give an anchor a memory: ``attach(anchor, config) -> MemoryModel``.

How the fetched memory reaches the layers:
- In decoding it is the last entry of the prompt cache (an ``ArraysCache`` of one array with a
  leading batch axis), the one channel that all of mlx-lm's loops carry and merge per sequence. So a
  batch may hold as many memories as sequences, and ``cache[-1][0] is None`` means memory off.
- In training and scoring it is the argument ``memory``.

The FFN modules keep their place, names and weights: only their class becomes a subclass that adds
the memory's branch. Saving, loading and quantising an anchor are therefore untouched by memories.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import cache as mlx_lm_cache

from ..config import AnchorShape, MemoryConfig
from ..errors import ConfigError
from . import ffn
from .start import start_block


class _CallMemory(threading.local):
    """The memory of the call that is being traced, per thread: a layer's matrices by position."""

    layers: Sequence[Any] | Mapping[int, Any] | None = None


class ArraysCache(mlx_lm_cache.ArraysCache):
    """mlx-lm's ``ArraysCache``, whose ``extract`` fails where nothing is set: where memory is off.

    ``BatchGenerator`` extracts each sequence that ends. The name is kept because
    ``save_prompt_cache`` writes it down and ``load_prompt_cache`` looks it up in mlx-lm.
    """

    def extract(self, idx: int) -> ArraysCache:
        entry = ArraysCache(len(self.cache))
        entry.cache = [None if one is None else one[idx : idx + 1] for one in self.cache]
        return entry


class MemoryModel(nn.Module):
    """An anchor whose FFN layers are widened by a fetched memory.

    Args of a call:
        inputs: tokens (B, T).
        cache: the anchor's prompt cache plus one entry that holds the memory, or None.
        input_embeddings: (B, T, d) in place of the embedded tokens.
        memory: joined memory (B or 1, L, 3, R, d), or its matrices as :meth:`matrices` gives them;
            overrides the cache's entry.
        mask: attention mask, handed on to anchors that take one (OpenLM).

    Returns:
        Logits (B, T, vocabulary). With no memory they are the anchor's, bit for bit.
    """

    def __init__(self, anchor: nn.Module, config: MemoryConfig):
        super().__init__()
        self.anchor = anchor
        self.config = config
        shape = AnchorShape.of(anchor)
        self._width = shape.hidden_size
        self._memory_layers = config.memory_layers(shape)
        self._memory_levels = config.memory_levels
        self._call = _CallMemory()

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        memory: mx.array | ffn.Matrices | None = None,
        mask: mx.array | None = None,
    ) -> mx.array:
        options: dict[str, Any] = {}
        if input_embeddings is not None:
            options["input_embeddings"] = input_embeddings
        if mask is not None:
            options["mask"] = mask
        if cache is not None:
            *cache, entry = cache
            memory = entry[0] if memory is None else memory
        self._call.layers = self.matrices(memory) if isinstance(memory, mx.array) else memory
        try:
            return self.anchor(inputs, cache, **options)
        finally:
            self._call.layers = None

    def join(self, blocks: Sequence[mx.array]) -> mx.array:
        """Join the levels' blocks, (..., s_l) each, to a memory (..., L, 3, R, d)."""
        return ffn.join(blocks, len(self._memory_layers), self._width)

    def shaped(self, joined: mx.array) -> mx.array:
        """A fetched memory (fetch_size,) as one for a call or a prompt cache, (1, L, 3, R, d)."""
        return ffn.shaped(joined[None], len(self._memory_layers), self._width)

    def matrices(self, memory: mx.array) -> ffn.Matrices:
        """A joined memory matrix by matrix.

        What is differentiated should be given so: the gradient of a slice is an array of the size
        of the whole, once for each slice.
        """
        return ffn.matrices(memory)

    def split(self, matrices: ffn.Matrices) -> list[mx.array]:
        """Matrices, or their gradients, as blocks (B, s_l), one array per level with memory."""
        ranks = [self.config.ranks[level - 1] for level in self._memory_levels]
        return ffn.split(matrices, ranks)

    def init_block(self, level: int, cluster: int, seed: int = 0) -> np.ndarray:
        """Start values of a block, (s_l,) float32; see ``start_block``."""
        return start_block(self.config, level, cluster, seed, self.anchor)

    @property
    def memory_positions(self) -> dict[int, int]:
        """Which of the L parts of a joined memory each layer with memory uses."""
        return {layer: position for position, layer in enumerate(self._memory_layers)}

    @property
    def layers(self) -> list[nn.Module]:
        return self.anchor.layers

    @property
    def args(self) -> Any:
        return self.anchor.args

    @property
    def model_type(self) -> str:
        return self.anchor.model_type

    def make_cache(self) -> list[Any]:
        """An empty prompt cache: the anchor's, and an entry for the memory (none yet)."""
        if hasattr(self.anchor, "make_cache"):
            entries = self.anchor.make_cache()
        else:
            entries = [mlx_lm_cache.KVCache() for _ in self.layers]
        return [*entries, ArraysCache(1)]


def attach(anchor: nn.Module, config: MemoryConfig) -> MemoryModel:
    """Give ``anchor`` memories as ``config`` describes; the anchor's FFN modules change class.

    Raises:
        ConfigError: the anchor has no SwiGLU FFN where the config wants a memory, has a memory
            already, or has another shape than the bank was trained for.
    """
    shape = AnchorShape.of(anchor)
    if config.base_anchor is not None and (trained := config.anchor_shape()) != shape:
        raise ConfigError(
            f"memory config: the bank was trained for an anchor of {trained}, this one is {shape}; "
            "use the anchor that the bank belongs to"
        )
    model = MemoryModel(anchor, config)
    widened = []  # all are checked before the first is changed
    for index in config.memory_layers(shape):
        mlp = getattr(anchor.layers[index], "mlp", None)
        if mlp is None or any(not hasattr(mlp, p) for p in ("gate_proj", "up_proj", "down_proj")):
            raise ConfigError(
                f"layer {index} of the anchor ({type(anchor).__module__}) has no mlp with "
                "gate_proj, up_proj and down_proj; FFN memories need a SwiGLU FFN"
            )
        if hasattr(type(mlp), "anchor_class"):
            raise ConfigError(f"layer {index} of the anchor has a memory already; load it afresh")
        widened.append(mlp)
    for position, mlp in enumerate(widened):
        mlp.__class__ = _widened(type(mlp), model._call, position)
    return model


def detach(model: MemoryModel) -> nn.Module:
    """Take the memories off again and return the bare anchor."""
    for layer in model.layers:
        if anchor_class := getattr(type(layer.mlp), "anchor_class", None):
            layer.mlp.__class__ = anchor_class
    return model.anchor


def _widened(base: type[nn.Module], call: _CallMemory, position: int) -> type[nn.Module]:
    """A subclass of the anchor's FFN class that adds the branch of memory layer ``position``."""

    class WidenedFFN(base):
        anchor_class = base

        def __call__(self, x: mx.array) -> mx.array:
            out = super().__call__(x)
            if call.layers is None:
                return out
            return out + ffn.branch(x, call.layers[position])

    return WidenedFFN
