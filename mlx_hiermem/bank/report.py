"""What a fetch brought and what it cost: FetchedMemory and its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

    from ..owner import Owner

#: Where a block may come from; see :class:`BlockReport`.
SOURCES = (
    "resident", "cached", "disk", "kept", "prefetched", "batch", "blocked", "removed", "absent",
)  # fmt: skip
#: Sources of blocks that are zeros, for which nothing is read.
OF_ZEROS = ("blocked", "removed", "absent")


@dataclass(frozen=True)
class BlockReport:
    """How one block was fetched.

    Attributes:
        level: counted from 1.
        cluster: counted from 0 within the level; None in the generic memory.
        bytes: stored bytes of the block, wherever it came from; 0 if it is blocked or absent.
        ms: milliseconds until the block was ready. Reads of several levels overlap.
        source: "resident" (its level is held in memory), "cached" (fetched before), "disk" (read
            from its file), "kept" (in the buffer since the fetch before: nothing was moved),
            "prefetched" (read ahead, see ``MemoryBank.prefetch``), "batch" (read once for several
            memories), "blocked", "removed" (its numbers are gone, see ``bank remove``) or "absent"
            (not in the part of the bank that is open); the last three are zeros, and nothing was
            read.
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


@dataclass
class FetchReport:
    """How a memory was fetched.

    Attributes:
        blocks: one :class:`BlockReport` per level with memory.
        ms: milliseconds of the whole fetch.
    """

    blocks: list[BlockReport]
    ms: float = 0.0

    @property
    def bytes(self) -> int:
        """Stored bytes of all blocks."""
        return sum(block.bytes for block in self.blocks)

    @property
    def bytes_read(self) -> int:
        """Bytes of the blocks that were read from files for this fetch."""
        return sum(block.bytes for block in self.blocks if block.source == "disk")

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON: bytes, ms, blocks."""
        return {
            "bytes": self.bytes,
            "ms": self.ms,
            "blocks": [block.to_dict() for block in self.blocks],
        }


class FetchedMemory:
    """A fetched (or the generic) memory.

    Attributes:
        joined: (fetch_size,) in the dtype of the bank, the levels' blocks joined matrix by matrix:
            each matrix holds the rows of all levels, level 1 first. Evaluated.
        report: where each block came from.
    """

    def __init__(
        self,
        joined: mx.array,
        report: FetchReport,
        split: Callable[[mx.array], list[mx.array]],
        loan: Loan | None = None,
    ) -> None:
        self.joined = joined
        self.report = report
        self._split = split
        self._loan = loan

    @property
    def blocks(self) -> list[mx.array]:
        """One array (s_l,) per level with memory, in the dtype of the bank: W[l, i]. Copies."""
        return self._split(self.joined)

    @property
    def lent(self) -> bool:
        """Whether ``joined`` lies in a buffer that :meth:`release` would give back."""
        return self._loan is not None

    def share(self) -> FetchedMemory:
        """The same memory for somebody else, who releases it too."""
        if self._loan is not None:
            self._loan.owner.check()
            self._loan.holders += 1
        blocks = [
            block if block.source in OF_ZEROS else replace(block, source="batch", ms=0.0)
            for block in self.report.blocks
        ]
        return FetchedMemory(self.joined, FetchReport(blocks), self._split, self._loan)

    def release(self) -> None:
        """Let the next fetch write where ``joined`` is.

        Only for who knows that **everything that was computed from ``joined`` is evaluated**: what
        is still lazy would read the next memory. Without it the buffer is freed when the last array
        that refers to it is gone, which is always safe and only costs the next fetch a new buffer.
        Calling it again does nothing.

        Raises:
            ThreadError: in another thread than the bank's.
        """
        if self._loan is not None:
            self._loan.owner.check()
        loan, self._loan = self._loan, None
        if loan is not None:
            loan.holders -= 1
            if loan.holders == 0:
                loan.give_back()


@dataclass
class Loan:
    """A buffer that is lent to one or more holders of the same memory, in the owner's thread."""

    give_back: Callable[[], None]
    owner: Owner
    holders: int = 1
