"""Read ahead on a thread, so that reading and tokenising go on while the encoder computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias, TypeVar

T = TypeVar("T")

_Told: TypeAlias = (
    tuple[Literal["item"], T] | tuple[Literal["error"], BaseException] | tuple[Literal["end"], None]
)


def prefetch(items: Iterable[T], ahead: int = 2) -> Iterator[T]:
    """The same items, up to ``ahead`` of them made before they are asked for.

    Whatever ``items`` raises is raised here, in its place. ``items`` must not touch MLX: arrays
    belong to the thread that makes them.
    """
    ready: queue.Queue[_Told[T]] = queue.Queue(ahead)
    stop = threading.Event()

    def put(told: _Told[T]) -> None:
        while not stop.is_set():
            try:
                return ready.put(told, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(("item", item))
                if stop.is_set():
                    return
            put(("end", None))
        except BaseException as error:  # told to the thread that waits for the items
            put(("error", error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            told = ready.get()
            if told[0] == "end":
                return
            if told[0] == "error":
                raise told[1]
            yield told[1]
    finally:
        stop.set()
        thread.join()
