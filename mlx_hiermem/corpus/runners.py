"""Who does the work on units: this process, or workers of Ray (``ray_runner.py``).

Embedding and assigning are maps: what comes of an item depends on that item alone, and goes into
the work folder. A runner is given a factory, which makes the function in each worker, and items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

#: Makes the function of a worker: called with an item and, maybe, a function that takes the share
#: of the item that is done. Has to be picklable for workers in other processes.
Factory = Callable[[], Callable[..., object]]

#: Called with an item and the share of it that is done, from 0 to 1; 1 once per item.
Report = Callable[[Any, float], None]


class Runner(ABC):
    """Maps a function over items."""

    @abstractmethod
    def run(self, factory: Factory, items: Sequence[Any], report: Report) -> None:
        """Have every item done, in any order.

        Raises:
            HierMemError: what a worker raised; items that are not done by then stay undone.
        """

    def close(self) -> None:  # noqa: B027 (most runners hold nothing)
        """Let go of workers."""


class LocalRunner(Runner):
    """One item after the other in this process."""

    def run(self, factory: Factory, items: Sequence[Any], report: Report) -> None:
        if not items:
            return
        function = factory()
        for item in items:

            def share(done: float, item: Any = item) -> None:
                report(item, done)

            function(item, share)
            report(item, 1.0)
