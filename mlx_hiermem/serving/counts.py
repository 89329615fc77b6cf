"""Counts: what the scheduler has done so far, and what it holds now, for ``/metrics``."""

from __future__ import annotations

import threading

_COUNTERS = (
    "submitted refused_full finished_stop finished_length finished_cancelled failed_client "
    "failed_server failed_timeout prompt_tokens cached_tokens completion_tokens steps "
    "fetched_bytes fetched_bytes_read"
)
_GAUGES = "waiting running prompt_cache_bytes prompt_cache_entries bank_bytes_held slots_made"


class Counts:
    """Numbers by name; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = dict.fromkeys(f"{_COUNTERS} {_GAUGES}".split(), 0)

    def add(self, **numbers: int) -> None:
        """Count some more of each."""
        with self._lock:
            for name, number in numbers.items():
                self._numbers[name] += number

    def set(self, **numbers: int) -> None:
        """How much there is now."""
        with self._lock:
            for name, number in numbers.items():
                self._numbers[name] = number

    def read(self) -> dict[str, int]:
        """All of them."""
        with self._lock:
            return dict(self._numbers)
