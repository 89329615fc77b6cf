"""A cache of blocks under a budget of bytes; the block that was used longest ago goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any


class BlockCache:
    """At most ``budget`` bytes of blocks. Not safe for several threads at once.

    Notable: room is made before a block is read (:meth:`make_room`, then :meth:`put`), so the
    blocks held and the block on its way are never more than the budget together.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self._blocks: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._blocks

    def get(self, key: Hashable) -> Any | None:
        """The block, which then counts as the one used last; None if it is not held."""
        if key not in self._blocks:
            return None
        self._blocks.move_to_end(key)
        return self._blocks[key][0]

    def make_room(self, nbytes: int) -> None:
        """Drop blocks until ``nbytes`` more fit; ``nbytes`` must not be above the budget."""
        if nbytes > self.budget:
            raise ValueError(f"a block of {nbytes} bytes in a cache of {self.budget}")
        while self.bytes + nbytes > self.budget:
            _, (_, freed) = self._blocks.popitem(last=False)
            self.bytes -= freed

    def put(self, key: Hashable, block: Any, nbytes: int) -> None:
        """Hold a block of ``nbytes`` bytes."""
        self.discard(key)
        self.make_room(nbytes)
        self._blocks[key] = (block, nbytes)
        self.bytes += nbytes

    def discard(self, key: Hashable) -> None:
        """Drop a block if it is held."""
        _, freed = self._blocks.pop(key, (None, 0))
        self.bytes -= freed

    def clear(self) -> None:
        """Drop all blocks."""
        self._blocks.clear()
        self.bytes = 0
