"""How several files of a bank change at one moment, for readers and through crashes.

New versions are written whole, beside their place, as ``.edit-NAME``; then the journal
``.edit.json`` is put in place, which is the moment when they count; then they are renamed to their
names, the manifest last, and the journal is removed. So:

- before the journal is there, a reader and a crash see the old bank;
- while it is there, a reader takes ``.edit-NAME`` where it still exists, and the file under its own
  name where it was renamed already: the new bank; who edits next after a crash finishes the rest;
- a file that is open stays what it was, but for what an edit removes: the journal also lists the
  bytes of old versions that are overwritten with zeros before their file is given up, so that they
  are not left in the free space of the disk. Who finishes an edit begins with that; a file that has
  its new version already has zeros there.

Reading writes nothing, so it works on a disk that is read-only, journal or not.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..files import AtomicFile, sync_folder
from .files import check_name, read_text
from .manifest import MANIFEST

JOURNAL = ".edit.json"
#: Put before the name of a file whose new version is written.
PREFIX = ".edit-"
_LIMIT = 1 << 22
_ZEROS = memoryview(bytes(1 << 20))

#: Bytes of a file, from the first to the one behind the last.
Range = tuple[int, int]


@dataclass(frozen=True)
class Journal:
    """What the journal says.

    Attributes:
        files: names of the files that a committed edit replaces; none without a journal.
        overwrite: by name, the bytes of its old version that must not stay on the disk.
    """

    files: frozenset[str] = frozenset()
    overwrite: Mapping[str, tuple[Range, ...]] = field(default_factory=dict)


class Snapshot:
    """Which files make up the bank in ``folder`` now.

    Raises:
        FormatError: the journal is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = _mark(folder)
        self._names = read_journal(folder).files
        self._hidden: set[str] = set()

    def name(self, name: str) -> str:
        """The file to open for ``name``: its new version, where an edit has put that in force."""
        if name in self._names and os.path.lexists(self._folder / (PREFIX + name)):
            self._hidden.add(PREFIX + name)
            return PREFIX + name
        return name

    def stale(self) -> bool:
        """Whether files have changed places since, so that what was opened may be a mixture."""
        renamed = any(not os.path.lexists(self._folder / hidden) for hidden in self._hidden)
        return renamed or _mark(self._folder) != self._mark


def _mark(folder: Path) -> tuple[tuple[int, int, int] | None, ...]:
    """Changes with every commit, and when its renames have ended."""
    marks: list[tuple[int, int, int] | None] = []
    for name in (JOURNAL, MANIFEST):
        try:
            status = os.lstat(folder / name)
            marks.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            marks.append(None)
    return tuple(marks)


def read_journal(folder: Path) -> Journal:
    """The journal of ``folder``; empty if there is none.

    Raises:
        FormatError: the journal is damaged.
    """
    try:
        if not os.path.lexists(folder / JOURNAL):
            return Journal()
        text = read_text(folder, JOURNAL, _LIMIT)
    except FormatError:
        if not os.path.lexists(folder / JOURNAL):  # the edit has ended meanwhile
            return Journal()
        raise
    try:
        table = json.loads(text)
        names, overwrite = table["files"], table.get("overwrite", {})
        if not isinstance(names, list) or MANIFEST not in names:
            raise ValueError
        if not all(isinstance(n, str) and "/" not in n and check_name(n) for n in names):
            raise ValueError
        if not isinstance(overwrite, dict) or not overwrite.keys() <= {*names} - {MANIFEST}:
            raise ValueError
        ranges = {name: tuple(map(_range, found)) for name, found in overwrite.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(
            f"{folder / JOURNAL}: not the journal of an edit; remove it if the bank was copied or "
            "downloaded, or copy it again"
        ) from None
    return Journal(frozenset(names), ranges)


def _range(value: Any) -> Range:
    start, end = value
    if type(start) is not int or type(end) is not int or not 0 <= start < end < 2**63:
        raise ValueError
    return start, end


def unfinished(folder: Path) -> bool:
    """Whether an edit was stopped before what it removes was overwritten on the disk."""
    return any(os.path.lexists(folder / (PREFIX + name)) for name in read_journal(folder).overwrite)


def check_finished(folder: Path) -> None:
    """Raise FormatError if files of the bank do not lie under their names, as an edit was stopped
    while it came into force: for who copies them as they lie."""
    if read_journal(folder).files:
        raise FormatError(
            f"{folder}: an edit was stopped before its end; make it again, which brings it to its "
            "end (so does any other edit)"
        )


# ---- for who edits ---------------------------------------------------------------------


def commit(
    folder: Path, names: Sequence[str], overwrite: Mapping[str, Iterable[Range]] | None = None
) -> None:
    """Put the new versions of ``names``, which are all written and synced, in force.

    Args:
        overwrite: by name, the bytes of the old version to overwrite; see :class:`Journal`.

    Raises:
        FormatError: the journal cannot be written, or would be too long; nothing has changed then.
    """
    table: dict[str, Any] = {"files": sorted(names)}
    if overwrite:
        table["overwrite"] = {name: list(ranges) for name, ranges in sorted(overwrite.items())}
    data = (json.dumps(table) + "\n").encode()
    if len(data) > _LIMIT:
        raise FormatError(
            f"{folder / JOURNAL}: the edit is too large: {len(data):,} bytes, at most {_LIMIT:,}; "
            "make it in several steps"
        )
    with AtomicFile(folder, JOURNAL) as file:
        file.write(data)


def apply(
    folder: Path,
    step: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Bring the files of a committed edit to their places. Does nothing without a journal.

    Args:
        step: called with "overwrite" and "rename" before each; for tests.
        progress: called with the number of bytes overwritten since the call before.

    Raises:
        FormatError: the journal is damaged, or a file cannot be overwritten or renamed; what is in
            force stays so, and the journal stays where it is.
    """
    journal, step = read_journal(folder), step or (lambda name: None)
    if not journal.files:
        return
    try:
        if journal.overwrite:
            step("overwrite")
        for name, ranges in sorted(journal.overwrite.items()):
            # Without its new version beside it, it is the new version itself.
            if os.path.lexists(folder / (PREFIX + name)) and os.path.lexists(folder / name):
                _overwrite(folder / name, ranges, progress or (lambda count: None))
        step("rename")
        for name in sorted(journal.files, key=lambda name: (name == MANIFEST, name)):
            hidden = folder / (PREFIX + name)
            if os.path.lexists(hidden):
                if not stat.S_ISREG(os.lstat(hidden).st_mode):
                    raise FormatError(
                        f"{hidden}: not a file of its own, expected the new version of {name}; "
                        f"remove {folder / JOURNAL} if the bank was copied or downloaded"
                    )
                os.replace(hidden, folder / name)
        sync_folder(folder)
        (folder / JOURNAL).unlink()
        sync_folder(folder)
    except OSError as error:
        raise FormatError(
            f"{folder}: an edit cannot be brought to its end ({error.strerror}); it is in force "
            "all the same, edit again when the disk can be written"
        ) from None


def open_to_overwrite(path: Path) -> int:
    """A descriptor to write in place with; OSError for what is no regular file, or a link."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | getattr(os, "O_CLOEXEC", 0)
    fd = os.open(path, flags | os.O_NONBLOCK)  # a pipe would be waited for
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def _overwrite(path: Path, ranges: Iterable[Range], progress: Callable[[int], None]) -> None:
    """Write zeros over bytes of a file, in place, and wait until the disk has them."""
    fd = open_to_overwrite(path)
    try:
        size = os.fstat(fd).st_size  # the file must not grow
        for start, end in ranges:
            while start < min(end, size):
                count = os.pwrite(fd, _ZEROS[: min(end, size) - start], start)
                start += count
                progress(count)
        os.fsync(fd)
    finally:
        os.close(fd)


def discard(folder: Path) -> None:
    """Remove the journal and all new versions of files, in force or not.

    Raises:
        OSError: they cannot be removed.
    """
    (folder / JOURNAL).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        # An atomic write that was killed leaves ``..edit-NAME.partial``.
        if path.name.startswith((PREFIX, "." + PREFIX, "." + JOURNAL)):
            path.unlink(missing_ok=True)
