"""What can happen to a write: the n-th operation on files fails, or is the process's last.

    with faults(at=17, act=full_disk) as count:   # count.calls: operations so far
        ...

Counted are what a training run changes files with: making, writing (half of it is done), syncing,
renaming and removing.
"""

from __future__ import annotations

import builtins
import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from mlx_hiermem import files

_OPERATIONS = ("mkdir", "rmdir", "unlink", "rename", "replace", "fsync", "pwrite")


class Killed(BaseException):
    """The process is dead: nothing that it would do on its way out happens."""


@dataclass
class Count:
    """Operations so far, and whether one was the last."""

    calls: int = 0
    dead: bool = False
    names: list[str] = field(default_factory=list)


def full_disk(_: Count) -> None:
    """The operation fails; later ones are done (that is how a file too large behaves)."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die(count: Count) -> None:
    """As if killed: neither this operation is done nor any after it."""
    count.dead = True
    raise Killed


def kill(_: Count) -> None:
    """The process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def faults(at: int | None, act: Callable[[Count], None]) -> Iterator[Count]:
    """Have the operation number ``at`` (from 1; None: none) do ``act`` in its place."""
    count = Count()

    def counted(name: str, do: Callable[..., Any], half: Callable[..., Any]) -> Any:
        def operation(*args: Any, **options: Any) -> Any:
            if count.dead:
                raise Killed
            count.calls += 1
            count.names.append(name)
            if count.calls == at:
                half(*args, **options)
                act(count)
            return do(*args, **options)

        return operation

    def nothing(*_: Any, **__: Any) -> None:
        pass

    def open_counted(path: Any, mode: str = "r", **options: Any) -> Any:
        file = builtins.open(path, mode, **options)
        if "w" in mode:
            write = file.write
            halves = lambda data: (write(memoryview(data)[: len(data) // 2]), file.flush())  # noqa: E731
            file = _Writes(file, counted("write", write, halves))
        return file

    pwrite = os.pwrite

    def half_pwrite(fd: int, data: Any, offset: int) -> None:
        pwrite(fd, data[: len(data) // 2], offset)

    with patch.object(files, "open", open_counted, create=True):
        patches = [
            patch.object(
                os,
                name,
                counted(name, getattr(os, name), half_pwrite if name == "pwrite" else nothing),
            )
            for name in _OPERATIONS
        ]
        for one in patches:
            one.start()
        try:
            yield count
        finally:
            for one in patches:
                one.stop()


class _Writes:
    """A file whose ``write`` is another."""

    def __init__(self, file: Any, write: Callable[..., Any]) -> None:
        self._file = file
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
