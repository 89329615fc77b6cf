"""Files of a bank: names that stay inside the folder, and exact reads.

Notable: a link may not lead out of the folder, except into the blobs of the Hub cache that
the folder itself lies in (a snapshot of the Hub cache is made of such links).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from ..errors import FormatError

# One read call may not be asked for more than 2 GiB (an error on macOS, a short read on Linux).
_READ_LIMIT = 1 << 30
_HASH_CHUNK = 1 << 22


def check_name(name: str) -> bool:
    """Whether ``name`` is a plain relative name: no way up, no hidden part, printable."""
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and not any(part == "" or part.startswith(".") for part in parts)
    )


def find(folder: Path, name: str) -> Path:
    """The real path of the regular file ``name`` in ``folder``.

    Raises:
        FormatError: it is missing, is no regular file, or is a link out of the folder.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise FormatError(
            f"{path}: no such file; the bank is not complete, copy or download it again"
        ) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise FormatError(f"{path}: cannot be read ({reason})") from None
    home = folder.resolve()
    if not any(real.is_relative_to(root) for root in (home, *_hub_blobs(home))):
        raise FormatError(
            f"{path}: is a link to {real}, outside of the folder; put the file itself there"
        )
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path}: is not a regular file; copy or download the bank again")
    return real


def _hub_blobs(home: Path) -> list[Path]:
    # .../models--owner--name/snapshots/<revision>/memory -> .../models--owner--name/blobs
    return [
        parent.parent / "blobs"
        for parent in home.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]


def open_file(folder: Path, name: str) -> tuple[int, int]:
    """Open the file ``name`` of ``folder`` for reading: (file descriptor, size in bytes)."""
    path = find(folder, name)
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return fd, os.fstat(fd).st_size
    except OSError as error:
        raise FormatError(f"{folder / name}: cannot be read ({error.strerror})") from None


def read_exact(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill ``buffer`` (bytes, writable) with what the file holds from ``offset`` on.

    Raises:
        FormatError: the file ends before the buffer is full, or cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done : done + _READ_LIMIT]], offset + done)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
        if count == 0:
            raise FormatError(
                f"{path}: truncated: found {done} of the {len(buffer)} bytes expected at "
                f"{offset}; copy or download the bank again"
            )
        done += count


def hash_file(
    folder: Path, name: str, progress: Callable[[int], None] | None = None
) -> tuple[int, str]:
    """(bytes, sha256 in hex) of the file ``name``; ``progress`` gets the bytes of each step."""
    digest = hashlib.sha256()
    size = 0
    try:
        with open(find(folder, name), "rb", buffering=0) as file:
            while chunk := file.read(_HASH_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if progress is not None:
                    progress(len(chunk))
    except OSError as error:
        raise FormatError(f"{folder / name}: cannot be read ({error.strerror})") from None
    return size, digest.hexdigest()


def read_text(folder: Path, name: str, limit: int = 1 << 28) -> str:
    """The text of the file ``name`` (UTF-8, at most ``limit`` bytes)."""
    try:
        with open(find(folder, name), "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise FormatError(f"{folder / name}: cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise FormatError(f"{folder / name}: more than {limit} bytes; expected a JSON file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{folder / name}: not UTF-8 text; download the bank again") from None
