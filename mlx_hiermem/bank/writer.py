"""Writing a bank.

Notable: it streams. A level is never held in memory, every file appears whole or not at all, and
the manifest comes last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ..config import MemoryConfig
from ..errors import FormatError
from ..files import AtomicFile, sync_folder
from . import journal
from .checksums import CHECKSUMS, Digests
from .dtypes import to_storage
from .header import build_header
from .layout import (
    BLOCKS,
    CONFIG,
    GENERIC,
    GENERIC_TENSOR,
    Shard,
    expected_files,
    is_added_tree,
    shards,
)
from .manifest import MANIFEST, FileEntry, write_manifest

# Rows of an array that is given whole are converted and written in pieces of about this size.
_CHUNK_BYTES = 1 << 26
_LEFT_BEHIND = re.compile(r"\.?level-\d+-(?:[a-z0-9-]{1,32}-)?\d+-of-\d+\.safetensors(\.partial)?")


def write_bank(
    folder: str | Path,
    config: MemoryConfig,
    levels: Mapping[int, Iterable[np.ndarray] | np.ndarray],
    generic: np.ndarray,
) -> str:
    """Write a whole bank into ``folder`` (the ``memory/`` folder of a model; made if missing).

    Files that are already there, such as ``tree.safetensors`` and those of an encoder, become
    part of the bank. A bank that is there is replaced: its manifest goes first, so that a
    write that does not come to its end leaves no folder that could be taken for a bank.

    Args:
        folder: where to write.
        config: must name the shape of its base anchor.
        levels: for each level with memory its rows in order, (clusters, s_l): one array, or an
            iterable of arrays (any number of rows, s_l), which is read as a stream. Float32,
            or a storage array (``dtypes.STORAGE``) of the config's dtype; of a quantised bank
            the stored bytes, (clusters, block bytes) uint8.
        generic: the generic memory, (fetch_size,): one block of each level with memory, in the
            order of the levels. Float32, or a storage array; stored bytes if quantised.

    Returns:
        The revision of the bank.

    Raises:
        FormatError: arrays do not have the shapes that the config asks for, or a file cannot
            be written. No manifest and no half-written file is left behind.
        ConfigError: the config names no base anchor, or a block is too large.
    """
    folder = Path(folder)
    if set(levels) != set(config.memory_levels):
        raise FormatError(
            f"{folder}: rows are given for levels {sorted(levels)}, but the config has memory at "
            f"levels {list(config.memory_levels)}"
        )
    plan = {level: shards(config, level) for level in config.memory_levels}
    for level, rows in levels.items():
        if isinstance(rows, np.ndarray):
            shape = (config.clusters(level), config.stored_size(level))
            if rows.shape != shape:
                raise FormatError(
                    f"{folder}: level {level} is given as {rows.shape}, expected {shape}"
                )
    generic = np.asarray(generic)
    size = sum(map(config.stored_size, config.memory_levels))
    if generic.shape != (size,):
        raise FormatError(
            f"{folder / GENERIC}: the generic memory is given as {generic.shape}, expected "
            f"({size},)"
        )
    generic = to_storage(generic, config.stored_dtype)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        journal.discard(folder)
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise FormatError(f"{folder}: cannot be written ({error.strerror})") from None
    known: dict[str, FileEntry] = {}
    digests = Digests(config)
    for level, parts in plan.items():
        source = _Rows(_pieces(levels[level]), folder, level)
        for shard in parts:
            known[shard.name] = write_shard(folder, config, shard, source.take(shard.rows), digests)
        source.finish(config.clusters(level))
    known[GENERIC] = write_generic(folder, config, generic, digests)
    known[CHECKSUMS] = digests.write(folder)
    known[CONFIG] = write_config(folder, config)
    expected = {*known, *expected_files(config)}
    for path in list(folder.iterdir()):  # what another bank, or a killed write, has left
        ours = _LEFT_BEHIND.fullmatch(path.name) or is_added_tree(path.name)
        if ours and path.name not in expected:
            path.unlink(missing_ok=True)
    return write_manifest(folder, known).revision


def write_shard(
    folder: Path,
    config: MemoryConfig,
    shard: Shard,
    chunks: Iterable[np.ndarray],
    digests: Digests | None = None,
    cached: bool = True,
) -> FileEntry:
    """Write one level file from a stream of rows; (n, s_l) each, float32 or storage arrays.

    Args:
        digests: takes the checksum of each row.
        cached: see ``AtomicFile``.

    Raises:
        FormatError: the rows are not ``shard.rows`` of s_l numbers, or cannot be written.
    """
    shape = (shard.rows, config.stored_size(shard.level))

    def stored() -> Iterator[np.ndarray]:
        for chunk in chunks:
            chunk = np.ascontiguousarray(to_storage(chunk, config.stored_dtype))
            if digests is not None:
                digests.add(shard.level, chunk)
            yield chunk

    dtype = config.stored_dtype
    place = shard.metadata
    return _write_tensor(folder, shard.name, BLOCKS, dtype, shape, place, stored(), cached)


def write_generic(
    folder: Path, config: MemoryConfig, generic: np.ndarray, digests: Digests
) -> FileEntry:
    """Write the generic memory, (fetch size,) storage array, and take its checksums."""
    digests.add_generic(generic)
    return _write_tensor(
        folder, GENERIC, GENERIC_TENSOR, config.stored_dtype, generic.shape, {"format": "mlx"},
        [generic],
    )  # fmt: skip


def write_config(folder: Path, config: MemoryConfig) -> FileEntry:
    """Write the config.json of a bank."""
    with AtomicFile(folder, CONFIG) as file:
        file.write((json.dumps(config.to_dict(), indent=2) + "\n").encode())
    return FileEntry(file.size, file.sha256)


def _write_tensor(
    folder: Path,
    name: str,
    tensor: str,
    dtype: str,
    shape: tuple[int, ...],
    metadata: Mapping[str, str],
    chunks: Iterable[np.ndarray],
    cached: bool = True,
) -> FileEntry:
    # The header can be written first because the shape is known before the first row.
    with AtomicFile(folder, name, cached) as file:
        file.write(build_header(tensor, dtype, shape, metadata))
        rows = 0
        for chunk in chunks:
            if chunk.shape[1:] != shape[1:]:
                raise FormatError(
                    f"{folder / name}: given {chunk.shape} as rows, expected (rows, {shape[-1]})"
                )
            file.write(memoryview(chunk).cast("B"))
            rows += len(chunk)
        if rows != shape[0]:
            raise FormatError(f"{folder / name}: given {rows} rows, expected {shape[0]}")
    return FileEntry(file.size, file.sha256)


def _pieces(rows: Iterable[np.ndarray] | np.ndarray) -> Iterator[np.ndarray]:
    if not isinstance(rows, np.ndarray):
        yield from rows
        return
    step = max(1, _CHUNK_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


class _Rows:
    """Cuts a stream of row chunks at the borders of the shards."""

    def __init__(self, chunks: Iterator[np.ndarray], folder: Path, level: int) -> None:
        self._chunks = chunks
        self._rest: np.ndarray | None = None
        self._where = f"{folder}: level {level}"
        self._taken = 0

    def _next(self) -> np.ndarray | None:
        chunk, self._rest = self._rest, None
        while chunk is None or len(chunk) == 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                return None
            if not isinstance(chunk, np.ndarray) or chunk.ndim != 2:
                found = getattr(chunk, "shape", type(chunk).__name__)
                raise FormatError(f"{self._where}: given {found}, expected arrays (rows, s_l)")
        return chunk

    def take(self, rows: int) -> Iterator[np.ndarray]:
        """The next ``rows`` rows, or fewer if the stream ends."""
        while rows and (chunk := self._next()) is not None:
            if len(chunk) > rows:
                chunk, self._rest = chunk[:rows], chunk[rows:]
            rows -= len(chunk)
            self._taken += len(chunk)
            yield chunk

    def finish(self, expected: int) -> None:
        """Raise FormatError if the stream has rows left."""
        if self._next() is not None:
            raise FormatError(f"{self._where}: given more rows than its {expected} clusters")
