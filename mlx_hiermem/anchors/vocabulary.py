"""Which tokens an anchor can be given.

MLX does not check what it gathers: a token beyond the table reads what lies there, or ends the
process.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError


def vocabulary(model: nn.Module) -> int:
    """The rows of a model's token embeddings; where they are of no kind of MLX's, those of its
    output head.

    Args:
        model: with memories attached.
    """
    kinds = nn.Embedding | nn.QuantizedEmbedding
    tables = [len(module.weight) for module in model.modules() if isinstance(module, kinds)]
    if tables:
        return max(tables)
    logits = model(mx.array([[0]]), cache=model.make_cache())
    return logits.shape[-1]  # known before anything is computed


def check_tokens(name: str, tokens: Iterable[int], rows: int) -> None:
    """Raise InputError where a token has no row.

    Args:
        name: of what has the tokens, for the message.
        rows: as :func:`vocabulary` tells.
    """
    beyond = next((token for token in tokens if not 0 <= token < rows), None)
    if beyond is not None:
        raise InputError(f"{name} has token {beyond}; expected tokens from 0 to {rows - 1}")
