"""OwnBlocksLM: a model as one visitor sees it, with blocks off that stay on for all others.

``MemoryBank.block`` is for everybody who uses the bank. Here the blocks are zeros in a copy of the
fetched memory, which belongs to one answer; the bank and its buffers are as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_hiermem.bank.report import FetchReport
from mlx_hiermem.engine import Fetched, Memory, MemoryLM


class OwnBlocksLM(MemoryLM):
    """The same weights, bank and router as ``lm``; some blocks read as zeros.

    Args:
        lm: the model; it is not changed.
        blocked: pairs (level, cluster), levels from 1 and clusters from 0.
    """

    def __init__(self, lm: MemoryLM, blocked: Iterable[tuple[int, int]]) -> None:
        self.__dict__.update(lm.__dict__)
        self.own_blocks = frozenset(blocked)

    def fetch_batch(self, memory: Memory, texts: Sequence[str | None]) -> list[Fetched]:
        """As ``MemoryLM.fetch_batch``; the report calls the blocks "blocked", of 0 bytes.

        They are read all the same: what a fetch reads is the same for all visitors.
        """
        return [self._without(fetched) for fetched in super().fetch_batch(memory, texts)]

    def _without(self, fetched: Fetched) -> Fetched:
        blocks = fetched.report.blocks
        off = [(block.level, block.cluster) in self.own_blocks for block in blocks]
        if fetched.found is None or not any(off):
            return fetched
        parts = zip(fetched.found.blocks, off, strict=True)
        kept = [mx.zeros_like(block) if zero else block for block, zero in parts]
        memory = self.model.join([block[None] for block in kept]).astype(self.dtype)
        mx.eval(memory)
        fetched.release()  # what is computed from it is evaluated, and is a copy
        report = [
            replace(block, bytes=0, source="blocked", blocked=True) if zero else block
            for block, zero in zip(blocks, off, strict=True)
        ]
        return replace(
            fetched, memory=memory, report=FetchReport(report, fetched.report.ms), found=None
        )
