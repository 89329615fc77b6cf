"""The same work by workers of Ray Data, on this machine or on a cluster (extra ``ray``).

The corpus folder and the sources have to be on storage that all machines see under the same path.
Notable: a worker that dies is started again and its unit given to another, both by Ray; since a
unit is in place whole or not at all, nothing is lost and nothing is there twice. Errors of bad
input come back as rows, so that they are told in one line and not retried.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from .. import errors
from ..backend import preload_blas
from ..errors import ConfigError, FormatError, HierMemError, one_line
from .runners import Factory, Report, Runner

_MOST_BLOCKS = 20_000


class RayRunner(Runner):
    """Maps over items with actors of Ray Data.

    Args:
        workers: how many actors.
        gpus: share of a GPU that each of them asks Ray for.

    Raises:
        ConfigError: Ray is missing.
    """

    def __init__(self, workers: int, gpus: float = 0.0) -> None:
        try:
            import ray.data  # noqa: F401
        except ImportError:
            raise ConfigError(
                "--runner ray: needs Ray Data; run pip install 'mlx-hiermem[ray]'"
            ) from None
        self.workers = workers
        self.gpus = gpus
        self._started = False

    def run(self, factory: Factory, items: Sequence[Any], report: Report) -> None:
        if not items:
            return
        import ray

        self._started |= _connect(self.workers)
        gpus = ray.cluster_resources().get("GPU", 0)
        if gpus < self.gpus:  # Ray would wait for one for ever
            raise ConfigError(
                f"--worker-gpus is {self.gpus:g}, but Ray's machines have {gpus:g} GPUs; give less"
            )
        rows = [{"number": number} for number in range(len(items))]
        # Small blocks: one is what a worker takes at a time, and what is done again if it dies.
        blocks = min(len(rows), _MOST_BLOCKS)
        answers = ray.data.from_items(rows, override_num_blocks=blocks).map(
            _Worker,
            fn_constructor_args=(factory, list(items)),
            concurrency=min(self.workers, len(items)),
            num_cpus=1,
            **({"num_gpus": self.gpus} if self.gpus else {}),
        )
        for answer in answers.iter_rows():
            if answer["error"]:
                raise getattr(errors, answer["error"])(answer["text"])
            report(items[answer["number"]], 1.0)

    def close(self) -> None:
        if self._started:
            import ray

            ray.shutdown()
            self._started = False


class _Worker:
    """An actor: holds the function, and turns errors of bad input into rows."""

    def __init__(self, factory: Factory, items: Sequence[Any]) -> None:
        preload_blas()  # before the function imports MLX
        self._factory = factory
        self._items = items
        self._function: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        answer = {"number": row["number"], "error": "", "text": ""}
        try:
            if self._function is None:
                self._function = self._factory()
            self._function(self._items[row["number"]])
        except HierMemError as error:
            answer |= {"error": type(error).__name__, "text": str(error)}
        except OSError as error:
            told = f"{error.filename or 'a file'}: cannot be read or written ({error.strerror})"
            answer |= {"error": FormatError.__name__, "text": told}
        return answer


def _connect(workers: int) -> bool:
    """Start Ray, or join the cluster that RAY_ADDRESS names; True where that was done here."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        # As many as are asked for: Ray would wait for ever for workers beyond the processors.
        options |= {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(**options)
    except Exception as error:  # no cluster at the address, no room for its files, no port, ...
        reason = one_line(error)
        raise ConfigError(f"--runner ray: Ray cannot be started or reached ({reason})") from None
    return True
