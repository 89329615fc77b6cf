"""A request's memory, fetched and ready for a batch.

Notable: what goes into the batch are arrays of their own, never the bank's buffer. So the buffer is
free for the next fetch before the first token, whatever becomes of the request, and no fetch can
write where a request in flight reads.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from ..bank.report import FetchReport
from ..memories.attach import ArraysCache
from .memory import MemoryChoice

if TYPE_CHECKING:
    from ..engine import MemoryLM


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


def fetch(lm: MemoryLM, choice: MemoryChoice, text: str | None) -> tuple[ArraysCache, About]:
    """Fetch the memory of a request.

    Args:
        text: that is routed, if the choice names none.

    Returns:
        The last entry of a prompt cache, evaluated, and what is known of it.

    Raises:
        PathError: the path, or a block to be blocked, does not exist.
        InputError: the text is empty, or not valid Unicode.
        FormatError: the bank cannot be read.
    """
    wanted = choice.path if choice.path is not None else choice.kind
    routed = text if choice.route_on is None else choice.route_on
    fetched = lm.fetch(wanted, routed, choice.blocked)
    try:
        memory = fetched.memory
        if fetched.found is not None and fetched.found.lent:
            assert memory is not None, "found in the bank"
            # Gathered, since what is merely sliced would be the bank's buffer still.
            memory = mx.take(memory, mx.array([0]), axis=0)
            mx.eval(memory)
    finally:
        fetched.release()
    report = fetched.report
    path = None if fetched.path is None else tuple(fetched.path.ids)
    off = frozenset((block.level, block.cluster) for block in report.blocks if block.blocked)
    key = (lm.bank.revision, fetched.kind, path, off)
    return lm.model.memory_entry(memory), About(fetched.kind, path, report, key)
