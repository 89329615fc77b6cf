"""MemoryBank: an open bank, from which the blocks on a path are fetched.

Notable:
- A fetch brings the blocks of all levels into one slot (``slots``), joined as the model wants them:
  one ``preadv`` per level straight into the memory that is computed from. The files are opened once
  and stay open.
- Three tiers (``tiers``): resident levels, a cache of blocks fetched before, the disk. The first
  two stay under one budget of bytes together.
- A bank belongs to the thread that opens it: MLX arrays are made on the thread that calls. All that
  reads or changes what it holds refuses any other.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..errors import FormatError
from ..owner import Owner
from .address import check_block, check_path
from .blocked import removed_error
from .cache import BlockCache
from .fill import Filler, Request, Step
from .inspect import describe, level_bytes
from .journal import unfinished
from .parts import Part
from .prefetch import Prefetch, Prefetcher
from .reader import BlockReader
from .report import BlockReport, FetchedMemory, FetchReport, Loan
from .slots import GENERIC_KEY, ZEROS, Key, Slot, SlotPool, split
from .stored import StoredLayout
from .tiers import Tiers, plan_tiers
from .verify import verify_bank


class MemoryBank:
    """An open memory bank. Made by :meth:`open`; a context manager.

    Attributes:
        config: the bank's :class:`MemoryConfig`.
        folder: the memory folder.
        revision: the revision of its manifest.
        part: the part of the bank that is open.
        tiers: what is held in memory, and why.
        memory_budget: bytes that resident and cached blocks may take together. The buffers that are
            computed from are not counted: one fetched memory for each in use.
        uses: how often each block, as (level, cluster), was on a path that was fetched.

    Its methods raise ThreadError in any other thread than the one that opened it.
    """

    def __init__(self, reader: BlockReader, tiers: Tiers, check_blocks: bool = False) -> None:
        self._owner = Owner(f"{reader.folder}: the bank")
        self.folder = reader.folder
        self.config = reader.config
        self.revision = reader.manifest.revision
        self.part = reader.part
        self.tiers = tiers
        self.memory_budget = tiers.budget
        self.uses: Counter[tuple[int, int]] = Counter()
        self._reader = reader
        self._layout = StoredLayout(reader.config)
        self._filler = Filler(reader, self._layout, check_blocks)
        self._pool = SlotPool(self._layout)
        self._prefetcher = Prefetcher(self._filler, self._pool)
        self._resident: dict[int, dict[int, np.ndarray]] = {}  # level -> shard -> (rows, bytes)
        self._cache = BlockCache(tiers.cache)
        self._blocked: set[tuple[int, int]] = set(reader.blocked)
        self._closed = False

    # ---- opening and closing -----------------------------------------------------------

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        memory_budget: int | None = None,
        tiers: Mapping[int, str] | str | None = None,
        folders: Mapping[int, str | Path] | None = None,
        part: Part | None = None,
        blocked: Iterable[tuple[int, int]] = (),
        check_blocks: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> MemoryBank:
        """Open the bank in ``folder`` (the ``memory/`` folder of a model).

        The config, the manifest, and the size and header of every file are checked; the
        checksums of blocks are not (:meth:`verify` does that, and ``check_blocks``). Nothing is
        written, so the folder may be on a disk that is read-only.

        Args:
            folder: the folder that holds ``config.json`` and ``manifest.json``.
            memory_budget: bytes that resident and cached blocks may take together; see
                ``plan_tiers``.
            tiers: for some levels, or for all, "resident", "cached" or "disk"; see ``plan_tiers``
                for the others.
            folders: for levels whose files lie elsewhere (another disk), their folder.
            part: the part that is wanted; all other blocks are absent and read as zeros.
            blocked: pairs (level, cluster) that are blocked from the start, beside those that
                ``blocked.json`` names.
            check_blocks: compare each block with its checksum when it is first read, and refuse
                one that holds NaN or infinite numbers. Costs a pass over each block, once.
            progress: called with (bytes in all, bytes read since the call before) while resident
                levels are read.

        Raises:
            FormatError, ConfigError: a file is missing or wrong, or contradicts another one.
            BudgetError: the budget cannot hold the resident levels and one block beside them.
            PathError: a level or block that was named does not exist.
        """
        places = {level: _folder(place) for level, place in (folders or {}).items()}
        reader = BlockReader(_folder(folder), places, part)
        return cls.of(
            reader,
            memory_budget=memory_budget,
            tiers=tiers,
            blocked=blocked,
            check_blocks=check_blocks,
            progress=progress,
        )

    @classmethod
    def of(
        cls,
        reader: BlockReader,
        *,
        memory_budget: int | None = None,
        tiers: Mapping[int, str] | str | None = None,
        blocked: Iterable[tuple[int, int]] = (),
        check_blocks: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> MemoryBank:
        """A bank whose files are open already; the rest as :meth:`open`. It closes the reader."""
        try:
            present = level_bytes(reader)
            bank = cls(
                reader, plan_tiers(reader.config, memory_budget, tiers, present), check_blocks
            )
            for pair in blocked:
                bank.block(*check_block(bank.config, pair))
            total = sum(present[level] for level in bank.resident_levels)
            report = partial(progress, total) if progress else lambda count: None
            for level in bank.resident_levels:
                bank._load_level(level, report)
        except BaseException:
            reader.close()
            raise
        return bank

    def _load_level(self, level: int, progress: Callable[[int], None]) -> None:
        held = self._resident[level] = {}
        for index, shard in enumerate(self._reader.shards(level)):
            if not self.part.has_shard(self.config, shard):
                continue
            rows = self._reader.stored_shard(level, index)
            held[index] = rows.reshape(len(rows), -1).view(np.uint8)
            if self._filler.checks:
                for row, block in enumerate(held[index]):
                    self._filler.check_stored(level, shard.first + row, [memoryview(block)], block)
            progress(rows.nbytes)

    def close(self) -> None:
        """Close the files and drop the blocks held. A closed bank cannot be used again."""
        self._owner.check()  # a read that is under way would find another file under its number
        self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._prefetcher.close()
        self._filler.close()
        self._reader.close()
        self._resident.clear()
        self._cache.clear()
        self._pool.clear()

    def __enter__(self) -> MemoryBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the end of the interpreter modules may be gone already, and files are closed anyway.
        # Whatever thread this is, no other has the bank any more.
        if not getattr(self, "_closed", True) and not ending():
            self._close()

    def _check_open(self) -> None:
        self._owner.check()
        if self._closed:
            raise FormatError(f"{self.folder}: the bank was closed; open it again")

    # ---- fetching ----------------------------------------------------------------------

    def fetch(self, path: Sequence[int], blocked: Iterable[tuple[int, int]] = ()) -> FetchedMemory:
        """Fetch the blocks on ``path``.

        Args:
            path: one cluster per level, also for levels of rank 0: p ids, each counted from 0
                within its level, each a child of the one before (parent of i is i // k).
            blocked: pairs (level, cluster) that are blocked for this fetch alone, beside those that
                are :attr:`blocked` for all.

        Raises:
            PathError: the path is not one of the tree, or a block to be blocked does not exist.
            FormatError: a file was truncated or cannot be read. The bank can be used on.
        """
        return self._fetch(self._request(path, self._blocked_with(blocked)))

    def fetch_many(
        self, paths: Sequence[Sequence[int]], blocked: Iterable[tuple[int, int]] = ()
    ) -> list[FetchedMemory]:
        """Fetch the memories of a batch; each distinct block is read once.

        Args:
            paths, blocked: as in :meth:`fetch`.

        Returns:
            One memory for each path. Equal paths share one buffer, which is free when all of them
            were released.

        Raises:
            as :meth:`fetch`; nothing is kept then.
        """
        off = self._blocked_with(blocked)
        requests = [self._request(path, off) for path in paths]
        places: dict[tuple[int, Key], Slot] = {}
        unused: list[Slot] = []  # kept until the end, for the blocks that they hold
        distinct: dict[tuple[Any, ...], FetchedMemory] = {}
        results: list[FetchedMemory] = []
        try:
            for request in requests:
                name = tuple(request.clusters.values())
                if name in distinct:
                    results.append(distinct[name].share())
                else:
                    distinct[name], slot = self._fill(request, places)
                    results.append(distinct[name])
                    if not distinct[name].lent:
                        unused.append(slot)
        except BaseException:
            for memory in results:
                memory.release()
            raise
        finally:
            for slot in unused:
                self._pool.give_back(slot)
        return results

    def generic(self) -> FetchedMemory:
        """The generic memory, in as many blocks as a fetched memory; ``cluster`` is None."""
        self._check_open()
        levels = self.config.memory_levels
        keys = dict.fromkeys(levels, GENERIC_KEY)
        return self._fetch(Request(dict.fromkeys(levels), keys))

    def prefetch(self, path: Sequence[int]) -> Prefetch:
        """Begin to read the blocks on ``path`` in the background; the fetch of it finds them there.

        Memories in use are not touched. One path at a time: a newer prefetch takes the place of an
        older one, and a fetch of another path cancels it.

        Raises:
            PathError: the path is not one of the tree.
        """
        keys = self._request(path, self._blocked, count=False).keys
        if (running := self._prefetcher.same(keys)) is not None:
            return running
        self._prefetcher.drop()
        slot = self._pool.take(keys)
        return self._prefetcher.start(path, keys, slot, self._plan(slot, keys, {}))

    def _blocked_with(self, more: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
        pairs = {check_block(self.config, pair) for pair in more}
        return self._blocked | pairs if pairs else self._blocked

    def _request(
        self, path: Sequence[int], blocked: set[tuple[int, int]], count: bool = True
    ) -> Request:
        self._check_open()
        ids = check_path(self.config, path)
        clusters = {level: ids[level - 1] for level in self.config.memory_levels}
        keys: dict[int, Key] = {}
        for level, cluster in clusters.items():
            if count:
                self.uses[level, cluster] += 1
            pair = level, cluster
            gone = pair in blocked or pair in self.removed
            zeros = gone or not self._reader.has(level, cluster)
            keys[level] = ZEROS if zeros else cluster
        off = frozenset(level for level, cluster in clusters.items() if (level, cluster) in blocked)
        return Request(clusters, keys, off)

    def _fetch(self, request: Request) -> FetchedMemory:
        memory, slot = self._fill(request, {})
        if not memory.lent:
            self._pool.give_back(slot)
        return memory

    def _fill(
        self, request: Request, places: dict[tuple[int, Key], Slot]
    ) -> tuple[FetchedMemory, Slot]:
        """Bring a memory into a slot, which the memory lends or, if it does not, nobody uses.

        Args:
            places: slots that hold blocks of this batch already; grows.
        """
        start = perf_counter()
        ahead = self._prefetcher.claim(request.keys)
        slot = self._pool.take(request.keys) if ahead is None else ahead.slot
        try:
            steps = self._plan(slot, request.keys, places)
            self._filler.fill(slot, steps)
            joined = slot.joined()
        except BaseException:
            self._pool.give_back(slot)
            raise
        for step in steps:
            if ahead is not None and step.source == "kept" and step.level in ahead.levels:
                step.source = "prefetched"
            if step.source == "disk" and self.tiers.of[step.level] != "disk":
                self._keep(slot, step)
            places[step.level, step.key] = slot
        report = FetchReport([self._report(request, step) for step in steps])
        loan = None
        if slot.computed_from:
            loan = Loan(partial(self._pool.give_back, slot), self._owner)
        report.ms = (perf_counter() - start) * 1e3
        return FetchedMemory(joined, report, partial(split, self._layout), loan), slot

    def _plan(
        self, slot: Slot, keys: Mapping[int, Key], places: Mapping[tuple[int, Key], Slot]
    ) -> list[Step]:
        """How each level's block comes into ``slot``."""
        steps = []
        for level, key in keys.items():
            place = places.get((level, key))
            if slot.held.get(level) == key:
                step = Step(level, key, "kept")
            elif key == ZEROS:
                step = Step(level, key, "zeros")
            elif place is not None and place.held.get(level) == key:
                step = Step(level, key, "batch", place)
            elif level in self._resident and isinstance(key, int):
                shard, row = self._reader.locate(level, key)
                step = Step(level, key, "resident", self._resident[level][shard][row])
            elif (block := self._cache.get((level, key))) is not None:
                step = Step(level, key, "cached", block)
            else:
                step = Step(level, key, "disk")
            steps.append(step)
        return steps

    def _keep(self, slot: Slot, step: Step) -> None:
        """Hold a block that was read in the cache."""
        nbytes = self._layout.block_bytes(step.level)
        if nbytes <= self._cache.budget:
            self._cache.make_room(nbytes)
            block = self._layout.take(slot.bytes, step.level)
            self._cache.put((step.level, step.key), block, nbytes)

    def _report(self, request: Request, step: Step) -> BlockReport:
        cluster = request.clusters[step.level]
        if step.key != ZEROS:
            nbytes = self._layout.block_bytes(step.level)
            return BlockReport(step.level, cluster, nbytes, step.ms, step.source)
        blocked = step.level in request.blocked
        if (step.level, cluster) in self.removed:
            source = "removed"
        else:
            source = "blocked" if blocked else "absent"
        return BlockReport(step.level, cluster, 0, step.ms, source, blocked)

    # ---- blocking ----------------------------------------------------------------------

    @property
    def blocked(self) -> frozenset[tuple[int, int]]:
        """The blocked blocks, as pairs (level, cluster)."""
        return frozenset(self._blocked)

    @property
    def removed(self) -> frozenset[tuple[int, int]]:
        """The blocks whose numbers are gone (``bank remove``), as pairs (level, cluster)."""
        return self._reader.blocked.removed

    def block(self, level: int, cluster: int) -> None:
        """Block one block: it reads as zeros until :meth:`unblock`; nothing on disk changes.

        Raises:
            PathError: there is no such block.
        """
        self._owner.check()
        key = check_block(self.config, (level, cluster))
        self._blocked.add(key)
        self._cache.discard(key)

    def unblock(self, level: int, cluster: int) -> None:
        """Undo :meth:`block`; does nothing if the block is not blocked.

        Raises:
            PathError: there is no such block, or it was removed.
        """
        self._owner.check()
        key = check_block(self.config, (level, cluster))
        if key in self.removed and key not in self._blocked:
            raise removed_error(self.folder, *key)
        self._blocked.discard(key)

    # ---- looking -----------------------------------------------------------------------

    def file_name(self, name: str) -> str:
        """The name that a file of the bank has now in its folder: another than that of the format
        while an edit comes into force."""
        return self._reader.real_name(name)

    def verify(self, progress: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
        """Read everything again and compare it with the manifest and the checksums of blocks.

        Args:
            progress: called with the number of bytes read since the call before.

        Returns:
            For each file of the part that is open ``{"file", "bytes", "sha256", "ok": True}``.

        Raises:
            FormatError: at the first file that is missing or altered, naming it, or at the first
                block that holds NaN or infinite numbers.
        """
        self._check_open()
        return verify_bank(self._reader, progress)

    @property
    def resident_levels(self) -> tuple[int, ...]:
        """Levels that are held in memory as a whole."""
        return self.tiers.resident

    @property
    def bytes_held(self) -> int:
        """Bytes of the resident and cached blocks."""
        self._owner.check()
        held = sum(rows.nbytes for shards in self._resident.values() for rows in shards.values())
        return held + self._cache.bytes

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the files of the part that is open, as the manifest lists them."""
        return sum(self._reader.manifest.files[name].bytes for name in self._reader.listed)

    @property
    def slots_made(self) -> int:
        """How many buffers for a fetched memory were made so far."""
        return self._pool.made

    def inspect(self) -> dict[str, Any]:
        """What the bank is, and a table with one row per level; see ``inspect.describe``.

        Beside that ``removed`` (pairs; in each row how many), and ``removal_unfinished``: whether
        what was removed is still on the disk, since the edit was stopped.
        """
        self._check_open()
        found = describe(self._reader, self.tiers, self._blocked, self.bytes_held)
        for row in found["levels"]:
            row["removed"] = sum(level == row["level"] for level, _ in self.removed)
        found["removed"] = [list(pair) for pair in sorted(self.removed)]
        found["removal_unfinished"] = unfinished(self.folder)
        return found


def _folder(place: str | Path) -> Path:
    folder = Path(place).expanduser()
    if not os.path.isdir(folder):  # False, not an error, where the disk has gone
        raise FormatError(f"{folder}: no such folder; expected the memory folder of a model")
    return folder
