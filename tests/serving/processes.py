"""A server in a process of its own, on a socket, for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import httpx

REPOSITORY = Path(__file__).parents[2]
LONG = 60  # seconds after which something hangs
QUESTION = {"prompt": "gold is", "max_tokens": 4, "temperature": 0}


class Served:
    """A running server.

    Args:
        model: folder.
        folder: for what it writes, and what rules it (``held_server``).
        options: of the command.
        environment: besides this process's.
    """

    def __init__(
        self, model: Path, folder: Path, *options: str, environment: dict[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.control, self._log = folder, folder / "stderr.txt"
        command = [sys.executable, "-m", "tests.serving.held_server", "--model", str(model)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", "0", *options],
                cwd=REPOSITORY,
                env={**os.environ, "CONTROL": str(folder), **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.line = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.line)
        assert found, self.log
        self.v1 = found[0]
        self.url = self.v1.removesuffix("/v1")
        #: For any thread. It reads no certificates, which takes longer than most requests.
        self.http = httpx.Client(timeout=LONG, verify=False)

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    @property
    def log(self) -> str:
        """What it has written to stderr."""
        return self._log.read_text()

    @contextmanager
    def held(self, tokens: int = 0) -> Iterator[None]:
        """While the model makes no more than so many tokens."""
        (self.control / "new").write_text(str(tokens))
        (self.control / "new").rename(self.control / "hold")  # at one moment
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Let it go on."""
        (self.control / "hold").unlink(missing_ok=True)

    def die(self) -> None:
        """End the model's thread at its next token."""
        (self.control / "die").touch()

    def metric(self, name: str) -> float:
        """A number of ``/metrics``; 0 if it is not there."""
        page = self.http.get(f"{self.url}/metrics")
        found = re.search(rf"^mlx_hiermem_{re.escape(name)} (\S+)$", page.text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def until(self, name: str, value: float) -> None:
        """Wait until a number of ``/metrics`` is at least ``value``."""
        self._until(name, lambda number: number >= value)

    def until_is(self, name: str, value: float) -> None:
        """Wait until a number of ``/metrics`` is ``value``."""
        self._until(name, lambda number: number == value)

    def _until(self, name: str, fits: Callable[[float], bool]) -> None:
        end = time.monotonic() + LONG
        while not fits(number := self.metric(name)):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, f"{name} stays {number:g}"

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(LONG)


@contextmanager
def asking(served: Served, count: int, **options: object) -> Iterator[list[Future]]:
    """So many requests at once, each in a thread; their answers."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield [pool.submit(ask, served, **options) for _ in range(count)]
        except BaseException:
            served.release()  # or else nobody would be answered, and the test not end
            raise


def ask(served: Served, **options: object) -> httpx.Response:
    """A completion of four tokens."""
    return served.http.post(f"{served.v1}/completions", json={**QUESTION, **options})
