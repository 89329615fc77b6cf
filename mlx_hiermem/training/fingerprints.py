"""What names the anchor and the tree that memories were trained with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..bank.files import hash_file
from ..memories import MemoryModel

#: The name of the tree within a memory folder and a corpus's ``routing/``.
TREE = "tree.safetensors"


def anchor_sha256(
    anchor: nn.Module | Mapping[str, mx.array], progress: Callable[[int], object] | None = None
) -> str:
    """The sha256 (hex) of an anchor's weights, whatever dtype and files they are kept in.

    For each parameter, sorted by name, the UTF-8 text ``<name> <dtype> <shape, by commas>\\n`` and
    then its numbers, little-endian, row by row. Floating-point numbers count as float32, into
    which bfloat16 and float16 go exactly; integers (of quantised weights) as they are.

    Args:
        anchor: a model, a model with memories (whose anchor is meant), or its flat weights.
        progress: called with the bytes hashed since the call before.
    """
    if isinstance(anchor, MemoryModel):
        anchor = anchor.anchor
    flat = anchor.parameters() if isinstance(anchor, nn.Module) else anchor
    weights = dict(tree_flatten(flat))
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        if mx.issubdtype(weight.dtype, mx.floating):
            weight = weight.astype(mx.float32)  # NumPy has no bfloat16
        numbers = np.array(weight)
        numbers = np.ascontiguousarray(numbers.astype(numbers.dtype.newbyteorder("<"), copy=False))
        shape = ",".join(map(str, weight.shape))
        digest.update(f"{name} {numbers.dtype.name} {shape}\n".encode())
        digest.update(memoryview(numbers).cast("B") if numbers.size else b"")
        if progress is not None:
            progress(numbers.nbytes)
    return digest.hexdigest()


def anchor_bytes(anchor: nn.Module) -> int:
    """Bytes that :func:`anchor_sha256` goes through, for a progress bar."""
    return sum(
        4 * weight.size if mx.issubdtype(weight.dtype, mx.floating) else weight.nbytes
        for _, weight in tree_flatten(anchor.parameters())
    )


def tree_sha256(folder: str | Path) -> str:
    """The sha256 (hex) of the file ``tree.safetensors`` in ``folder``.

    Raises:
        FormatError: there is none, or it cannot be read.
    """
    return hash_file(Path(folder), TREE)[1]
