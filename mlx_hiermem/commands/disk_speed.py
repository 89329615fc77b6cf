"""How fast a disk is read from, as a fetch reads: blocks of some megabytes, not in order."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from ..errors import InputError

#: A block of the paper's 160M anchor has 0.9 to 14 million numbers of two bytes.
PIECE, PIECES = 4 << 20, 32
#: What must stay free beside the file that is written.
_SPARE = 1 << 30


def read_speed(folder: Path) -> float | None:
    """Bytes per second that are read from the disk of a folder, from the disk itself.

    A file is written there, dropped from the page cache, read and removed.

    Returns:
        None where the system cannot be told to read from the disk, or the disk has no room.

    Raises:
        InputError: there is no such folder, or nothing can be written to it.
    """
    if not folder.is_dir():
        raise InputError(f"--folder {folder}: no such folder; name one on the disk to be measured")
    if shutil.disk_usage(folder).free < PIECE * PIECES + _SPARE:
        return None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            for _ in range(PIECES):
                file.write(os.urandom(PIECE))  # no disk can compress it
            file.flush()
            os.fsync(file.fileno())
            return _read(file.name)
    except OSError as error:
        raise InputError(
            f"--folder {folder}: cannot be written ({error.strerror}); name another"
        ) from None


def _read(path: str) -> float | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        if not _uncached(fd):
            return None
        order = list(range(PIECES))
        random.Random(0).shuffle(order)
        buffer = memoryview(bytearray(PIECE))
        begun = time.perf_counter()
        for piece in order:
            os.preadv(fd, [buffer], piece * PIECE)
        return PIECE * PIECES / (time.perf_counter() - begun)
    finally:
        os.close(fd)


def _uncached(fd: int) -> bool:
    """Make reads come from the disk; whether the system can."""
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return True
    import fcntl

    if hasattr(fcntl, "F_NOCACHE"):  # macOS
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        return True
    return False
