"""What the server counts, as Prometheus reads it (text format 0.0.4).

All counting is done in the event loop's thread; what the scheduler counts is asked of it when the
page is made. No label's value comes from a client.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

from .job import Event, Finished, Piece, Started

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "mlx_hiermem_"

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Counter:
    """Numbers that only grow, one per set of labels."""

    kind = "counter"

    def __init__(self, name: str, about: str, *labels: str) -> None:
        self.name, self.about, self.labels = PREFIX + name, about, labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, amount: float = 1, *values: str) -> None:
        """Count, for these values of the labels."""
        self._values[values] = self._values.get(values, 0) + amount

    def lines(self) -> Iterable[str]:
        """The samples."""
        for values, amount in sorted(self._values.items()):
            yield f"{self.name}{_labels(self.labels, values)} {_number(amount)}"


class Gauge(Counter):
    """A number that is set."""

    kind = "gauge"

    def set(self, value: float) -> None:
        """The number from now on."""
        self._values[()] = value


class Histogram:
    """How often a number of seconds fell below each of some bounds."""

    kind = "histogram"

    def __init__(self, name: str, about: str, bounds: tuple[float, ...]) -> None:
        self.name, self.about, self.bounds = PREFIX + name, about, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Count a number, or ``count`` equal ones."""
        self._counts[bisect_left(self.bounds, value)] += count
        self._sum += value * count

    def lines(self) -> Iterable[str]:
        """The samples."""
        below = 0
        for bound, count in zip((*self.bounds, "+Inf"), self._counts, strict=True):
            below += count
            yield f'{self.name}_bucket{{le="{bound}"}} {below}'
        yield f"{self.name}_sum {_number(self._sum)}"
        yield f"{self.name}_count {below}"


class Metrics:
    """All counts of one server."""

    def __init__(self) -> None:
        self.requests = Counter("requests_total", "Requests answered.", "endpoint", "status")
        self.prompt_tokens = Counter("prompt_tokens_total", "Tokens of prompts.")
        self.cached_tokens = Counter(
            "prompt_cached_tokens_total", "Tokens of prompts that the prompt cache held."
        )
        self.generated_tokens = Counter("generated_tokens_total", "Tokens of answers.")
        self.cache_hits = Counter(
            "prompt_cache_hits_total", "Prompts that the prompt cache held the beginning of."
        )
        self.cache_misses = Counter(
            "prompt_cache_misses_total", "Prompts that the prompt cache held nothing of."
        )
        self.memories = Counter("memories_total", "Memories used, by kind.", "memory")
        self.blocks = Counter("blocks_total", "Blocks of memories, by source.", "source")
        self.bytes = Counter("fetched_bytes_total", "Bytes of blocks, by source.", "source")
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From the request to its first token.",
            FIRST_TOKEN_BUCKETS,
        )  # fmt: skip
        self.per_token = Histogram(
            "time_per_token_seconds", "Between tokens of an answer.", TOKEN_BUCKETS
        )
        self.open = Gauge("requests_open", "Requests that are being answered.")
        self.waiting = Gauge("requests_waiting", "Prompts that wait for a place.")
        self.running = Gauge("requests_running", "Prompts that are answered at this moment.")
        self.alive = Gauge("alive", "1 while the generation thread lives.")

    def started(self, memory: str, fetch: Mapping[str, Any], prompt: int, cached: int) -> None:
        """Count the memory and the prompt of an answer that has begun.

        Args:
            memory: its kind.
            fetch: its fetch report, as ``FetchReport.to_dict``.
            prompt, cached: tokens of the prompt, and how many of them the prompt cache held.
        """
        self.memories.add(1, memory)
        for block in fetch.get("blocks", ()):
            self.blocks.add(1, block["source"])
            self.bytes.add(block["bytes"], block["source"])
        self.prompt_tokens.add(prompt)
        self.cached_tokens.add(cached)
        (self.cache_hits if cached else self.cache_misses).add()

    def page(self, stats: Mapping[str, Any], alive: bool) -> str:
        """The whole page.

        Args:
            stats: the scheduler's own numbers; each becomes ``mlx_hiermem_scheduler_NAME``.
            alive: whether the generation thread lives.
        """
        stats = dict(stats)
        self.waiting.set(stats.pop("waiting", 0))
        self.running.set(stats.pop("running", 0))
        self.alive.set(int(alive))
        lines = []
        for metric in vars(self).values():
            lines += [f"# HELP {metric.name} {metric.about}", f"# TYPE {metric.name} {metric.kind}"]
            lines += metric.lines()
        for name, value in sorted(stats.items()):
            whole = f"{PREFIX}scheduler_{name}"
            lines += [f"# TYPE {whole} untyped", f"{whole} {_number(value)}"]
        return "\n".join([*lines, ""])


class Seen:
    """Counts the events of one request.

    Args:
        metrics: where.
        begun: when the request came (``time.monotonic``).
        count: of its choices.
    """

    def __init__(self, metrics: Metrics, begun: float, count: int) -> None:
        self._metrics, self._begun = metrics, begun
        self._first: list[float | None] = [None] * count

    def __call__(self, index: int, event: Event) -> None:
        """Count one event of one choice."""
        now, metrics = time.monotonic(), self._metrics
        if isinstance(event, Started):
            metrics.started(event.memory, event.fetch, event.prompt_tokens, event.cached_tokens)
        elif isinstance(event, Piece):
            if self._first[index] is None:
                self._first[index] = now
                metrics.first_token.add(now - self._begun)
        elif isinstance(event, Finished):
            metrics.generated_tokens.add(event.completion_tokens)
            first, after = self._first[index], event.completion_tokens - 1
            if first is not None and after > 0:
                metrics.per_token.add((now - first) / after, after)


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    pairs = ",".join(f'{name}="{value}"' for name, value in zip(names, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
