"""Processes that edit and read one bank, for the tests of edits.

``python -m tests.bank.editing edit FOLDER TIMES [STEP]`` edits in a loop, and kills itself at the
step; ``python -m tests.bank.editing read FOLDER SECONDS`` reads everything in a loop and prints
what it saw.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from mlx_hiermem.bank.edit import BankEdit
from mlx_hiermem.bank.reader import BlockReader


def content(version: int, size: int) -> np.ndarray:
    """A block of the n-th version: all numbers equal, so that a mixture is seen."""
    return np.full(size, 0x3F80 + version % 64, np.uint16)


def edit(folder: Path, versions: range, kill_at: str | None = None) -> None:
    """Write version after version of one block of each level, and block another one."""

    def step(name: str) -> None:
        if name == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for version in versions:
        with BankEdit(folder, step=step) as bank:
            for level in bank.config.memory_levels:
                block = content(version, bank.config.block_size(level))
                bank.replace_blocks(level, {0: block, bank.config.clusters(level) - 1: block})
            bank.set_blocked([(1, version % 2)])


def look(folder: Path) -> tuple[str, tuple[int, ...]]:
    """The revision, and what the blocks that are edited hold; FormatError if it is a mixture."""
    reader = BlockReader(folder)
    try:
        seen = []
        for level in reader.config.memory_levels:
            for cluster in (0, reader.config.clusters(level) - 1):
                block = reader.stored(level, cluster)
                assert (block == block[0]).all()
                seen.append(int(block[0]))
        ((_, blocked),) = reader.blocked or ((1, -1),)
        seen.append(blocked)
        return reader.manifest.revision, tuple(seen)
    finally:
        reader.close()


def main(action: str, folder: str, number: str, step: str | None = None) -> None:
    print("ready", flush=True)
    if action == "edit":
        first = int(number)
        edit(Path(folder), range(first, first + 1000), step)
        return
    end, seen = time.monotonic() + float(number), set()
    while time.monotonic() < end:
        seen.add(look(Path(folder)))
    print(json.dumps(sorted(seen)))


if __name__ == "__main__":
    main(*sys.argv[1:])
