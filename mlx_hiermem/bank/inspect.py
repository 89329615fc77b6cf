"""What an open bank is, level by level, as a mapping for JSON."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .reader import BlockReader
from .tiers import Tiers


def level_bytes(reader: BlockReader) -> dict[int, int]:
    """Bytes of the blocks of each level that are in the part that is open."""
    config = reader.config
    return {
        level: config.block_bytes(level)
        * sum(shard.rows for shard in reader.shards(level) if reader.part.has_shard(config, shard))
        for level in config.memory_levels
    }


def describe(
    reader: BlockReader, tiers: Tiers, blocked: Collection[tuple[int, int]], held: int
) -> dict[str, Any]:
    """A bank, and a table with one row per level.

    Args:
        blocked: pairs (level, cluster).
        held: bytes of the resident and cached blocks.

    Returns:
        ``folder``, ``revision``, ``format_version``, ``kind``, ``branching``, ``added`` (for each
        added memory ``name``, ``roots`` and ``first``, its first cluster of level 1),
        ``quantization``, ``fetch_size`` and ``fetch_bytes`` (numbers and bytes of one fetched
        memory), ``bank_size`` and ``bank_bytes``, ``memory_budget``, ``bytes_held``, ``blocked``
        (pairs), and ``levels``: for each level ``level``, ``clusters``, ``rank``, ``block_size``
        (numbers), ``block_bytes``, ``total_bytes``, ``present_bytes`` (in the part that is open),
        ``dtype``, ``shards``, ``tier`` ("none" without memory, "absent" outside of the part),
        ``why``, ``folder`` and ``blocked`` (how many).
    """
    config = reader.config
    present = level_bytes(reader)
    table = []
    for level, rank in enumerate(config.ranks, 1):
        here = bool(rank) and reader.part.has_level(level)
        table.append(
            {
                "level": level,
                "clusters": config.clusters(level),
                "rank": rank,
                "block_size": config.block_size(level),
                "block_bytes": config.block_bytes(level),
                "total_bytes": config.block_bytes(level) * config.clusters(level),
                "present_bytes": present.get(level, 0),
                "dtype": config.dtype,
                "shards": len(reader.shards(level)) if rank else 0,
                "tier": tiers.of[level] if here else ("absent" if rank else "none"),
                "why": tiers.why[level] if here else "",
                "folder": str(reader.place(level)),
                "blocked": sum(one == level for one, _ in blocked),
            }
        )
    return {
        "folder": str(reader.folder),
        "revision": reader.manifest.revision,
        "format_version": config.format_version,
        "kind": config.kind,
        "branching": config.branching,
        "added": [
            {"name": name, "roots": len(roots), "first": roots.start}
            for name, roots in config.added_roots().items()
        ],
        "quantization": None if config.packing is None else config.packing.to_dict(),
        "fetch_size": config.fetch_size(),
        "fetch_bytes": sum(map(config.block_bytes, config.memory_levels)),
        "bank_size": config.bank_size(),
        "bank_bytes": sum(row["total_bytes"] for row in table),
        "memory_budget": tiers.budget,
        "bytes_held": held,
        "blocked": [list(pair) for pair in sorted(blocked)],
        "levels": table,
    }
