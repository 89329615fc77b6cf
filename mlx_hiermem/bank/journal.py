"""How several files of a bank change at one moment, for readers and through crashes.

New versions are written whole, beside their place, as ``.edit-NAME``; then the journal
``.edit.json`` is put in place, which is the moment when they count; then they are renamed to their
names, the manifest last, and the journal is removed. So:

- before the journal is there, a reader and a crash see the old bank;
- while it is there, a reader takes ``.edit-NAME`` where it still exists, and the file under its own
  name where it was renamed already: the new bank; who edits next after a crash finishes the rest;
- a file that is open stays what it was.

Reading writes nothing, so it works on a disk that is read-only, journal or not.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from ..errors import FormatError
from ..files import AtomicFile, sync_folder
from .files import check_name, read_text
from .manifest import MANIFEST

JOURNAL = ".edit.json"
#: Put before the name of a file whose new version is written.
PREFIX = ".edit-"
_LIMIT = 1 << 22


class Snapshot:
    """Which files make up the bank in ``folder`` now.

    Raises:
        FormatError: the journal is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = _mark(folder)
        self._names = read_journal(folder)
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


def read_journal(folder: Path) -> frozenset[str]:
    """Names of the files that a committed edit replaces; none if there is no journal.

    Raises:
        FormatError: the journal is damaged.
    """
    try:
        if not os.path.lexists(folder / JOURNAL):
            return frozenset()
        text = read_text(folder, JOURNAL, _LIMIT)
    except FormatError:
        if not os.path.lexists(folder / JOURNAL):  # the edit has ended meanwhile
            return frozenset()
        raise
    try:
        names = json.loads(text)["files"]
        if not isinstance(names, list) or MANIFEST not in names:
            raise ValueError
        if not all(isinstance(n, str) and "/" not in n and check_name(n) for n in names):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError(
            f"{folder / JOURNAL}: not the journal of an edit; remove it if the bank was copied or "
            "downloaded, or copy it again"
        ) from None
    return frozenset(names)


# ---- for who edits ---------------------------------------------------------------------


def commit(folder: Path, names: Sequence[str]) -> None:
    """Put the new versions of ``names``, which are all written and synced, in force.

    Raises:
        FormatError: the journal cannot be written; nothing has changed then.
    """
    with AtomicFile(folder, JOURNAL) as file:
        file.write((json.dumps({"files": sorted(names)}) + "\n").encode())


def apply(folder: Path) -> None:
    """Bring the files of a committed edit to their places. Does nothing without a journal.

    Raises:
        FormatError: the journal is damaged, or a file cannot be renamed; what is in force stays so.
    """
    names = read_journal(folder)
    if not names:
        return
    try:
        for name in sorted(names, key=lambda name: (name == MANIFEST, name)):
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
