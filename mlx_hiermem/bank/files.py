"""Files of a bank: names that stay inside the folder, exact reads, and how many may be open.

Notable: a link may not lead out of the folder, except into the blobs of the Hub cache that
the folder itself lies in (a snapshot of the Hub cache is made of such links).
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import MORE_FILES, TOO_MANY_FILES, FormatError

# One read call may not be asked for more than 2 GiB (an error on macOS, a short read on Linux).
_READ_LIMIT = 1 << 30
# Pieces in one call: IOV_MAX of Linux and macOS.
_MOST_PIECES = 1024
_HASH_CHUNK = 1 << 22
#: Files that may be open at a time, if the system lets us.
OPEN_FILES = 10_240
# Of them, what a bank leaves for others: a server's connections, the files of libraries.
_FOR_OTHERS = 128
# What a read that must not wait ends with: not in the page cache, or not known to this file system.
_NOT_NOW = (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class ReadError(FormatError):
    """The system cannot read a file that was open: its disk has gone, or is broken."""


def check_name(name: str) -> bool:
    """Whether ``name`` is a plain relative name: no way up, no hidden part, printable, at most 255
    characters."""
    parts = name.split("/")
    return (
        len(name) <= 255
        and name.isprintable()
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
    if not any(real.is_relative_to(root) for root in (home, *hub_blobs(home))):
        raise FormatError(
            f"{path}: is a link to {real}, outside of the folder; put the file itself there"
        )
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path}: is not a regular file; copy or download the bank again")
    return real


def hub_blobs(home: Path) -> list[Path]:
    """Where the links of a folder may lead that lies in a cache of the Hub; none if it does not."""
    # .../models--owner--name/snapshots/<revision>/memory -> .../models--owner--name/blobs
    return [
        parent.parent / "blobs"
        for parent in home.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]


def allow_open_files(wanted: int = OPEN_FILES) -> None:
    """Let this process have many files open: macOS allows 256 unless asked for more.

    Where the system does not let us, opening them says so.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def make_room(files: int) -> None:
    """Allow more open files where so many more would leave too few for others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        already = len(os.listdir("/dev/fd"))
    except OSError:  # there is not even one left to look with, or the system does not tell
        already = soft
    needed = already + files + _FOR_OTHERS
    if soft != resource.RLIM_INFINITY and soft < needed:
        allow_open_files(max(needed, OPEN_FILES))


def unreadable(path: Path, error: OSError) -> FormatError:
    """That a file cannot be read, and why; where too many are open, what to do."""
    advice = f"; {MORE_FILES}" if error.errno in TOO_MANY_FILES else ""
    return FormatError(f"{path}: cannot be read ({error.strerror}){advice}")


def open_file(folder: Path, name: str) -> tuple[int, int]:
    """Open the file ``name`` of ``folder`` for reading: (file descriptor, size in bytes)."""
    path = find(folder, name)
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return fd, os.fstat(fd).st_size
    except OSError as error:
        raise unreadable(folder / name, error) from None


def read_exact(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill ``buffer`` (bytes, writable) with what the file holds from ``offset`` on.

    Raises:
        FormatError: the file ends before the buffer is full, or cannot be read.
    """
    read_scattered(fd, [buffer], offset, path)


def read_scattered(
    fd: int, pieces: Sequence[memoryview], offset: int, path: Path, cached_only: bool = False
) -> int:
    """Fill the pieces, one behind the other, with what the file holds from ``offset`` on.

    One system call where the pieces are not too many and it reads all; as many as it takes
    otherwise.

    Args:
        pieces: bytes, writable.
        cached_only: stop where the disk would be waited for (Linux only; elsewhere at once).

    Returns:
        Bytes read; fewer than the pieces hold only with ``cached_only``.

    Raises:
        FormatError: the file ends before the pieces are full, or cannot be read.
    """
    flags = 0
    if cached_only:
        flags = getattr(os, "RWF_NOWAIT", 0)
        if not flags:
            return 0
    total, done = sum(map(len, pieces)), 0
    rest = pieces
    while rest:
        few = len(rest) <= _MOST_PIECES and total - done <= _READ_LIMIT
        try:
            count = os.preadv(fd, rest if few else _front(rest), offset + done, flags)
        except OSError as error:
            if cached_only and error.errno in _NOT_NOW:
                return done
            raise ReadError(f"{path}: cannot be read ({error.strerror})") from None
        if count == 0:
            raise FormatError(
                f"{path}: truncated: found {done} of the {total} bytes expected at "
                f"{offset}; copy or download the bank again"
            )
        done += count
        rest = rest_of(rest, count) if done < total else ()
    return done


def _front(pieces: Sequence[memoryview]) -> list[memoryview]:
    """As much of the pieces as one call may be asked for."""
    front, room = list(pieces[:_MOST_PIECES]), _READ_LIMIT
    for number, piece in enumerate(front):
        if len(piece) >= room:
            return [*front[:number], piece[:room]]
        room -= len(piece)
    return front


def rest_of(pieces: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of the pieces behind their first ``count`` bytes."""
    for number, piece in enumerate(pieces):
        if count < len(piece):
            return [piece[count:], *pieces[number + 1 :]]
        count -= len(piece)
    return []


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
        raise unreadable(folder / name, error) from None
    return size, digest.hexdigest()


def read_bytes(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of the file ``name``, at most ``limit`` of them.

    Raises:
        FormatError: it cannot be read, or is longer.
    """
    try:
        with open(find(folder, name), "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise unreadable(folder / name, error) from None
    if len(data) > limit:
        raise FormatError(
            f"{folder / name}: more than {limit} bytes; copy or download the bank again"
        )
    return data


def read_text(folder: Path, name: str, limit: int = 1 << 24) -> str:
    """The text of the file ``name`` (UTF-8, at most ``limit`` bytes)."""
    try:
        return read_bytes(folder, name, limit).decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{folder / name}: not UTF-8 text; download the bank again") from None
