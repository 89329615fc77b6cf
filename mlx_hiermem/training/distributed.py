"""Data-parallel training: what the processes of ``mlx.launch`` exchange in a step.

Every process holds the whole model and the files of the whole bank, computes its share of the
batch, and applies the same update. So what travels is gradients: those of the anchor, and those of
the rows that the batch fetched; never the bank (docs/distributed.md).

Notable: all processes have to take part in each exchange, in the same order. So one that cannot go
on says so in an exchange too (``together``), and all of them stop, with one line.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from ..arrays import as_list
from ..errors import HierMemError, TrainingError

if TYPE_CHECKING:
    from .rows import Key

#: Numbers that travel at a time: few calls, and little more memory than without them.
_MOST = 1 << 24

#: Seconds of waiting for the others after which a process says so.
PATIENCE = 300.0


class LostProcessError(TrainingError):
    """Another process is gone."""


class OtherProcessError(TrainingError):
    """Another process cannot go on, and is the one to say why."""


class Processes:
    """The processes of a run; one, and nothing to exchange, unless ``mlx.launch`` started more.

    Args:
        group: a group of ``mx.distributed``; the one of this run by default.

    Raises:
        TrainingError: the processes do not find each other.
        LostProcessError: another process is gone (from the methods).

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self, group: Any = None) -> None:
        try:
            self._group = mx.distributed.init() if group is None else group
        except RuntimeError as error:
            raise TrainingError(
                f"the processes cannot be connected ({_line(error)}); start two or more with "
                "mlx.launch, all at once, and give free ports (--starting-port) and addresses "
                "that the machines reach each other by"
            ) from None
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()
        self._lost = ""

    # ---- gradients ---------------------------------------------------------------------

    def sum(self, tree: Any) -> Any:
        """The sum over all processes of every array in ``tree``; the same bits in each of them."""
        if self.size == 1:
            return tree
        arrays = dict(tree_flatten(tree))
        summed: dict[str, mx.array] = {}
        for dtype in dict.fromkeys(array.dtype for array in arrays.values()):
            sizes = {name: array.size for name, array in arrays.items() if array.dtype == dtype}
            for names in _groups(sizes):
                flat = [arrays[name].reshape(-1) for name in names]
                total = self._sum(flat[0] if len(flat) == 1 else mx.concatenate(flat))
                ends = np.cumsum([sizes[name] for name in names]).tolist()
                for name, part in zip(names, mx.split(total, ends[:-1]), strict=True):
                    summed[name] = part.reshape(arrays[name].shape)
                mx.eval([summed[name] for name in names])
        return tree_map_with_path(lambda name, _: summed[name], tree)

    def sum_rows(
        self, gradients: dict[Key, np.ndarray], keys: Sequence[Key], sizes: Mapping[int, int]
    ) -> dict[Key, np.ndarray]:
        """The sum over all processes of row gradients; the same bits in each of them.

        Args:
            gradients: (s_l,) float32 of the rows that this process's sequences used; emptied.
            keys: the rows that any process's sequences used, in one order everywhere.
            sizes: level -> s_l.
        """
        if self.size == 1:
            return gradients
        summed: dict[Key, np.ndarray] = {}
        for group in _groups({key: sizes[key[0]] for key in keys}):
            mine = [
                gradients.pop(key) if key in gradients else np.zeros(sizes[key[0]], np.float32)
                for key in group
            ]
            total = self._sum(mx.array(mine[0] if len(mine) == 1 else np.concatenate(mine)))
            flat, end = np.array(total, copy=False), 0
            for key in group:
                start, end = end, end + sizes[key[0]]
                summed[key] = flat[start:end]
        return summed

    def _sum(self, array: mx.array) -> mx.array:
        return self._exchange(mx.distributed.all_sum(array, group=self._group))

    # ---- agreement ---------------------------------------------------------------------

    def all(self, value: int) -> list[int]:
        """``value`` (64 bits) of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        mine = mx.array([value], mx.int64)
        return as_list(self._exchange(mx.distributed.all_gather(mine, group=self._group)))

    def first(self, value: float) -> float:
        """Process 0's ``value``: for what another processor may round otherwise."""
        bits = self.all(int(np.float64(value).view(np.int64)))
        return float(np.int64(bits[0]).view(np.float64))

    def wait(self) -> None:
        """Until all processes are here."""
        self.all(0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Go on after the block if all processes can; there must be no exchange in the block.

        Raises:
            HierMemError: the one of this process, if no process before it has one.
            OtherProcessError: another one says what is wrong.
        """
        problem = None
        try:
            yield
        except HierMemError as error:
            if self.size == 1:
                raise
            problem = error
        failed = [rank for rank, no in enumerate(self.all(int(problem is not None))) if no]
        if problem is not None and self.rank == failed[0]:
            if len(failed) == self.size:  # bad input, rather than a bad machine
                raise problem
            raise type(problem)(f"process {self.rank} of {self.size}: {problem}") from None
        if failed:
            raise OtherProcessError(f"process {failed[0]} of {self.size} cannot go on")

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise TrainingError unless ``values`` (JSON), one after the other, are process 0's."""
        for name, value in values.items():
            digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
            found = self.all(int.from_bytes(digest[:8], "little", signed=True))
            other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
            with self.together():
                if other is not None:
                    raise TrainingError(
                        f"process {other} of {self.size} has another {name} than process 0; give "
                        "all of them the same corpus, model and settings"
                    )

    def _exchange(self, result: mx.array) -> mx.array:
        """Evaluate what the others take part in."""
        if self._lost:  # MLX's ring would wait for ever
            raise LostProcessError(self._lost)
        waiting = threading.Timer(PATIENCE, self._say_waiting)
        waiting.daemon = True
        waiting.start()
        try:
            mx.eval(result)
        except RuntimeError as error:
            self._lost = (
                f"process {self.rank} of {self.size}: another process is gone, or cannot be "
                f"reached any more ({_line(error)})"
            )
            raise LostProcessError(self._lost) from None
        finally:
            waiting.cancel()
        return result

    def _say_waiting(self) -> None:
        print(
            f"process {self.rank} of {self.size}: has waited for the others for {PATIENCE:g} "
            "seconds; if one of them hangs, or its machine is off, end all of them (kill -9) and "
            "start them again with --resume",
            file=sys.stderr,
            flush=True,
        )


def _groups(sizes: Mapping[Any, int]) -> Iterator[list[Any]]:
    """Names in their order, in groups of at most ``_MOST`` numbers, or one name alone."""
    group: list[Any] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > _MOST:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
