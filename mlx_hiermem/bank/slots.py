"""Slots: buffers of one fixed size that a fetch reads into and the model computes from.

A slot is an MLX array of bytes whose memory Python sees too (the buffer protocol), so that a disk
read lands where the GPU computes from, without a copy. MLX does not know that somebody else
writes there, hence the one rule: **a slot is written only while nothing can read it any more.**
Who got a slot gives it back by name, once everything that reads it has been evaluated; a slot that
is not given back is never written again, and is freed when the last array that refers to it is
gone.

Notable: a free slot remembers what it holds, so a fetch that shares levels with an earlier one
reads only the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from .stored import StoredLayout

#: What a level's rows of a slot hold: a cluster, the generic memory's block, or zeros.
Key = int | str
GENERIC_KEY, ZEROS = "generic", "zeros"

_MLX = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


class Slot:
    """One buffer for a joined memory. Made on the thread that computes with it.

    Attributes:
        bytes: its memory, (nbytes,) uint8, writable, by any thread.
        held: for each level what its rows hold; a level that is being written is not in it.
        shares: whether MLX sees what is written to ``bytes``; else :meth:`joined` copies.
    """

    def __init__(self, layout: StoredLayout) -> None:
        self._layout = layout
        self._raw = mx.zeros((layout.nbytes,), mx.uint8)
        mx.eval(self._raw)
        self.held: dict[int, Key] = {}
        self._pieces: dict[int, list[memoryview]] = {}
        self._view = self._raw if layout.config.packing is not None else self._numbers()
        self.shares = False
        self.bytes = np.zeros(0, np.uint8)
        try:
            self.bytes = np.array(self._raw, copy=False)
            self.shares = self._check_shares()
        except (ValueError, TypeError, RuntimeError, BufferError):
            pass  # this backend's memory cannot be seen from outside
        if not self.shares:
            self.bytes = np.zeros(layout.nbytes, np.uint8)

    def _check_shares(self) -> bool:
        """Whether what is computed from sees what is written to ``bytes``, at both ends."""
        if not self.bytes.flags.writeable:
            return False
        seen = []
        for end in (0, -1):
            self.bytes[end] = 0xA5
            number = self._view[:1] if end == 0 else self._view[-1:]
            seen.append(number.view(mx.uint8)[end].item() == 0xA5)
            self.bytes[end] = 0
        return all(seen)

    def _numbers(self) -> mx.array:
        view = self._raw.view(_MLX[self._layout.config.dtype])
        mx.eval(view)
        return view

    def pieces(self, level: int) -> list[memoryview]:
        """Where the stored bytes of a level's block go."""
        if level not in self._pieces:
            self._pieces[level] = self._layout.pieces(self.bytes, level)
        return self._pieces[level]

    def joined(self) -> mx.array:
        """The joined memory (fetch_size,) in the bank's dtype, matrix after matrix.

        A view of the slot where the bank is not quantised and the backend shares memory; otherwise
        an array of its own, evaluated, after which the slot may be given back at once.
        """
        if self._layout.config.packing is None:
            if self.shares:
                return self._view
            copy = mx.array(self.bytes).view(_MLX[self._layout.config.dtype])
        else:
            raw = self._raw if self.shares else mx.array(self.bytes)
            copy = unpack(raw, self._layout)
        mx.eval(copy)
        return copy

    @property
    def computed_from(self) -> bool:
        """Whether :meth:`joined` is a view of the slot."""
        return self.shares and self._layout.config.packing is None


def unpack(raw: mx.array, layout: StoredLayout) -> mx.array:
    """Joined stored bytes of a quantised bank, (nbytes,) uint8, as numbers (fetch_size,)."""
    packing, dtype = layout.config.packing, _MLX[layout.config.dtype]
    assert packing is not None, "of a quantised bank"
    kinds = [mx.uint32, *[dtype if packing.mode == "affine" else mx.uint8] * 2]
    parts: dict[int, list[mx.array]] = {}
    for strip in layout.strips:
        begin = strip.start * layout.rank
        size = strip.count * layout.rank * strip.row_bytes
        part = raw[begin : begin + size].view(kinds[strip.part])
        parts.setdefault(strip.part, []).append(part.reshape(strip.count * layout.rank, -1))
    # All parts are cut at the same matrices, because equal widths give equal bytes in each.
    numbers = []
    for matrices in zip(*(parts[part] for part in sorted(parts)), strict=True):
        rows = len(matrices[0])
        if matrices[1].size % 2 and packing.mode == "nvfp4":
            # MLX on a CPU unpacks nvfp4 by two groups: a row more, and they are even.
            matrices = tuple(mx.concatenate([part, part[-1:]]) for part in matrices)
        packed, scales, biases = matrices if len(matrices) == 3 else (*matrices, None)
        unpacked = mx.dequantize(
            packed, scales, biases,
            group_size=packing.group_size, bits=packing.bits, mode=packing.mode, dtype=dtype,
        )  # fmt: skip
        numbers.append(unpacked[:rows].reshape(-1))
    return numbers[0] if len(numbers) == 1 else mx.concatenate(numbers)


def split(layout: StoredLayout, joined: mx.array) -> list[mx.array]:
    """A joined memory (fetch_size,) as one block (s_l,) per level with memory."""
    blocks: dict[int, list[mx.array]] = {level: [] for level in layout.ranks}
    start = 0
    for width in layout.config.row_widths():
        matrix = joined[start : start + layout.rank * width].reshape(layout.rank, width)
        for level, (first, rank) in layout.ranks.items():
            blocks[level].append(matrix[first : first + rank].reshape(-1))
        start += layout.rank * width
    return [mx.concatenate(parts) for parts in blocks.values()]


class SlotPool:
    """Slots that are free, and new ones when there is none. For one thread.

    Args:
        layout: of the bank.
        keep: free slots that are kept; more are dropped, the one given back longest ago first.
    """

    def __init__(self, layout: StoredLayout, keep: int = 2) -> None:
        self._layout = layout
        self._keep = keep
        self._free: OrderedDict[int, Slot] = OrderedDict()
        self.made = 0

    def take(self, wanted: Mapping[int, Key]) -> Slot:
        """A slot for a memory: the free one that holds most of it already, or a new one."""
        best = max(self._free, key=lambda number: self._common(number, wanted), default=None)
        if best is None:
            self.made += 1
            return Slot(self._layout)
        return self._free.pop(best)

    def _common(self, number: int, wanted: Mapping[int, Key]) -> int:
        held = self._free[number].held
        return sum(
            self._layout.ranks[level][1] for level, key in wanted.items() if held.get(level) == key
        )

    def give_back(self, slot: Slot) -> None:
        """Nothing reads the slot any more: it may be written again."""
        self._free[id(slot)] = slot
        while len(self._free) > self._keep:
            self._free.popitem(last=False)

    def clear(self) -> None:
        """Drop the free slots."""
        self._free.clear()
