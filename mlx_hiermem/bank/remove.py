"""Removing blocks from a bank: their numbers are overwritten, on the disk too.

One edit puts zeros in their place (``edit``): a kill at any moment leaves the bank as it was or
without them. After that, before the old version of a level file is given up, the rows of removed
blocks are overwritten in it, so that they are not left in the free space of the disk. What that
cannot reach (copies, snapshots, the wear levelling of a disk), and what the rest of the model may
still know, is told in docs/removing.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import MemoryConfig
from ..errors import InputError
from .address import check_block, check_cluster
from .edit import BankEdit
from .journal import unfinished
from .reader import BlockReader

Pair = tuple[int, int]


@dataclass(frozen=True)
class Removal:
    """What is to be removed.

    Attributes:
        blocks: pairs (level, cluster) whose numbers go; those that are gone already are left out.
        clusters: all pairs that were named, also of levels without memory.
        bytes: of the blocks.
    """

    blocks: frozenset[Pair]
    clusters: frozenset[Pair]
    bytes: int

    @property
    def levels(self) -> dict[int, int]:
        """Level -> how many blocks."""
        found: dict[int, int] = {}
        for level, _ in sorted(self.blocks):
            found[level] = found.get(level, 0) + 1
        return found


def subtree(config: MemoryConfig, root: int) -> frozenset[Pair]:
    """All clusters at and below one of level 1, as pairs (level, cluster).

    Raises:
        PathError: level 1 has no such cluster.
    """
    root = check_cluster(config, 1, root)
    below = [config.branching ** (level - 1) for level in range(1, config.levels + 1)]
    return frozenset(
        (level, cluster)
        for level, width in enumerate(below, 1)
        for cluster in range(root * width, (root + 1) * width)
    )


def plan(
    reader: BlockReader,
    blocks: Iterable[Pair] = (),
    subtrees: Iterable[int] = (),
    again: bool = False,
) -> Removal:
    """What a removal would remove.

    Args:
        blocks: pairs (level, cluster).
        subtrees: clusters of level 1, each with all that is below it.
        again: whether all of it may have been removed before.

    Raises:
        PathError: there is no such block or cluster.
        InputError: nothing is named, or all of it was removed before.
    """
    config = reader.config
    clusters = {check_block(config, pair) for pair in blocks}
    for root in subtrees:
        clusters |= subtree(config, root)
    found = {(level, cluster) for level, cluster in clusters if level in config.memory_levels}
    if not found:
        raise InputError("no block is named; give --block LEVEL:CLUSTER or --subtree CLUSTER")
    rest = found - reader.blocked.removed
    if not rest and not again:
        raise InputError(
            f"{reader.folder}: nothing to remove: what was named has been removed already"
        )
    size = sum(config.block_bytes(level) for level, _ in rest)
    return Removal(frozenset(rest), frozenset(clusters), size)


def remove(
    folder: str | Path,
    blocks: Iterable[Pair] = (),
    subtrees: Iterable[int] = (),
    names: Callable[[Path, Collection[Pair]], bytes | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    step: Callable[[str], None] | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Remove blocks from the bank in ``folder``.

    Args:
        blocks, subtrees, again: as in :func:`plan`.
        names: given the folder and the clusters that were named, the new file of names, or None to
            keep it; the old one is overwritten like the blocks.
        progress, step: as in :class:`BankEdit`.

    Returns:
        ``{"folder", "revision", "revision_before", "blocks": pairs removed now, "bytes": of them,
        "levels": {level: how many}, "removed": all pairs that are removed, "names_changed"}``.

    Raises:
        PathError, InputError: as :func:`plan`.
        FormatError: the bank is damaged, cannot be written, or has links for files. Nothing has
            changed then, unless the text says that the edit is in force.
    """
    with BankEdit(folder, progress, step) as edit:
        before = edit.revision
        removal = plan(edit.reader, blocks, subtrees, again)
        edit.remove_blocks(removal.blocks)
        data = None if names is None else names(edit.folder, removal.clusters)
        if data is not None:
            edit.set_names(data, forget=True)
    return {
        "folder": str(edit.folder),
        "revision": edit.revision,
        "revision_before": before,
        "blocks": [list(pair) for pair in sorted(removal.blocks)],
        "bytes": removal.bytes,
        "levels": {str(level): count for level, count in removal.levels.items()},
        "removed": [list(p) for p in sorted(edit.reader.blocked.removed | removal.blocks)],
        "names_changed": data is not None,
    }


def finish(folder: str | Path) -> bool:
    """Bring a removal that was stopped to its end; whether there was one.

    Raises:
        FormatError: the bank is damaged or cannot be written.
    """
    if not unfinished(Path(folder)):
        return False
    with BankEdit(folder):
        return True
