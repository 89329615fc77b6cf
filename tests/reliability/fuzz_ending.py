"""A target that ends its process at two seeds, as an input might: for the test of the processes."""

from __future__ import annotations

import os
import signal
import time
from random import Random

from tests.reliability.fuzz_process import Target

#: The seeds, and the variable that says how: "signal", "exit" or "hang".
SEEDS, VARIABLE = (3, 7), "FUZZ_END"
_DRAWN = {Random(seed).random() for seed in SEEDS}


class Ending(Target):
    """Does nothing but at those seeds."""

    hangs = 0.5

    def change(self, random: Random) -> str:
        """Nothing."""
        self._ends = random.random() in _DRAWN
        return "what was changed"

    def look(self, random: Random) -> None:
        """The end, maybe."""
        if self._ends:
            how = os.environ[VARIABLE]
            if how == "signal":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif how == "exit":
                os._exit(7)
            time.sleep(60)

    def restore(self) -> None:
        """Nothing."""
