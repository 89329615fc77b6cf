"""A control group of the kernel, whose processes may take so much memory and no more.

Version 2 (``memory.max``) or 1 (``memory.limit_in_bytes``), whichever this machine lets us make.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
#: For each version: the folder of all groups, the file of the limit, and its value for none.
_VERSIONS = ((_ROOT, "memory.max", "max"), (_ROOT / "memory", "memory.limit_in_bytes", "-1"))


class Group:
    """A group of this process's own. A context manager; its processes have to be gone at the end.

    Attributes:
        version: of control groups.

    Raises:
        OSError: no such group can be made here.
    """

    def __init__(self) -> None:
        name = f"mlx-hiermem-{os.getpid()}-{time.monotonic_ns()}"
        for number, (root, limit, self._none) in enumerate(_VERSIONS):
            folder = root / name
            try:
                folder.mkdir()
                if (folder / limit).exists():
                    self.version = 2 - number
                    self._folder, self._limit = folder, folder / limit
                    return
                folder.rmdir()
            except OSError:
                continue
        raise OSError("no control group of memory can be made")

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        end = time.monotonic() + 10
        while True:
            try:
                self._folder.rmdir()
                return
            except OSError:  # a process that was killed is not quite gone
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def join(self) -> None:
        """Put this process into the group; to be called in a new one."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, size: int | None) -> bool:
        """Allow so many bytes, or any; False if there are more, of which none can be given up."""
        try:
            self._limit.write_text(self._none if size is None else str(size))
        except OSError:
            return False
        return True

    @property
    def used(self) -> int:
        """Bytes that its processes have, without what the system keeps of files for them."""
        lines = (self._folder / "memory.stat").read_text().splitlines()
        table = dict(line.split() for line in lines)
        return int(table["anon" if self.version == 2 else "rss"])


def can_limit() -> bool:
    """Whether this machine lets us make a group."""
    try:
        with Group():
            return True
    except OSError:
        return False
