"""Gradient checkpointing: layers compute their activations again in the backward pass.

mlx-lm's own ``grad_checkpoint`` knows nothing of memories: what reaches a layer other than through
its arguments would be a constant to it, without a gradient. Here a layer's part of the memory is an
argument of the function that is checkpointed.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attach import MemoryModel


def recompute_layers(model: nn.Module) -> None:
    """Let every layer of an anchor, with or without memories, recompute instead of remember.

    The layers change class, not place; their names and weights stay as they were.
    """
    call = model._call if isinstance(model, MemoryModel) else None
    positions = model.memory_positions if isinstance(model, MemoryModel) else {}
    for index, layer in enumerate(model.layers):
        layer.__class__ = _recomputing(type(layer), call, positions.get(index))


def _recomputing(base: type[nn.Module], call: Any, position: int | None) -> type[nn.Module]:
    class RecomputingLayer(base):
        def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            layers = call.layers if call is not None else None
            arrays = [self.trainable_parameters(), x]
            if layers is not None and position is not None:
                arrays.append(layers[position])

            def compute(parameters: dict[str, Any], x: mx.array, *memory: mx.array) -> Any:
                self.update(parameters)
                if memory:
                    call.layers = {position: memory[0]}
                try:
                    return super(RecomputingLayer, self).__call__(x, *args, **kwargs)
                finally:
                    if memory:
                        call.layers = layers

            return mx.checkpoint(compute)(*arrays)

    return RecomputingLayer
