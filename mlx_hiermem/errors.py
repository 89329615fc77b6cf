"""Errors that a user can act on.

Every error raised on purpose by this package derives from :class:`HierMemError`.
Its text is one line: what is wrong, where, what was expected, what to do. The
command line prints that line and exits with code 2; anything else is a fault of
ours and exits with code 1.
"""

from __future__ import annotations

import errno

# What the system says of a disk that is full, read-only, broken or gone.
_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENODEV, errno.ENXIO,
    errno.ESTALE,
)  # fmt: skip
#: What it says where a process, or all of them together, have too many files open; and what to do.
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
MORE_FILES = "allow more open files: ulimit -n, or end other programs"
# What Python, the loader of libraries, MLX and torch say where no memory is left.
_NO_MEMORY = (
    "failed to map segment", "cannot allocate memory", "can't start new thread",
    "unable to allocate", "bad_alloc", "not enough memory",
)  # fmt: skip

# Characters of an error that are shown of its beginning and of its end, where there are more.
_ENDS = 450, 300


class HierMemError(Exception):
    """Base class of all errors that come from wrong use or bad input.

    Args:
        text: for people. What cannot be printed in it (a file may have put it there) is escaped,
            and what is too long for a line is cut out of its middle: its end says what to do.
    """

    def __init__(self, text: str = "") -> None:
        if not text.isprintable():
            text = "".join(map(_printable, text))
        super().__init__(
            text if len(text) <= sum(_ENDS) else f"{text[: _ENDS[0]]} … {text[-_ENDS[1] :]}"
        )


def _printable(letter: str) -> str:
    if letter.isprintable():
        return letter
    return " " if letter.isspace() else ascii(letter)[1:-1]


class ConfigError(HierMemError):
    """A configuration is unknown, incomplete or contradicts itself or the files."""


class FormatError(HierMemError):
    """A file is missing, truncated, altered, or not what its name and place say."""


class PathError(HierMemError):
    """A cluster path or cluster does not exist in the tree."""


class BudgetError(HierMemError):
    """A memory budget cannot hold what has to be held."""


class InputError(HierMemError):
    """A prompt, text or option cannot be used."""


class ThreadError(HierMemError):
    """Something is used by another thread than the one that it belongs to."""


class TrainingError(HierMemError):
    """Training cannot start or go on."""


def one_line(what: object, longest: int = 200) -> str:
    """What another library or a file says, to be a part of a line of ours: printable, and cut."""
    text = " ".join(str(what).split())[:longest]
    return "".join(map(_printable, text))[:longest]


def of_the_machine(error: BaseException) -> str | None:
    """What the machine has not, if that is why there is an error; None otherwise.

    Nobody made a mistake then, and what was asked for may be had elsewhere.
    """
    found: BaseException | None = error
    while found is not None:
        text = " ".join(str(found).split())
        memory = isinstance(found, MemoryError) or getattr(found, "errno", 0) == errno.ENOMEM
        told = isinstance(found, ImportError | RuntimeError | OSError)
        if memory or (told and any(words in text.lower() for words in _NO_MEMORY)):
            # numpy's reason is behind many lines of advice.
            reason = f"{type(found).__name__}: {text}"[-200:].rpartition("error was: ")[2]
            return (
                f"not enough memory ({reason}); end other programs, or allow this one more "
                "(ulimit -v, or the limit of its container)"
            )
        found = found.__cause__ or found.__context__
    if isinstance(error, OSError) and error.errno in (*_DISK, *TOO_MANY_FILES):
        where = f"{error.filename}: " if error.filename else ""
        disk = error.errno in _DISK
        advice = "check the disk and its free space" if disk else MORE_FILES
        return f"{where}{error.strerror}; {advice}, and try again"
    return None
