"""What a fetch brought and what it cost: FetchedMemory and its report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True)
class BlockReport:
    """How one block was fetched.

    Attributes:
        level: counted from 1.
        cluster: counted from 0 within the level; None in the generic memory.
        bytes: bytes of the block, wherever it came from; 0 if it is blocked.
        ms: milliseconds until the block was ready.
        source: "resident" (its level is held in memory), "cached" (fetched before), "disk",
            or "blocked" (zeros; nothing was read).
        blocked: whether the block is blocked.
    """

    level: int
    cluster: int | None
    bytes: int
    ms: float
    source: str
    blocked: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class FetchReport:
    """How a memory was fetched: one :class:`BlockReport` per level with memory."""

    blocks: list[BlockReport]

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.bytes for block in self.blocks)

    @property
    def ms(self) -> float:
        """Milliseconds of all blocks."""
        return sum(block.ms for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON: bytes, ms, blocks."""
        return {
            "bytes": self.bytes,
            "ms": self.ms,
            "blocks": [block.to_dict() for block in self.blocks],
        }


@dataclass(frozen=True)
class FetchedMemory:
    """A fetched (or the generic) memory.

    Attributes:
        blocks: one 1-D array (s_l,) per level with memory, in the dtype of the bank.
        report: where each came from.
    """

    blocks: list[mx.array]
    report: FetchReport
