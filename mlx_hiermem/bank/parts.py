"""Which part of a bank is wanted: some of its levels, some of its level-1 subtrees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import MemoryConfig
from .address import check_cluster, check_level
from .layout import Shard, expected_files, shards


@dataclass(frozen=True)
class Part:
    """Levels and subtrees of a bank; None is all of them.

    A bank opened in part needs the files of that part alone. All other blocks are absent: they
    read as zeros, which have no effect on the anchor.

    Attributes:
        levels: counted from 1.
        subtrees: clusters of level 1. A subtree is its cluster and everything below; the file of
            level 1 holds all clusters of level 1 and always comes whole.
    """

    levels: tuple[int, ...] | None = None
    subtrees: tuple[int, ...] | None = None

    @classmethod
    def of(cls, levels: Iterable[int] | None, subtrees: Iterable[int] | None) -> Part:
        """From any iterables; repeats go."""
        ordered = [None if one is None else tuple(dict.fromkeys(one)) for one in (levels, subtrees)]
        return cls(*ordered)

    @property
    def whole(self) -> bool:
        """Whether it is the whole bank."""
        return self.levels is None and self.subtrees is None

    def check(self, config: MemoryConfig) -> None:
        """Raise PathError if the bank has no such level with memory, or no such subtree."""
        for level in self.levels or ():
            check_level(config, level)
        for subtree in self.subtrees or ():
            check_cluster(config, 1, subtree)

    def has_level(self, level: int) -> bool:
        """Whether blocks of ``level`` are wanted."""
        return self.levels is None or level in self.levels

    def has(self, config: MemoryConfig, level: int, cluster: int) -> bool:
        """Whether the block of a cluster is wanted."""
        return self.has_level(level) and (
            self.subtrees is None
            or level == 1
            or cluster // config.branching ** (level - 1) in self.subtrees
        )

    def has_shard(self, config: MemoryConfig, shard: Shard) -> bool:
        """Whether a level file is wanted: below level 1 it never spans two subtrees."""
        return self.has(config, shard.level, shard.first)

    def files(self, config: MemoryConfig) -> list[str]:
        """Names of the files that are needed, apart from the manifest."""
        absent = {
            shard.name
            for level in config.memory_levels
            for shard in shards(config, level)
            if not self.has_shard(config, shard)
        }
        return [name for name in expected_files(config) if name not in absent]
