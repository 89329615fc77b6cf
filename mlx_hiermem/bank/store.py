"""MemoryBank: an open bank, from which the blocks on a path are fetched.

Notable:
- One ``preadv`` per level and fetch, straight into a buffer of the block's size. The files
  are opened once and stay open, and a level file is never read as a whole unless its level is
  resident.
- Three tiers: resident levels, a cache of blocks fetched before, the disk. The first two stay
  under one budget of bytes together.
- A bank belongs to one thread: MLX arrays are made on the thread that calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import FormatError
from .address import check_cluster, check_level, check_pair, check_path
from .cache import BlockCache
from .layout import expected_files
from .manifest import check_listed, verify_files
from .reader import BlockReader
from .report import BlockReport, FetchedMemory, FetchReport
from .tiers import plan_tiers

_MLX = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


class MemoryBank:
    """An open memory bank. Made by :meth:`open`; a context manager.

    Attributes:
        config: the bank's :class:`MemoryConfig`.
        folder: the memory folder.
        revision: the revision of its manifest.
        memory_budget: bytes that resident and cached blocks may take together.
        resident_levels: levels that are held in memory as a whole.
    """

    def __init__(self, reader: BlockReader) -> None:
        self.folder = reader.folder
        self.config = reader.config
        self.revision = reader.manifest.revision
        self.memory_budget = 0
        self.resident_levels: tuple[int, ...] = ()
        self._reader = reader
        self._resident: dict[int, list[mx.array]] = {}  # (rows, s_l) for each shard
        self._cache = BlockCache(0)
        self._blocked: set[tuple[int, int]] = set()
        self._closed = False

    # ---- opening and closing -----------------------------------------------------------

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        memory_budget: int | None = None,
        resident: Iterable[int] | None = None,
        blocked: Iterable[tuple[int, int]] = (),
    ) -> MemoryBank:
        """Open the bank in ``folder`` (the ``memory/`` folder of a model).

        The config, the manifest, and the size and header of every file are checked; the
        checksums are not (:meth:`verify` does that).

        Args:
            folder: the folder that holds ``config.json`` and ``manifest.json``.
            memory_budget: bytes that resident and cached blocks may take together. None: 256
                MiB (or one fetched memory, if larger) of cache beside the resident levels.
            resident: levels to hold in memory. None: with a budget as many levels from level
                1 on as fit in half of it; without one level 1 if it has at most 256 MiB.
            blocked: pairs (level, cluster) that are blocked from the start.

        Raises:
            FormatError, ConfigError: a file is missing or wrong, or contradicts another one.
            BudgetError: the budget cannot hold the resident levels and one block beside them.
            PathError: a resident level or a blocked block does not exist.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FormatError(f"{folder}: no such folder; expected the memory folder of a model")
        reader = BlockReader(folder)
        bank = cls(reader)
        try:
            config = reader.config
            tiers = plan_tiers(config, memory_budget, resident)
            bank.memory_budget = tiers.budget
            bank.resident_levels = tiers.resident
            bank._cache = BlockCache(tiers.cache)
            for pair in blocked:
                bank.block(*check_pair(pair))
            for level in tiers.resident:
                bank._load_level(level)
        except BaseException:
            bank.close()
            raise
        return bank

    def _load_level(self, level: int) -> None:
        shards = range(len(self._reader.shards(level)))
        arrays = [self._array(self._reader.stored_shard(level, index)) for index in shards]
        mx.eval(arrays)
        self._resident[level] = arrays

    def close(self) -> None:
        """Close the files and drop the blocks held. A closed bank cannot be used again."""
        self._closed = True
        self._reader.close()
        self._resident.clear()
        self._cache.clear()

    def __enter__(self) -> MemoryBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise FormatError(f"{self.folder}: the bank was closed; open it again")

    # ---- fetching ----------------------------------------------------------------------

    def fetch(self, path: Sequence[int]) -> FetchedMemory:
        """Fetch the blocks on ``path``.

        Args:
            path: one cluster per level, also for levels of rank 0: p ids, each counted from 0
                within its level, each a child of the one before (parent of i is i // k).

        Raises:
            PathError: the path is not one of the tree.
            FormatError: a file was truncated or cannot be read.
        """
        self._check_open()
        ids = check_path(self.config, path)
        return self._collect([(level, ids[level - 1]) for level in self.config.memory_levels])

    def generic(self) -> FetchedMemory:
        """The generic memory, in as many blocks as a fetched memory; ``cluster`` is None."""
        self._check_open()
        return self._collect([(level, None) for level in self.config.memory_levels])

    def _collect(self, keys: list[tuple[int, int | None]]) -> FetchedMemory:
        blocks, reports = [], []
        for level, cluster in keys:
            start = perf_counter()
            block, source = self._block(level, cluster)
            mx.eval(block)
            ms = (perf_counter() - start) * 1e3
            blocked = source == "blocked"
            nbytes = 0 if blocked else self.config.block_bytes(level)
            blocks.append(block)
            reports.append(BlockReport(level, cluster, nbytes, ms, source, blocked))
        return FetchedMemory(blocks, FetchReport(reports))

    def _block(self, level: int, cluster: int | None) -> tuple[mx.array, str]:
        size = self.config.block_size(level)
        if (level, cluster) in self._blocked:
            return mx.zeros((size,), _MLX[self.config.dtype]), "blocked"
        if cluster is not None and level in self._resident:
            shard, row = self._reader.locate(level, cluster)
            return self._resident[level][shard][row], "resident"
        block = self._cache.get((level, cluster))
        if block is not None:
            return block, "cached"
        nbytes = self.config.block_bytes(level)
        keep = nbytes <= self._cache.budget
        if keep:
            self._cache.make_room(nbytes)
        block = self._array(self._reader.stored(level, cluster))
        mx.eval(block)
        if keep:
            self._cache.put((level, cluster), block, nbytes)
        return block, "disk"

    def _array(self, stored: np.ndarray) -> mx.array:
        array = mx.array(stored)
        return array.view(mx.bfloat16) if self.config.dtype == "bfloat16" else array

    # ---- blocking ----------------------------------------------------------------------

    @property
    def blocked(self) -> frozenset[tuple[int, int]]:
        """The blocked blocks, as pairs (level, cluster)."""
        return frozenset(self._blocked)

    def block(self, level: int, cluster: int) -> None:
        """Block one block: it reads as zeros until :meth:`unblock`; nothing on disk changes.

        Raises:
            PathError: there is no such block.
        """
        key = self._key(level, cluster)
        self._blocked.add(key)
        self._cache.discard(key)

    def unblock(self, level: int, cluster: int) -> None:
        """Undo :meth:`block`; does nothing if the block is not blocked.

        Raises:
            PathError: there is no such block.
        """
        self._blocked.discard(self._key(level, cluster))

    def _key(self, level: int, cluster: int) -> tuple[int, int]:
        level = check_level(self.config, level)
        return level, check_cluster(self.config, level, cluster)

    # ---- looking -----------------------------------------------------------------------

    def verify(self, progress: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
        """Hash every file of the manifest again.

        Args:
            progress: called with the number of bytes read since the call before.

        Returns:
            For each file ``{"file", "bytes", "sha256", "ok": True}``.

        Raises:
            FormatError: at the first file that is missing or altered, naming it.
        """
        self._check_open()
        check_listed(self.folder, self._reader.manifest, expected_files(self.config))
        return verify_files(self.folder, self._reader.manifest, progress)

    @property
    def bytes_held(self) -> int:
        """Bytes of the resident and cached blocks."""
        held = sum(self._level_bytes(level) for level in self.resident_levels)
        return held + self._cache.bytes

    def _level_bytes(self, level: int) -> int:
        return self.config.block_bytes(level) * self.config.clusters(level)

    def inspect(self) -> dict[str, Any]:
        """What the bank is, and a table with one row per level, as a mapping for JSON."""
        self._check_open()
        config = self.config
        table = []
        for level, rank in enumerate(config.ranks, 1):
            resident = "resident" if level in self.resident_levels else "disk"
            table.append(
                {
                    "level": level,
                    "clusters": config.clusters(level),
                    "rank": rank,
                    "block_size": config.block_size(level),
                    "block_bytes": config.block_bytes(level),
                    "total_bytes": self._level_bytes(level),
                    "dtype": config.dtype,
                    "shards": len(self._reader.shards(level)) if rank else 0,
                    "tier": resident if rank else "none",
                    "blocked": sum(one == level for one, _ in self._blocked),
                }
            )
        return {
            "folder": str(self.folder),
            "revision": self.revision,
            "format_version": config.format_version,
            "kind": config.kind,
            "branching": config.branching,
            "fetch_size": config.fetch_size(),
            "bank_size": config.bank_size(),
            "memory_budget": self.memory_budget,
            "bytes_held": self.bytes_held,
            "levels": table,
        }
