"""How a joined memory is cut into the matrices of each layer, whatever the kind.

A block of rank r is, layer after layer, the matrices (r, width) that its kind names, one behind the
other. Joined, each matrix holds the rows of all levels, level 1 first: (R, width) with R the sum of
the ranks. A kind may want several matrices of one width as one array; they lie together.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .. import kinds
from ..config import AnchorShape, MemoryConfig
from ..kinds._kind import Matrices


class JoinedLayout:
    """The arrays of a memory of ``config`` on an anchor of ``shape``.

    Attributes:
        layers: L, layers with memory.
        groups: for each array of a layer (count, width): so many matrices of that width.
        ranks: r_l of each level with memory; R is their sum.
        arrays: how many arrays all layers have together.
        size: N, numbers of a joined memory.
    """

    def __init__(self, config: MemoryConfig, shape: AnchorShape) -> None:
        kind = kinds.find(config.kind)
        widths = iter(kind.row_widths(shape))
        self.layers = len(config.memory_layers(shape))
        self.groups = [(count, [next(widths) for _ in range(count)][0]) for count in kind.groups]
        self.ranks = [config.ranks[level - 1] for level in config.memory_levels]
        self.arrays = self.layers * len(self.groups)
        self.size = config.fetch_size(shape)

    def join(self, blocks: Sequence[mx.array]) -> mx.array:
        """Blocks (B, s_l), one array per level with memory, to a memory (B, N)."""
        if len(blocks) == 1:
            return blocks[0]
        batch, first, parts = blocks[0].shape[0], 0, []
        row = self.size // self.layers // sum(self.ranks)
        of_layers = [block.reshape(batch, self.layers, -1) for block in blocks]
        for count, width in self.groups:
            # (B, L, count * r_l * width) -> (B, L, count, r_l, width), joined along r
            rows = [
                block[..., first * rank : (first + count * width) * rank].reshape(
                    batch, self.layers, count, rank, width
                )
                for block, rank in zip(of_layers, self.ranks, strict=True)
            ]
            parts.append(mx.concatenate(rows, axis=3).reshape(batch, self.layers, -1))
            first += count * width
        assert first == row
        return mx.concatenate(parts, axis=2).reshape(batch, -1)

    def matrices(self, memory: mx.array) -> list[Matrices]:
        """A memory (B, N), layer by layer, as arrays (B, count * R, width)."""
        found, start, rank = [], 0, sum(self.ranks)
        for _ in range(self.layers):
            layer = []
            for count, width in self.groups:
                end = start + count * rank * width
                layer.append(memory[:, start:end].reshape(-1, count * rank, width))
                start = end
            found.append(tuple(layer))
        return found

    def of_entry(self, arrays: Sequence[mx.array | None]) -> list[Matrices] | None:
        """The arrays of a prompt cache's entry, layer by layer; None where it holds no memory."""
        if arrays[0] is None:
            return None
        held = [one for one in arrays if one is not None]  # where one is, all are
        step = len(self.groups)
        return [tuple(held[start : start + step]) for start in range(0, len(held), step)]

    def split(self, matrices: Sequence[Matrices]) -> list[mx.array]:
        """Matrices, or their gradients, back to blocks (B, s_l), one array per level."""
        blocks, start, total = [], 0, sum(self.ranks)
        for rank in self.ranks:
            # (B, count * R, width) -> (B, count * r_l * width), one behind the other
            rows = [
                array.reshape(len(array), count, total, width)[:, :, start : start + rank].reshape(
                    len(array), -1
                )
                for layer in matrices
                for array, (count, width) in zip(layer, self.groups, strict=True)
            ]
            blocks.append(mx.concatenate(rows, axis=1))
            start += rank
        return blocks
