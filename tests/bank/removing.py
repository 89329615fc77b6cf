"""A process that removes blocks and kills itself at a step, for the tests of removals.

``python -m tests.bank.removing FOLDER STEP``
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from mlx_hiermem.bank.remove import remove

#: What it removes: a leaf, its neighbour, one of another file, and a block of level 1.
BLOCKS = [(2, 4), (2, 5), (2, 0), (1, 2)]


def main(folder: str, kill_at: str) -> None:
    def step(name: str) -> None:
        if name == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    remove(Path(folder), BLOCKS, step=step)


if __name__ == "__main__":
    main(*sys.argv[1:])
