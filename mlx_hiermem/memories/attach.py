"""Give an anchor a memory: ``attach(anchor, config) -> MemoryModel``.

How the fetched memory reaches the layers:
- In decoding it is the last entry of the prompt cache (an ``ArraysCache`` whose arrays have a
  leading batch axis), the one channel that all of mlx-lm's loops carry and merge per sequence. So a
  batch may hold as many memories as sequences, and an entry that holds nothing means memory off.
- In training and scoring it is the argument ``memory``.

The anchor's modules keep their place, names and weights: those that a memory acts on get a subclass
of their class. Saving, loading and quantising an anchor are therefore untouched by memories. What a
memory does there is its kind's business (``kinds/``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import cache as mlx_lm_cache

from .. import kinds
from ..config import AnchorShape, MemoryConfig
from ..errors import ConfigError, InputError
from ..kinds._kind import Forward, Matrices, NoPlace, replace_call, restore_call
from ..shapes import arguments_of
from .layout import JoinedLayout
from .start import start_block


class _CallMemory(threading.local):
    """The memory of the call that is being traced, per thread: a layer's matrices by position."""

    layers: Sequence[Matrices] | Mapping[int, Matrices] | None = None

    def lookup(self, position: int) -> Callable[[], Matrices | None]:
        return lambda: None if self.layers is None else self.layers[position]


class ArraysCache(mlx_lm_cache.ArraysCache):
    """mlx-lm's ``ArraysCache``, also where nothing is set: where memory is off.

    mlx-lm's cannot be extracted from then, as ``BatchGenerator`` does with each sequence that ends.
    And once a padded prefill has ended it forgets for how many sequences it stands, so that the
    next one that comes with a memory makes a batch of the wrong size. The name is kept because
    ``save_prompt_cache`` writes it down and ``load_prompt_cache`` looks it up in mlx-lm.
    """

    def finalize(self) -> None:
        size = self.batch_size
        super().finalize()
        if self.empty():
            self.left_padding = mx.zeros((size,), mx.int32)

    def extract(self, idx: int) -> ArraysCache:
        entry = ArraysCache(len(self.cache))
        entry.cache = [None if one is None else one[idx : idx + 1] for one in self.cache]
        return entry


class MemoryModel(nn.Module):
    """An anchor whose layers can use a fetched memory.

    Args of a call:
        inputs: tokens (B, T).
        cache: the anchor's prompt cache plus one entry that holds the memory, or None; see
            :meth:`make_cache`.
        input_embeddings: (B, T, d) in place of the embedded tokens.
        memory: joined memory (B or 1, N), N the fetch size, or its matrices as :meth:`matrices`
            gives them; overrides the cache's entry.
        mask: attention mask, handed on to anchors that take one (OpenLM).

    Returns:
        Logits (B, T, vocabulary). With no memory they are the anchor's, bit for bit.
    """

    def __init__(self, anchor: nn.Module, config: MemoryConfig):
        super().__init__()
        self.anchor = anchor
        self.config = config
        shape = AnchorShape.of(anchor)
        self._memory_layers = config.memory_layers(shape)
        self._layout = JoinedLayout(config, shape)
        self._call = _CallMemory()

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        memory: mx.array | Sequence[Matrices] | None = None,
        mask: mx.array | None = None,
    ) -> mx.array:
        options: dict[str, Any] = {}
        if input_embeddings is not None:
            options["input_embeddings"] = input_embeddings
        if mask is not None:
            options["mask"] = mask
        if cache is not None:
            *cache, entry = cache
            memory = self._layout.of_entry(entry.cache) if memory is None else memory
        if isinstance(memory, mx.array):
            memory = self.matrices(memory)
        if memory is not None and memory[0][0].shape[0] not in (1, inputs.shape[0]):
            raise InputError(
                f"a batch of {inputs.shape[0]} is given {memory[0][0].shape[0]} memories; give one "
                "for all, or one for each"
            )
        self._call.layers = memory
        try:
            return self.anchor(inputs, cache=cache, **options)
        finally:
            self._call.layers = None

    def join(self, blocks: Sequence[mx.array]) -> mx.array:
        """Join the levels' blocks, (B, s_l) each, to a memory (B, N)."""
        return self._layout.join(blocks)

    def matrices(self, memory: mx.array) -> list[Matrices]:
        """A joined memory (B, N) layer by layer, in the arrays that its kind takes.

        What is differentiated should be given so: the gradient of a slice is an array of the size
        of the whole, once for each slice.
        """
        return self._layout.matrices(memory)

    def split(self, matrices: Sequence[Matrices]) -> list[mx.array]:
        """Matrices, or their gradients, as blocks (B, s_l), one array per level with memory."""
        return self._layout.split(matrices)

    def init_block(self, level: int, cluster: int, seed: int = 0) -> np.ndarray:
        """Start values of a block, (s_l,) float32; see ``start_block``."""
        return start_block(self.config, level, cluster, seed, self.anchor)

    @property
    def memory_positions(self) -> dict[int, int]:
        """Which part of a joined memory each layer with memory uses."""
        return {layer: position for position, layer in enumerate(self._memory_layers)}

    @property
    def layers(self) -> list[nn.Module]:
        return self.anchor.layers

    @property
    def args(self) -> Any:
        return arguments_of(self.anchor)

    @property
    def model_type(self) -> str:
        return self.anchor.model_type

    def make_cache(self, memory: mx.array | None = None) -> list[Any]:
        """An empty prompt cache: the anchor's, and an entry that holds a memory, if there is one.

        Args:
            memory: joined memory (1, N).
        """
        if hasattr(self.anchor, "make_cache"):
            entries = self.anchor.make_cache()
        else:
            entries = [mlx_lm_cache.KVCache() for _ in self.layers]
        return [*entries, self.memory_entry(memory)]

    def memory_entry(self, memory: mx.array | None) -> ArraysCache:
        """The last entry of a prompt cache: it holds a memory (1, N), or, for None, nothing.

        The matrices are cut out of the memory here, once, and not at each token. They are views.
        """
        entry = ArraysCache(self._layout.arrays)
        if memory is not None:
            entry.cache = [one for layer in self.matrices(memory) for one in layer]
        return entry


def attach(anchor: nn.Module, config: MemoryConfig) -> MemoryModel:
    """Give ``anchor`` memories as ``config`` describes; modules of the anchor change class.

    Raises:
        ConfigError: the anchor is not built as the memory's kind needs it, has a memory already, or
            has another shape than the bank was trained for.
    """
    shape = AnchorShape.of(anchor)
    if config.base_anchor is not None and (trained := config.anchor_shape()) != shape:
        raise ConfigError(
            f"memory config: the bank was trained for an anchor of {trained}, this one is {shape}; "
            "use the anchor that the bank belongs to"
        )
    layers = getattr(anchor, "layers", None)
    if not layers or len(layers) != shape.num_hidden_layers:
        raise ConfigError(
            f"the anchor ({type(anchor).__module__}) has {len(layers or ())} layers, its config "
            f"says {shape.num_hidden_layers}; memories need one block for each"
        )
    if any(hasattr(type(module), "anchor_class") for module in anchor.modules()):
        raise ConfigError("the anchor has a memory already; load it afresh")
    model = MemoryModel(anchor, config)
    kind = kinds.find(config.kind)
    changes: list[tuple[nn.Module, Forward]] = []  # all are found before the first is made
    for position, index in enumerate(config.memory_layers(shape)):
        try:
            changes += kind.forwards(layers[index], shape, model._call.lookup(position))
        except NoPlace as reason:
            raise ConfigError(
                f"layer {index} of the anchor ({type(anchor).__module__}) {reason}; "
                f"{config.kind} memories cannot be attached there: choose another kind, or layers"
            ) from None
    for module, forward in changes:
        replace_call(module, forward)
    return model


def detach(model: MemoryModel) -> nn.Module:
    """Take the memories off again and return the bare anchor."""
    for module in model.anchor.modules():
        restore_call(module)
    return model.anchor
