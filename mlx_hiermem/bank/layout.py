"""The files of a bank (docs/format.md): which there are, what each holds, how they are written.

Notable:
- Row i of level l is the whole block W[l, i] of s_l numbers, contiguous (the paper's
  W[l, i] in R^{s_l}), so that a fetch is one read per level.
- Levels 2 and deeper are cut into one shard per level-1 subtree; a shard of 2^31 numbers or
  more is cut further, since Metal cannot hold such a tensor.
- Writing streams: a level is never held in memory, and every file appears whole or not at all;
  the manifest comes last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import MemoryConfig
from ..errors import ConfigError, FormatError
from ..files import AtomicFile, sync_folder
from .dtypes import to_storage
from .header import Header, build_header
from .manifest import MANIFEST, FileEntry, write_manifest

CONFIG = "config.json"
GENERIC = "generic.safetensors"
#: Names of the tensors in a level file and in the file of the generic memory.
BLOCKS, GENERIC_TENSOR = "blocks", "generic"

#: Most numbers in one shard (mlx#3327).
MAX_SHARD_SIZE = 2**31 - 1
#: Most shards of one level: as many as five digits number.
MAX_SHARDS = 99_999

# Rows of an array that is given whole are converted and written in pieces of about this size.
_CHUNK_BYTES = 1 << 26
_LEVEL_FILE = re.compile(r"\.?level-\d+-\d+-of-\d+\.safetensors(\.partial)?")


@dataclass(frozen=True)
class Shard:
    """One level file: ``rows`` clusters of ``level`` from cluster ``first`` on."""

    level: int
    index: int
    count: int
    first: int
    rows: int

    @property
    def name(self) -> str:
        return f"level-{self.level}-{self.index:05}-of-{self.count:05}.safetensors"

    @property
    def metadata(self) -> dict[str, str]:
        """What its header says of its place, so that a shard under a wrong name is noticed."""
        return {"format": "mlx", "level": str(self.level), "first_cluster": str(self.first)}


def shards(config: MemoryConfig, level: int) -> tuple[Shard, ...]:
    """The shards of ``level`` in the order of their clusters; none if its rank is 0.

    Raises:
        ConfigError: one block alone is too large for a shard, or there are too many shards.
    """
    size = config.block_size(level)
    if size == 0:
        return ()
    most = MAX_SHARD_SIZE // size
    if most == 0:
        raise ConfigError(
            f"memory config: a block of level {level} has {size} numbers; a shard holds at most "
            f"{MAX_SHARD_SIZE}, use a smaller rank"
        )
    # A subtree (all of level 1) is cut into pieces of equal rows, the last maybe smaller.
    subtrees = 1 if level == 1 else config.branching
    rows = config.clusters(level) // subtrees
    pieces = -(-rows // most)
    piece = -(-rows // pieces)
    starts = range(0, rows, piece)
    count = subtrees * len(starts)
    if count > MAX_SHARDS:
        raise ConfigError(
            f"memory config: level {level} would have {count} shards; at most {MAX_SHARDS}, use a "
            "smaller branching"
        )
    return tuple(
        Shard(
            level,
            index=subtree * len(starts) + number,
            count=count,
            first=subtree * rows + start,
            rows=min(piece, rows - start),
        )
        for subtree in range(subtrees)
        for number, start in enumerate(starts)
    )


def expected_files(config: MemoryConfig) -> list[str]:
    """Names of the files that a bank of ``config`` needs, apart from the manifest."""
    names = [shard.name for level in config.memory_levels for shard in shards(config, level)]
    return [CONFIG, GENERIC, *names]


def check_header(
    header: Header,
    config: MemoryConfig,
    path: Path,
    shape: tuple[int, ...],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Raise FormatError where a file's header contradicts the config or the file's place."""
    if header.dtype != config.dtype:
        raise FormatError(
            f"{path}: holds {header.dtype}, but config.json says dtype {config.dtype}; download "
            "the bank again, or convert it"
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
            or a storage array (``dtypes.STORAGE``) of the config's dtype.
        generic: the generic memory, (fetch_size,): one block of each level with memory, in the
            order of the levels. Float32, or a storage array.

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
            shape = (config.clusters(level), config.block_size(level))
            if rows.shape != shape:
                raise FormatError(
                    f"{folder}: level {level} is given as {rows.shape}, expected {shape}"
                )
    generic = np.asarray(generic)
    if generic.shape != (config.fetch_size(),):
        raise FormatError(
            f"{folder / GENERIC}: the generic memory is given as {generic.shape}, expected "
            f"({config.fetch_size()},)"
        )
    generic = to_storage(generic, config.dtype)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise FormatError(f"{folder}: cannot be written ({error.strerror})") from None
    known: dict[str, FileEntry] = {}
    for level, parts in plan.items():
        source = _Rows(_pieces(levels[level]), folder, level)
        for shard in parts:
            known[shard.name] = write_shard(folder, config, shard, source.take(shard.rows))
        source.finish(config.clusters(level))
    known[GENERIC] = _write_tensor(
        folder, GENERIC, GENERIC_TENSOR, config.dtype, generic.shape, {"format": "mlx"}, [generic]
    )
    with AtomicFile(folder, CONFIG) as file:
        file.write((json.dumps(config.to_dict(), indent=2) + "\n").encode())
    known[CONFIG] = FileEntry(file.size, file.sha256)
    for path in list(folder.iterdir()):  # what another bank, or a killed write, has left
        if _LEVEL_FILE.fullmatch(path.name) and path.name not in known:
            path.unlink(missing_ok=True)
    return write_manifest(folder, known).revision


def write_shard(
    folder: Path, config: MemoryConfig, shard: Shard, chunks: Iterable[np.ndarray]
) -> FileEntry:
    """Write one level file from a stream of rows; (n, s_l) each, float32 or storage arrays.

    Raises:
        FormatError: the rows are not ``shard.rows`` of s_l numbers, or cannot be written.
    """
    shape = (shard.rows, config.block_size(shard.level))
    return _write_tensor(folder, shard.name, BLOCKS, config.dtype, shape, shard.metadata, chunks)


def _write_tensor(
    folder: Path,
    name: str,
    tensor: str,
    dtype: str,
    shape: tuple[int, ...],
    metadata: Mapping[str, str],
    chunks: Iterable[np.ndarray],
) -> FileEntry:
    # The header can be written first because the shape is known before the first row.
    with AtomicFile(folder, name) as file:
        file.write(build_header(tensor, dtype, shape, metadata))
        rows = 0
        for chunk in chunks:
            if chunk.shape[1:] != shape[1:]:
                raise FormatError(
                    f"{folder / name}: given {chunk.shape} as rows, expected (rows, {shape[-1]})"
                )
            file.write(memoryview(np.ascontiguousarray(to_storage(chunk, dtype))).cast("B"))
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
