"""Whom something belongs to: MLX arrays belong to the thread that makes them.

At the bottom of the house: models and banks say with it, in one line, that another thread may not
use them, before anything of theirs is read or changed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator
from typing import Any, Protocol, TypeVar, cast

from .errors import ThreadError

T = TypeVar("T")


class Owner:
    """The thread that made something, which alone may use it.

    Args:
        what: it, as a message names it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._thread = threading.current_thread()

    def check(self) -> None:
        """Raise ThreadError in any other thread."""
        thread = threading.current_thread()
        if thread is not self._thread:
            raise ThreadError(
                f"{self._what} belongs to the thread that opened it ({self._thread.name}), and "
                f"{thread.name} asks; open it in the thread that uses it, or have one thread "
                "answer all, as `mlx_hiermem serve` does"
            )


class HasThread(Protocol):
    """What belongs to a thread."""

    def check_thread(self) -> None:
        """Raise ThreadError in any other."""


M = TypeVar("M", bound=Callable[..., Generator[Any, None, None]])


def owned(method: M) -> M:
    """For a generator method: what it gives is for the thread of its object; see :class:`Owned`."""

    @functools.wraps(method)
    def call(self: HasThread, *args: Any, **options: Any) -> Owned[Any]:
        return Owned(self.check_thread, method(self, *args, **options))

    return cast(M, call)  # of the same arguments


class Owned(Generator[T, None, None]):
    """The items of a generator, for one thread; any other may only close it.

    That is not left to the generator: one that raises has ended, also for its own thread.
    """

    def __init__(self, check: Callable[[], None], generator: Generator[T, None, None]) -> None:
        self._check = check
        self._generator = generator

    def send(self, value: None) -> T:
        """The next one.

        Raises:
            ThreadError: in another thread; nothing has happened then.
        """
        self._check()
        return self._generator.send(value)

    def throw(self, *error: Any) -> T:
        """Raise an error where it stands.

        Raises:
            ThreadError: in another thread; nothing has happened then.
        """
        self._check()
        return self._generator.throw(*error)

    def close(self) -> None:
        """End it where it stands.

        Raises:
            ThreadError: in another thread, while its own is in the midst of a step.
        """
        try:
            self._generator.close()
        except ValueError:  # it is running
            self._check()
            raise
