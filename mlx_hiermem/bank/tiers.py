"""Tiers: which levels are held in memory, which are cached, which stay on disk, and why.

- ``resident``: the whole level is read when the bank is opened;
- ``cached``: blocks that were used stay, the one used longest ago goes first, under what the budget
  leaves;
- ``disk``: every block comes from its file. The system's page cache works for this tier too, on its
  own terms and outside of the budget.

The shallow levels are placed first, as the paper proposes (section 4): they are few blocks, which
every fetch needs, and they change least often when the topic changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import MemoryConfig
from ..errors import BudgetError, InputError
from .address import check_level, integer

TIERS = ("resident", "cached", "disk")

#: Without a budget level 1 is resident if it has at most this many bytes, and the cache of levels
#: that are cached by hand has this many, or those of one fetched memory if that is more.
DEFAULT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Tiers:
    """What is held in memory.

    Attributes:
        of: for each level with memory its tier.
        why: for each level with memory the reason, in a few words.
        budget: bytes that resident and cached blocks may take together.
        cache: bytes of that for the cache.
    """

    of: Mapping[int, str]
    why: Mapping[int, str]
    budget: int
    cache: int

    @property
    def resident(self) -> tuple[int, ...]:
        """The resident levels."""
        return tuple(level for level, tier in self.of.items() if tier == "resident")


def plan_tiers(
    config: MemoryConfig,
    budget: Any,
    tiers: Mapping[int, str] | str | None = None,
    level_bytes: Mapping[int, int] | None = None,
) -> Tiers:
    """Decide what is held in memory.

    Args:
        budget: bytes that resident and cached blocks may take together, or None.
        tiers: for some levels the tier, chosen by hand, or one tier for all. With a budget the
            others are placed from level 1 on: resident while the whole level fits, and one block of
            a deeper one beside it, then cached. Without one level 1 is resident if it is small, and
            the others are on disk: a cache would hold a second time what the page cache holds.
        level_bytes: bytes of each level, where not all of it is there; default: all.

    Raises:
        BudgetError: the budget cannot hold the resident levels and one block beside them.
        PathError: a level has no memory.
        InputError: a tier has another name.
    """
    if isinstance(tiers, str):
        tiers = dict.fromkeys(config.memory_levels, tiers)
    chosen = {check_level(config, level): tier for level, tier in (tiers or {}).items()}
    for level, tier in chosen.items():
        if tier not in TIERS:
            raise InputError(
                f"tier of level {level}: {str(tier)[:40]!r} is none; give one of {', '.join(TIERS)}"
            )
    block = {level: config.block_bytes(level) for level in config.memory_levels}
    total = {level: block[level] * config.clusters(level) for level in block}
    total |= level_bytes or {}
    given = budget is not None
    if given:
        budget = _checked(budget, block, chosen)

    def beside(levels: Iterable[int]) -> int:
        # The largest block of the levels that are cached: it has to fit as well.
        cached = (size for level, size in block.items() if level not in levels)
        return max(cached, default=0)

    of: dict[int, str] = dict(chosen)
    why = {level: "chosen by hand" for level in chosen}
    held = sum(total[level] for level, tier in chosen.items() if tier == "resident")
    deeper = None  # the first level that did not fit: the levels below it stay out as well
    for level in block:
        if level in of:
            continue
        after = held + total[level]
        known = [one for one, tier in of.items() if tier != "cached"]
        if not given:
            small = level == 1 and after <= DEFAULT_BYTES
            of[level] = "resident" if small else "disk"
            why[level] = "level 1 is small" if small else "no budget: the page cache serves it"
            held = after if small else held
        elif deeper is not None:
            of[level], why[level] = "cached", f"below level {deeper}: what the budget leaves"
        elif after + beside([*known, level]) <= budget:
            of[level], why[level], held = "resident", "fits in the budget", after
        else:
            deeper = level
            of[level], why[level] = "cached", "does not fit in the budget as a whole"
    if given:
        for level, tier in of.items():
            if tier == "cached" and level not in chosen and held + block[level] > budget:
                of[level], why[level] = "disk", "no block fits beside the resident levels"
    cached = [level for level, tier in of.items() if tier == "cached"]
    if not given:
        budget = held + (max(DEFAULT_BYTES, sum(block.values())) if cached else 0)
    need = held + max((block[level] for level in cached), default=0)
    if need > budget:
        resident = [level for level, tier in of.items() if tier == "resident"]
        raise BudgetError(
            f"memory budget: {budget} bytes cannot hold resident levels {resident} "
            f"({held} bytes) and one block beside them ({need - held} bytes); give at "
            f"least {need} or fewer resident levels"
        )
    ordered = {level: of[level] for level in block}
    return Tiers(ordered, {level: why[level] for level in block}, budget, budget - held)


def _checked(budget: Any, block: Mapping[int, int], chosen: Mapping[int, str]) -> int:
    """The budget as an int that holds the largest block that may have to be held."""
    if integer(budget) is None:
        raise BudgetError(f"memory budget: {budget!r} is no number of bytes; give an integer")
    budget = integer(budget)
    blocks = {level: size for level, size in block.items() if chosen.get(level) != "disk"}
    largest = max(blocks, key=blocks.__getitem__, default=None)
    if budget < 0 or (largest is not None and budget < blocks[largest]):
        level = largest or max(block, key=block.__getitem__)
        raise BudgetError(
            f"memory budget: {budget} bytes cannot hold one block of level {level} "
            f"({block[level]} bytes); give at least {block[level]}, or tier disk for each level"
        )
    return budget
