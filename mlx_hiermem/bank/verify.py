"""Reading a whole bank again: every file against the manifest, every block against its checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import FormatError
from .checksums import Digests
from .files import read_exact
from .fill import check_block
from .layout import Shard, level_of
from .manifest import Manifest, check_sha256, check_size, verify_files
from .reader import BlockReader
from .slots import GENERIC_KEY
from .stored import StoredLayout

# Rows are read in pieces of about this size.
_CHUNK_BYTES = 1 << 26


def verify_bank(
    reader: BlockReader, progress: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """Hash every file of the manifest that is in the part that is open, and look at every block.

    Args:
        progress: called with the number of bytes read since the call before.

    Returns:
        For each file ``{"file", "bytes", "sha256", "ok": True}``.

    Raises:
        FormatError: at the first file that is missing or altered, naming it, or at the first block
            that does not have its checksum or holds what is not finite.
    """
    report = progress or (lambda count: None)
    files = reader.manifest.files
    others = {name: entry for name, entry in files.items() if level_of(name) is None}
    manifest = Manifest(others, reader.manifest.revision)
    results = verify_files(reader.folder, manifest, progress, reader.real_name)
    layout = StoredLayout(reader.config)
    for level in reader.config.memory_levels:
        block = reader.stored(level, None).view(np.uint8)
        check_block(reader, layout, level, GENERIC_KEY, [memoryview(block)], block)
    for level in reader.config.memory_levels:
        for index, shard in enumerate(reader.shards(level)):
            if reader.part.has_shard(reader.config, shard):
                results.append(_verify_shard(reader, layout, index, shard, report))
    return results


def compute_digests(reader: BlockReader, progress: Callable[[int], None] | None = None) -> Digests:
    """The checksums of all blocks of a whole bank, by reading them.

    Args:
        progress: called with the number of bytes read since the call before.

    Raises:
        FormatError: a file was truncated or cannot be read.
    """
    config = reader.config
    digests = Digests(config)
    for level in config.memory_levels:
        for cluster in range(config.clusters(level)):
            digests.add(level, reader.stored(level, cluster)[None])
            if progress is not None:
                progress(config.block_bytes(level))
    digests.add_generic(
        np.concatenate([reader.stored(level, None) for level in config.memory_levels])
    )
    return digests


def _verify_shard(
    reader: BlockReader,
    layout: StoredLayout,
    index: int,
    shard: Shard,
    report: Callable[[int], None],
) -> dict[str, Any]:
    """Verify the level file that is the level's ``index``-th."""
    entry = reader.manifest.files[shard.name]
    path = reader.place(shard.level) / shard.name
    # What is there now, not what was there when the bank was opened.
    fd, size, offset = reader.open_shard(shard.level, index)
    try:
        check_size(path, size, entry)
        digest = hashlib.sha256()
        failure: FormatError | None = None
        block_bytes = layout.block_bytes(shard.level)
        buffer = np.empty(max(offset, block_bytes * min(shard.rows, _rows(block_bytes))), np.uint8)
        position = 0
        while position < size:
            # First what is before the rows, then whole rows.
            count = (
                offset
                if position == 0
                else min(len(buffer) // block_bytes * block_bytes, size - position)
            )
            view = buffer[:count]
            read_exact(fd, memoryview(view), position, path)
            digest.update(view)
            report(count)
            if position and failure is None:
                first = shard.first + (position - offset) // block_bytes
                failure = _look(reader, layout, shard.level, first, view.reshape(-1, block_bytes))
            position += count
    finally:
        os.close(fd)
    check_sha256(path, digest.hexdigest(), entry)
    if failure is not None:
        raise failure
    return {"file": shard.name, "bytes": entry.bytes, "sha256": entry.sha256, "ok": True}


def _rows(block_bytes: int) -> int:
    return max(1, _CHUNK_BYTES // block_bytes)


def _look(
    reader: BlockReader, layout: StoredLayout, level: int, first: int, rows: np.ndarray
) -> FormatError | None:
    """What is wrong with the blocks (n, bytes) from cluster ``first`` on."""
    if reader.checksums is not None:
        found = b"".join(hashlib.sha256(row).digest() for row in rows)
        same = found == reader.checksums[f"level{level}"][first : first + len(rows)].tobytes()
    else:
        same = True
    if same and layout.finite(rows):
        return None
    for cluster, block in enumerate(rows, first):  # which one?
        try:
            check_block(reader, layout, level, cluster, [memoryview(block)], block)
        except FormatError as error:
            return error
    return None
