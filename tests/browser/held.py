"""``python -m tests.browser.held GATE ARGUMENTS...``: the command line, with a model that waits.

What is asked for with :data:`HOLD` in it is not answered until the file GATE exists. So a test can
look at a line of visitors for as long as it needs to.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

#: In a prompt, has the model wait.
HOLD = "wait for the gate"


def main() -> int:
    from mlx_hiermem.cli import main
    from mlx_hiermem.engine import Fetched, MemoryLM

    gate, fetch = Path(sys.argv[1]), MemoryLM.fetch

    def held(lm: MemoryLM, memory="fetched", text: str | None = None) -> Fetched:
        while text is not None and HOLD in text and not gate.exists():
            time.sleep(0.01)
        return fetch(lm, memory, text)

    MemoryLM.fetch = held
    return main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
