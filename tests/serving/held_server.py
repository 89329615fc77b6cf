"""``python -m tests.serving.held_server``: the command, with a model that can be held, or ended.

The folder in the environment variable ``CONTROL`` rules it: while it has a file ``hold``, no more
tokens are made than the number in it; once it has a file ``die``, the model's thread ends.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from mlx_hiermem.cli import main
from mlx_hiermem.serving.batch import Batch


def hold(control: Path) -> None:
    """Make every batch ask the folder before each step."""
    step, made = Batch.step, 0

    def held(batch: Batch) -> None:
        nonlocal made
        while (most := _most(control / "hold")) is not None and made >= most:
            _die_if_told(control)
            time.sleep(0.005)
        _die_if_told(control)
        made = 0 if most is None else made + 1
        step(batch)

    Batch.step = held


def _die_if_told(control: Path) -> None:
    if (control / "die").exists():
        raise RuntimeError(f"told to in {control}")


def _most(file: Path) -> int | None:
    try:
        return int(file.read_text() or 0)
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    hold(Path(os.environ["CONTROL"]))
    sys.exit(main(["serve", *sys.argv[1:]]))
