"""A request's memory: fetched, with the request's own blocks switched off, ready for a batch.

Notable: what goes into the batch are arrays of their own, never the bank's buffer. So the buffer is
free for the next fetch before the first token, whatever becomes of the request, and no fetch can
write where a request in flight reads.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from ..bank.address import check_cluster, check_level
from ..bank.report import FetchReport
from ..memories.attach import ArraysCache
from .memory import MemoryChoice

if TYPE_CHECKING:
    from ..engine import Fetched, MemoryLM


@dataclass(frozen=True)
class About:
    """What is known of a fetched memory, without its numbers.

    Attributes:
        kind: "fetched", "generic", "none" or "path".
        path: the cluster path, when one was fetched.
        report: where each block came from.
        key: equal for memories of the same numbers, in the same revision of the bank.
    """

    kind: str
    path: tuple[int, ...] | None
    report: FetchReport
    key: Hashable


class BatchEntry(ArraysCache):
    """An entry that knows for how many sequences it stands also when none of them has a memory.

    mlx-lm's forgets it at the end of a prefill that was padded, and the next sequence that comes
    with a memory then makes a batch of the wrong size.
    """

    def finalize(self) -> None:
        size = self.batch_size
        super().finalize()
        if self.empty():
            self.left_padding = mx.zeros((size,), mx.int32)


def fetch(lm: MemoryLM, choice: MemoryChoice, text: str | None) -> tuple[ArraysCache, About]:
    """Fetch the memory of a request.

    Args:
        text: that is routed, if the choice names none.

    Returns:
        The last entry of a prompt cache, evaluated, and what is known of it.

    Raises:
        PathError: the path, or a block to be switched off, does not exist.
        InputError: the text is empty, or not valid Unicode.
        FormatError: the bank cannot be read.
    """
    config = lm.bank.config
    for level, cluster in choice.blocked:
        check_cluster(config, check_level(config, level), cluster)
    wanted = choice.path if choice.path is not None else choice.kind
    fetched = lm.fetch(wanted, text if choice.route_on is None else choice.route_on)
    try:
        memory, report = _without(lm, fetched, choice.blocked)
        if memory is not None:
            # Gathered, since what is merely sliced or merged may be the bank's buffer still.
            memory = mx.take(memory, mx.array([0]), axis=0)
            mx.eval(memory)
    finally:
        fetched.release()
    entry = lm.model.memory_entry(memory)
    own = BatchEntry(len(entry.cache))
    own.cache = entry.cache
    path = None if fetched.path is None else tuple(fetched.path.ids)
    off = frozenset((block.level, block.cluster) for block in report.blocks if block.blocked)
    key = (lm.bank.revision, fetched.kind, path, off)
    return own, About(fetched.kind, path, report, key)


def _without(
    lm: MemoryLM, fetched: Fetched, blocked: Iterable[tuple[int, int]]
) -> tuple[mx.array | None, FetchReport]:
    """A memory (1, N) in which some blocks are zeros, and its report.

    They are read all the same, so that other requests find in the bank what they would have found.
    """
    report = fetched.report
    off = [(block.level, block.cluster) in blocked for block in report.blocks]
    if fetched.memory is None or not any(off):
        return fetched.memory, report
    levels = lm.model.split(lm.model.matrices(fetched.memory))
    kept = [
        mx.zeros_like(block) if zero else block for block, zero in zip(levels, off, strict=True)
    ]
    blocks = [
        replace(block, bytes=0, source="blocked", blocked=True) if zero else block
        for block, zero in zip(report.blocks, off, strict=True)
    ]
    return lm.model.join(kept), FetchReport(blocks, report.ms)
