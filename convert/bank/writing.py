"""Writing a planned bank: shard by shard, in bounded memory, going on where a kill has stopped it.

Several level files are written at a time, each by a thread that reads, checks, hashes and writes it
chunk by chunk; so one can compute while another waits for the disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock

import numpy as np

from mlx_hiermem.bank.checksums import CHECKSUMS, Digests
from mlx_hiermem.bank.layout import CONFIG, GENERIC, Shard, shards
from mlx_hiermem.bank.manifest import FileEntry, write_manifest
from mlx_hiermem.bank.quantize import Packer
from mlx_hiermem.bank.writer import write_config, write_generic, write_shard
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import FormatError
from mlx_hiermem.quantization import Quantization

from ..resume import Journal
from .plan import BankPlan
from .rows import BlockRows

#: Level files that are written at a time, at most: more only wait for the disk.
MOST_WORKERS = 4

#: Called with the bytes of blocks that are written since the call before.
Progress = Callable[[int], None]


def stored_config(plan: BankPlan, packing: Quantization | None) -> MemoryConfig:
    """The config of the bank that is written."""
    return replace(plan.config, quantization=None if packing is None else packing.to_dict())


def write_planned(
    plan: BankPlan,
    memory: Path,
    journal: Journal,
    *,
    packing: Quantization | None = None,
    others: Mapping[str, FileEntry] | None = None,
    progress: Progress | None = None,
) -> tuple[MemoryConfig, str]:
    """Write a bank; files that the journal knows are left as they are.

    Args:
        plan: of the bank.
        memory: the ``memory/`` folder, which is there.
        journal: names its files ``memory/NAME``.
        packing: how the blocks are quantised.
        others: files of the folder that were written before, such as the tree.

    Returns:
        The config, and the revision.

    Raises:
        FormatError: a number is not finite, or a file cannot be read or written.
    """
    config = stored_config(plan, packing)
    rows, digests = BlockRows(plan), Digests(config)
    packer = None if packing is None else Packer(plan.config, packing)
    known: dict[str, FileEntry] = dict(others or {})
    every = [shard for level in config.memory_levels for shard in shards(config, level)]
    wanted = []
    for shard in every:
        if f"{memory.name}/{shard.name}" not in journal.done:
            wanted.append(shard)
        elif progress is not None:
            progress(shard.rows * config.block_bytes(shard.level))
    # The largest first: then none is left to one thread alone at the end.
    wanted.sort(key=lambda one: -one.rows * config.block_bytes(one.level))
    with closing(_Levels(rows, memory, config, packer, progress).write(wanted)) as written:
        for shard, entry, checksums in written:
            journal.add(f"{memory.name}/{shard.name}", entry, checksums.hex())
    for shard in every:
        entry, note = journal.done[f"{memory.name}/{shard.name}"]
        digests.add_digests(shard.level, bytes.fromhex(note))
        known[shard.name] = entry
    generic = rows.generic()
    if packer is not None:
        generic = _packed_generic(generic, plan.config, packer)
    known[GENERIC] = write_generic(memory, config, generic, digests)
    known[CHECKSUMS] = digests.write(memory)
    known[CONFIG] = write_config(memory, config)
    return config, write_manifest(memory, known).revision


class _Levels:
    """Writes level files, several at a time: each in a thread of its own."""

    def __init__(
        self,
        rows: BlockRows,
        memory: Path,
        config: MemoryConfig,
        packer: Packer | None,
        progress: Progress | None,
    ) -> None:
        self._rows, self._memory, self._config = rows, memory, config
        self._packer, self._progress = packer, progress
        self._stop = Event()
        self._telling = Lock()

    def write(
        self, wanted: Sequence[Shard]
    ) -> Generator[tuple[Shard, FileEntry, bytes], None, None]:
        """Write files; each as it is done, with the checksums of its blocks.

        Raises:
            FormatError: a number is not finite, or a file cannot be read or written; the others
                end soon, and leave no half-written file.
        """
        # MLX, which packs, stays in one thread.
        workers = 1 if self._packer is not None else min(MOST_WORKERS, 1 + (os.cpu_count() or 1))
        if workers == 1:
            for shard in wanted:
                yield shard, *self._write(shard)
            return
        pool = ThreadPoolExecutor(workers, "convert")
        futures = {pool.submit(self._write, shard): shard for shard in wanted}
        try:
            for future in as_completed(futures):
                yield futures[future], *future.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _write(self, shard: Shard) -> tuple[FileEntry, bytes]:
        checksums = bytearray()

        def stored() -> Iterator[np.ndarray]:
            first = shard.first
            for chunk in self._rows.level(shard.level, shard.first, shard.rows):
                if self._stop.is_set():
                    raise FormatError("stopped")  # nobody listens any more
                if self._packer is not None:
                    where = f"level {shard.level}, from block {first} on"
                    first += len(chunk)
                    chunk = self._packer.pack(chunk, where)
                for row in chunk:
                    checksums.extend(hashlib.sha256(row).digest())
                yield chunk
                if self._progress is not None:
                    with self._telling:
                        self._progress(chunk.nbytes)

        # A bank is larger than what the system should forget for it; and pages that it gets back
        # at once are cheaper than new ones.
        entry = write_shard(self._memory, self._config, shard, stored(), cached=False)
        return entry, bytes(checksums)


def _packed_generic(generic: np.ndarray, config: MemoryConfig, packer: Packer) -> np.ndarray:
    blocks, start = [], 0
    for level in config.memory_levels:
        end = start + config.block_size(level)
        blocks.append(packer.pack(generic[None, start:end], "the generic memory")[0])
        start = end
    return np.concatenate(blocks)
