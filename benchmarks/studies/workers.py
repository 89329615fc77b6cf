"""Processes that a study's runs share, side by side."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """How many processors the BLAS takes, in a process that starts meanwhile and loads it."""
    known = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if known is None:
            del os.environ["OPENBLAS_NUM_THREADS"]
        else:
            os.environ["OPENBLAS_NUM_THREADS"] = known


@contextmanager
def processes(
    count: int, begin: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes, each with its share of the processors.

    They end with the process that made them, however that ends. If an error leaves the block, what
    was not begun never is.

    Args:
        begin: called in each of them first, with the arguments.
    """
    context = multiprocessing.get_context("spawn")
    with blas_threads(max(1, (os.cpu_count() or 1) // count)):
        pool = ProcessPoolExecutor(count, context, _begin, (begin, arguments))
        failed = True
        try:
            yield pool
            failed = False
        finally:
            pool.shutdown(cancel_futures=failed)


def _begin(begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # transformers imports torch where the tests have it: seconds, for what no study needs.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    if begin is not None:
        begin(*arguments)


def _end_with_parent() -> None:
    """A parent that is killed tells nobody; its workers would go on with what they have."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
