"""The banks that the benchmark of quantised banks compares, and what is timed of them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_hiermem.bank.quantize import quantize_bank
from mlx_hiermem.bank.reader import BlockReader
from mlx_hiermem.bank.slots import Slot
from mlx_hiermem.bank.store import MemoryBank
from mlx_hiermem.bank.stored import StoredLayout
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import ConfigError, InputError
from mlx_hiermem.quantization import Quantization

from . import fetch_bank

#: What is compared with the bank as it is: bits and mode.
VARIANTS: dict[str, tuple[int, str]] = {
    "8-bit": (8, "affine"),
    "4-bit": (4, "affine"),
    "3-bit": (3, "affine"),
    "2-bit": (2, "affine"),
    "mxfp4": (4, "mxfp4"),
    "nvfp4": (4, "nvfp4"),
}
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Bank:
    """A bank as it is, or quantised.

    Attributes:
        memory: its folder.
        config: its config.
        error: of its numbers against those of the bank as it is, as ``bank quantize`` tells it.
    """

    memory: Path
    config: MemoryConfig
    error: float = 0.0

    @property
    def bank_bytes(self) -> int:
        """Bytes of all blocks."""
        config = self.config
        return sum(config.block_bytes(one) * config.clusters(one) for one in config.memory_levels)

    @property
    def fetch_bytes(self) -> int:
        """Bytes of the blocks on a path."""
        return sum(map(self.config.block_bytes, self.config.memory_levels))


def make_banks(memory: Path, folder: Path) -> tuple[str, dict[str, Bank]]:
    """The bank in ``memory`` and all that can be made of it, by name; first the name of itself."""
    reader = BlockReader(memory)
    reader.close()
    config = reader.config
    base = _SHORT[config.dtype]
    need = len(VARIANTS) * Bank(memory, config).bank_bytes  # much more than they take
    if (free := shutil.disk_usage(folder).free) < need:
        raise InputError(
            f"{folder}: {free:,} bytes are free, the banks may take {need:,}; give another --folder"
        )
    banks = {base: Bank(memory, config)}
    for name, (bits, mode) in VARIANTS.items():
        try:
            packing = Quantization.choose(config.row_widths(), bits, mode)
        except ConfigError as error:
            print(f"{name} is left out: {error}")
            continue
        report = quantize_bank(memory, folder / name, bits, mode, packing.group_size)
        packed = MemoryConfig.load(folder / name / "config.json")
        banks[name] = Bank(folder / name, packed, report["error"])
    return base, banks


class Fetches:
    """Fetches from an open bank, of which each shares no block with the one before."""

    def __init__(self, bank: Bank) -> None:
        self._reader = BlockReader(bank.memory)
        self.bank = MemoryBank.of(self._reader, tiers="disk")
        self._turn = 0

    def path(self) -> tuple[int, ...]:
        """The next path."""
        config = self.bank.config
        below = config.branching ** (config.levels - 1)  # leaves of a level-1 subtree
        subtree, leaf = self._turn % config.branching, self._turn * 7 % below
        self._turn += 1
        return fetch_bank.path_to(config, subtree * below + leaf)

    def fetch(self, count: int = 1) -> None:
        """Fetch ``count`` memories, one after the other."""
        for _ in range(count):
            self.bank.fetch(self.path()).release()

    def drop(self) -> None:
        """Drop the files from the page cache, where the system lets us."""
        if hasattr(os, "posix_fadvise"):
            for fd in self._reader.descriptors:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


class Reading:
    """The two halves of a fetch from a quantised bank: the reads, and the unpacking."""

    def __init__(self, bank: Bank) -> None:
        self._reader = BlockReader(bank.memory)
        self._slot = Slot(StoredLayout(bank.config))
        self._turn = 0

    def read(self) -> None:
        """Read the blocks on a path into a slot that was used before."""
        config = self._reader.config
        self._turn += 1
        for level in config.memory_levels:
            cluster = self._turn % config.branching * config.branching ** (level - 1)
            self._reader.read_into(level, cluster, self._slot.pieces(level))

    def unpack(self) -> None:
        """Unpack what was read last."""
        self._slot.joined()

    def close(self) -> None:
        """Close the files."""
        self._reader.close()
