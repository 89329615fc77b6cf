"""The way back: a bank as one stacked tensor per level and matrix (layout 1), in safetensors.

A block of ours holds all its matrices; a stacked tensor holds one matrix of all blocks. So each
chunk of blocks is read once, and its pieces are written to as many places of the file as there are
matrices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mlx_hiermem import kinds
from mlx_hiermem.bank.blocked import show_blocks
from mlx_hiermem.bank.dtypes import STORAGE
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import FormatError

from ..scattered import ScatteredFile
from .description import CONFIG
from .rows import CHUNK_BYTES, check_finite

#: Called with the bytes written since the call before.
Progress = Callable[[int], None]


def memory_name(level: int) -> str:
    """Name of the file that holds the blocks of a level; 0: the generic memory."""
    return f"memory-level-{level}.safetensors" if level else "memory-generic.safetensors"


def write_stacked(
    reader: BlockReader, folder: Path, progress: Progress | None = None
) -> dict[str, str]:
    """Write the blocks of a bank, and the generic memory, as layout 1 (docs/convert.md).

    Removed blocks are zeros, as in the bank.

    Args:
        reader: of a bank that is not quantised.
        folder: to write into.

    Returns:
        For each tensor the name of its file.

    Raises:
        FormatError: the bank is quantised, has added memories or blocked blocks, holds NaN, or a
            file cannot be read or written.
    """
    config = reader.config
    if config.quantization is not None:
        raise FormatError(
            f"{reader.folder}: is quantised ({config.packing}); PyTorch gets the bank that it was "
            "made from"
        )
    if config.added:
        added = ", ".join(one.name for one in config.added)
        raise FormatError(
            f"{reader.folder}: has added memories ({added}), which no layout of PyTorch knows; "
            "convert the bank that they were added to"
        )
    if reader.blocked:
        raise FormatError(
            f"{reader.folder}: has blocked blocks ({show_blocks(reader.blocked)}), which would not "
            "be blocked in PyTorch; unblock or remove them first, in a copy of the model if need "
            "be (mlx_hiermem bank unblock, bank remove)"
        )
    matrices = _Matrices(config)
    found: dict[str, str] = {}
    for level in config.memory_levels:
        clusters = config.clusters(level)
        names = [f"memory.level{level}.{name}" for name in matrices.names]
        shapes = [(clusters, *shape) for shape in matrices.shapes(config.ranks[level - 1])]
        tensors = {name: (config.dtype, shape) for name, shape in zip(names, shapes, strict=True)}
        with ScatteredFile(folder, memory_name(level), tensors) as out:
            size = config.block_size(level)
            step = max(1, CHUNK_BYTES // (size * STORAGE[config.dtype].itemsize))
            for first in range(0, clusters, step):
                last = min(first + step, clusters)
                blocks = np.stack([reader.stored(level, row) for row in range(first, last)])
                check_finite(blocks, config.dtype, f"{reader.folder}: level {level}, from {first}")
                for name, piece in zip(names, matrices.cut(blocks, level), strict=True):
                    out.put(name, first, piece)
                if progress is not None:
                    progress(blocks.nbytes)
        found |= dict.fromkeys(names, memory_name(level))
    return found | _write_generic(reader, folder, matrices)


def _write_generic(reader: BlockReader, folder: Path, matrices: _Matrices) -> dict[str, str]:
    config = reader.config
    joined: list[list[np.ndarray]] = [[] for _ in matrices.names]
    for level in config.memory_levels:
        block = reader.stored(level, None)[None]
        for rows, piece in zip(joined, matrices.cut(block, level), strict=True):
            rows.append(piece[0])
    names = [f"memory.generic.{name}" for name in matrices.names]
    # The rows of level 1 first, as in a fetched memory: (L, R, w)
    arrays = [np.concatenate(rows, axis=1) for rows in joined]
    tensors = {name: (config.dtype, array.shape) for name, array in zip(names, arrays, strict=True)}
    with ScatteredFile(folder, memory_name(0), tensors) as out:
        for name, array in zip(names, arrays, strict=True):
            out.put(name, 0, array)
    return dict.fromkeys(names, memory_name(0))


def description(config: MemoryConfig) -> dict[str, object]:
    """The ``memory_config.json`` that belongs to it."""
    return {
        "kind": config.kind,
        "branching": config.branching,
        "levels": config.levels,
        "ranks": list(config.ranks),
        "layers": list(config.memory_layers()),
        "encoder": dict(config.encoder),
    }


def write_description(config: MemoryConfig, folder: Path) -> None:
    """Write :func:`description` into a folder."""
    text = json.dumps(description(config), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


class _Matrices:
    """Cuts blocks into their matrices."""

    def __init__(self, config: MemoryConfig) -> None:
        self._config = config
        self._layers = len(config.memory_layers())
        self.names = kinds.find(config.kind).matrices
        self._widths = kinds.find(config.kind).row_widths(config.anchor_shape())

    def shapes(self, rank: int) -> list[tuple[int, int, int]]:
        """(L, r, w) of each matrix."""
        return [(self._layers, rank, width) for width in self._widths]

    def cut(self, blocks: np.ndarray, level: int) -> Iterator[np.ndarray]:
        """(n, s_l) -> (n, L, r, w) for each matrix."""
        rank = self._config.ranks[level - 1]
        layers = blocks.reshape(len(blocks), self._layers, -1)
        start = 0
        for width in self._widths:
            piece = layers[:, :, start : start + rank * width]
            yield piece.reshape(len(blocks), self._layers, rank, width)
            start += rank * width
