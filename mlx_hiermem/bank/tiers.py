"""Which levels are resident, and how many bytes the cache of the other levels may take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..config import MemoryConfig
from ..errors import BudgetError
from .address import check_level, integer

#: Without a budget level 1 is resident if it has at most this many bytes, and the cache of
#: the other levels has this many, or those of one fetched memory if that is more.
DEFAULT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Tiers:
    """The resident levels, and the bytes of: everything held, and the cache as part of that."""

    resident: tuple[int, ...]
    budget: int
    cache: int


def plan_tiers(config: MemoryConfig, budget: Any, resident: Iterable[int] | None) -> Tiers:
    """Decide what is held in memory.

    Args:
        budget: bytes that resident and cached blocks may take together, or None.
        resident: levels to hold as a whole. None: with a budget as many levels from level 1 on
            as fit in half of it; without one level 1 if it is small (``DEFAULT_BYTES``).

    Raises:
        BudgetError: the budget cannot hold the resident levels and one block beside them.
        PathError: a resident level has no memory.
    """
    block = {level: config.block_bytes(level) for level in config.memory_levels}
    total = {level: block[level] * config.clusters(level) for level in block}
    if budget is not None:
        if integer(budget) is None:
            raise BudgetError(f"memory budget: {budget!r} is no number of bytes; give an integer")
        budget = integer(budget)
        largest = max(block, key=block.__getitem__)
        if budget < block[largest]:
            raise BudgetError(
                f"memory budget: {budget} bytes cannot hold one block of level {largest} "
                f"({block[largest]} bytes); give at least {block[largest]}"
            )

    def held(levels: Iterable[int]) -> int:
        return sum(total[level] for level in levels)

    def beside(levels: Iterable[int]) -> int:
        # The largest block of the levels that are not resident: it has to fit as well.
        return max((size for level, size in block.items() if level not in levels), default=0)

    if resident is not None:
        levels = tuple(sorted({check_level(config, level) for level in resident}))
    elif budget is None:
        levels = (1,) if 0 < total.get(1, 0) <= DEFAULT_BYTES else ()
    else:
        levels = ()
        for level in block:
            deeper = (*levels, level)
            if held(deeper) > budget // 2 or held(deeper) + beside(deeper) > budget:
                break
            levels = deeper
    if budget is None:
        budget = held(levels) + max(DEFAULT_BYTES, sum(block.values()))
    need = held(levels) + beside(levels)
    if need > budget:
        raise BudgetError(
            f"memory budget: {budget} bytes cannot hold resident levels {list(levels)} "
            f"({held(levels)} bytes) and one block beside them ({beside(levels)} bytes); give at "
            f"least {need} or fewer resident levels"
        )
    return Tiers(levels, budget, budget - held(levels))
