"""The files of a bank (docs/format.md): which there are, and what each holds.

Notable:
- Row i of level l is the whole block W[l, i] of s_l numbers, contiguous (the paper's
  W[l, i] in R^{s_l}), so that a fetch is one read per level.
- Levels 2 and deeper are cut into one shard per level-1 subtree; a shard of 2^31 numbers or
  more is cut further, since Metal cannot hold such a tensor.
- An added memory has files of its own, at every level, behind those of the tree: adding one changes
  no level file that is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import MemoryConfig
from ..errors import ConfigError, FormatError
from .header import Header

CONFIG = "config.json"
GENERIC = "generic.safetensors"
#: Names of the tensors in a level file and in the file of the generic memory.
BLOCKS, GENERIC_TENSOR = "blocks", "generic"

#: Most numbers in one shard (mlx#3327).
MAX_SHARD_SIZE = 2**31 - 1
#: Most shards of one level: as many as five digits number.
MAX_SHARDS = 99_999

_LEVEL_FILE = re.compile(r"level-(\d+)-(?:[a-z0-9-]{1,32}-)?\d+-of-\d+\.safetensors")
_ADDED_TREE = re.compile(r"tree-[a-z0-9-]{1,32}\.safetensors")


@dataclass(frozen=True)
class Shard:
    """One level file: ``rows`` clusters of ``level`` from cluster ``first`` on.

    Attributes:
        index, count: its number among the level's files of the same memory, and how many these are.
        memory: name of the added memory that it belongs to; "" for the tree's own.
    """

    level: int
    index: int
    count: int
    first: int
    rows: int
    memory: str = ""

    @property
    def name(self) -> str:
        memory = f"{self.memory}-" if self.memory else ""
        return f"level-{self.level}-{memory}{self.index:05}-of-{self.count:05}.safetensors"

    @property
    def metadata(self) -> dict[str, str]:
        """What its header says of its place, so that a shard under a wrong name is noticed."""
        return {"format": "mlx", "level": str(self.level), "first_cluster": str(self.first)}


def shards(config: MemoryConfig, level: int) -> tuple[Shard, ...]:
    """The shards of ``level`` in the order of their clusters; none if its rank is 0.

    Raises:
        ConfigError: one block alone is too large for a shard, or there are too many shards.
    """
    if config.ranks[level - 1] == 0:
        return ()
    size = config.stored_size(level)
    most = MAX_SHARD_SIZE // size
    if most == 0:
        raise ConfigError(
            f"memory config: a block of level {level} has {size} numbers; a shard holds at most "
            f"{MAX_SHARD_SIZE}, use a smaller rank"
        )
    found = _of_memory(config, level, "", range(config.branching), most)
    for name, roots in config.added_roots().items():
        found += _of_memory(config, level, name, roots, most)
    return tuple(found)


def _of_memory(
    config: MemoryConfig, level: int, memory: str, roots: range, most: int
) -> list[Shard]:
    """The shards of the subtrees below some clusters of level 1; at most ``most`` rows in each."""
    # A subtree (all of level 1) is cut into pieces of equal rows, the last maybe smaller.
    below = config.branching ** (level - 1)
    subtrees, rows = (1, len(roots)) if level == 1 else (len(roots), below)
    pieces = -(-rows // most)
    piece = -(-rows // pieces)
    starts = range(0, rows, piece)
    count = subtrees * len(starts)
    if count > MAX_SHARDS:
        raise ConfigError(
            f"memory config: level {level} would have {count} shards; at most {MAX_SHARDS}, use a "
            "smaller branching"
        )
    return [
        Shard(
            level,
            index=subtree * len(starts) + number,
            count=count,
            first=roots.start * below + subtree * rows + start,
            rows=min(piece, rows - start),
            memory=memory,
        )
        for subtree in range(subtrees)
        for number, start in enumerate(starts)
    ]


def expected_files(config: MemoryConfig) -> list[str]:
    """Names of the files that a bank of ``config`` needs, apart from the manifest."""
    names = [shard.name for level in config.memory_levels for shard in shards(config, level)]
    return [CONFIG, GENERIC, *names, *(added_tree(one.name) for one in config.added)]


def added_tree(memory: str) -> str:
    """Name of the file with the centroids of an added memory."""
    return f"tree-{memory}.safetensors"


def is_added_tree(name: str) -> bool:
    """Whether a file holds the centroids of an added memory, by its name."""
    return _ADDED_TREE.fullmatch(name) is not None


def check_header(
    header: Header,
    config: MemoryConfig,
    path: Path,
    shape: tuple[int, ...],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Raise FormatError where a file's header contradicts the config or the file's place."""
    if header.dtype != config.stored_dtype:
        raise FormatError(
            f"{path}: holds {header.dtype}, but config.json says dtype {config.stored_dtype}; "
            "download the bank again, or convert it"
        )
    if header.shape != shape:
        raise FormatError(
            f"{path}: shape is {header.shape}, but config.json (ranks {list(config.ranks)}, "
            f"branching {config.branching}) asks for {shape}; download the bank again"
        )
    for key, value in (metadata or {}).items():
        if key != "format" and header.metadata.get(key) != value:
            found = str(header.metadata.get(key))[:40]
            raise FormatError(
                f"{path}: its metadata says {key} {found!r}, its name {value!r}; the file is not "
                "where it belongs, download the bank again"
            )


def level_of(name: str) -> int | None:
    """The level of a level file by its name; None for any other name."""
    found = _LEVEL_FILE.fullmatch(name)
    return int(found[1]) if found and len(found[1]) < 5 else None
