"""A stand-in for the Hub: its HTTP interface for model repositories, on this machine.

What ``huggingface_hub`` asks for is there, over real sockets: repositories, branches, commits of
several files at once, file lists, small files in the repository and large ones in a storage that is
another server (as the Hub's is), ranges, redirects, tokens. Every request is recorded, and faults
can be ordered: an error status, or a connection that breaks off in the middle of a file.

    with Hub() as hub:
        os.environ["HF_ENDPOINT"] = hub.url
"""

from __future__ import annotations

import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from typing import Any

from tests.hub.files import File, Repo, is_large
from tests.hub.routes import Api, Handler, Storage


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose "METHOD path" matches ``pattern``."""

    pattern: str
    times: int = 1
    status: int | None = None  # answer with this status,
    after: int | None = None  # or break the connection off after so many bytes of the body,
    do: Callable[[], None] | None = None  # or only do this first


class Hub:
    """The two servers. ``url`` is what HF_ENDPOINT has to be.

    Attributes:
        repos: name -> :class:`Repo`; tests may look and change.
        storage: sha256 -> the bytes of large files.
        ranges: the ranges that were asked for of each large file, in their order.
        requests: "METHOD path" of every request, in their order; for the storage the path is
            ``/storage/<file>``.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.ranges: defaultdict[str, list[str]] = defaultdict(list)
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self._servers = [self._serve(Api), self._serve(Storage)]
        self.url, self.storage_url = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )

    def _serve(self, handler: type[Handler]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (handler,), {"hub": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def close(self) -> None:
        """Stop: from here on nobody listens on the ports."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what tests do ------------------------------------------------------------------

    def add(
        self, repo: str, files: Mapping[str, bytes | File], branch: str = "main", **values: Any
    ) -> str:
        """Commit ``files`` (all of the commit's) to a repository, made if need be; the commit."""
        made = self.repos.setdefault(repo, Repo(**values))
        stored = {}
        for name, file in files.items():
            stored[name] = file if isinstance(file, File) else File(file, is_large(name, len(file)))
            self.storage[stored[name].sha256] = stored[name].data
        return made.commit(branch, stored)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        found = self.repos[repo]
        return {
            n: file.data for n, file in found.commits[found.refs.get(revision, revision)].items()
        }

    def fail(self, pattern: str, **fault: Any) -> None:
        """Order a :class:`Fault`."""
        self.faults.append(Fault(pattern, **fault))

    def downloads(self) -> Counter[str]:
        """How often the content of each file was asked for."""
        found = Counter()
        for line in self.requests:
            match = re.fullmatch(r"GET (?:/storage/|/[^/]+/[^/]+/resolve/[^/]+/)(.*)", line)
            if match:
                found[match[1]] += 1
        return found
