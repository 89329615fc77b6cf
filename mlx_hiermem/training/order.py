"""Which sequences a step sees: a fresh permutation for each pass, found from the position alone.

There is no state to save: a run that resumes at step s sees what it would have seen anyway.
"""

from __future__ import annotations

import numpy as np


class SequenceOrder:
    """The endless order of ``count`` sequences; each pass shows each of them exactly once.

    Args:
        count: sequences of the corpus.
        seed: same seed, same order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._pass = -1
        self._order = np.empty(0, np.int64)

    def indices(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the sequences at the positions from ``start`` on.

        They may span the end of one pass and the start of the next.
        """
        positions = np.arange(start, start + count)
        found = np.empty(count, np.int64)
        for number in np.unique(positions // self.count).tolist():
            if number != self._pass:  # the permutation of one pass is kept
                rng = np.random.default_rng([self.seed, 0, number])
                self._pass, self._order = number, rng.permutation(self.count)
            here = positions // self.count == number
            found[here] = self._order[positions[here] % self.count]
        return found
