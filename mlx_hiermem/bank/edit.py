"""BankEdit: changes to a bank that come into force together, or not at all (``journal``).

Files that change are written anew, whole: what readers have open stays as it was. So one block
costs the writing of its level file. What is copied is checked against the manifest on the way, so
that damage on the disk does not come out with a valid sha256.

What is removed is also overwritten in the old file, once the new one is in force (``journal``).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ..errors import FormatError
from ..files import AtomicFile
from . import journal
from .address import check_block, check_cluster, check_level
from .blocked import BLOCKED, MOST_BYTES, BlockedBlocks, blocked_bytes
from .checksums import CHECKSUMS, Digests, write_checksums
from .dtypes import STORAGE
from .manifest import MANIFEST, FileEntry, Manifest, manifest_bytes, revision_of
from .reader import BlockReader
from .stored import StoredLayout

#: The names of clusters, which only ``routing`` reads.
NAMES = "names.json"


class BankEdit:
    """An edit of the bank in ``folder``. A context manager: it commits on leaving without an error.

        with BankEdit(folder) as edit:
            edit.set_blocked({(1, 3)})
        edit.revision

    Args:
        folder: the memory folder; all files of the bank lie in it.
        progress: called with (bytes to write in all, bytes written since the call before).
        step: called with a word before each step of the commit; for tests.

    Attributes:
        reader: the bank as it is before the edit.
        revision: of the bank; after the commit the new one.

    Raises:
        FormatError: the bank is damaged, another process edits it, or it cannot be written. Nothing
            has changed then.
    """

    def __init__(
        self,
        folder: str | Path,
        progress: Callable[[int, int], None] | None = None,
        step: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self._progress = progress or (lambda total, count: None)
        self._step = step or (lambda name: None)
        self._rows: dict[tuple[int, int], dict[int, bytes]] = {}  # (level, shard) -> row
        self._blocked: frozenset[tuple[int, int]] | None = None
        self._removed: set[tuple[int, int]] = set()
        self._digests: Digests | None = None
        self._names_file: bytes | None = None
        self._forget_names = False
        self._lock = -1

    def __enter__(self) -> BankEdit:
        try:
            self._lock = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise FormatError(
                f"{self.folder}: cannot be opened ({error.strerror}); expected the memory folder "
                "of a model"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            if isinstance(error, BlockingIOError):
                reason = "another process is editing the bank; wait for it"
            else:
                reason = f"cannot be locked ({error.strerror}); edit it on a local disk"
            raise FormatError(f"{self.folder}: {reason}") from None
        try:
            journal.apply(self.folder)  # an edit that was killed after its commit
            self._clear()
            self.reader = BlockReader(self.folder)
        except BaseException:
            os.close(self._lock)
            raise
        self.config = self.reader.config
        self.revision = self.reader.manifest.revision
        self._layout = StoredLayout(self.config)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._commit()
            else:
                self._clear()
        finally:
            self.reader.close()
            os.close(self._lock)

    # ---- what is to change -------------------------------------------------------------

    def replace_blocks(self, level: int, blocks: Mapping[int, np.ndarray | bytes]) -> None:
        """Replace stored blocks. What is given is copied. A block that was removed is there again.

        Args:
            blocks: by cluster the stored bytes, or an array of the storage dtype, (stored_size,).

        Raises:
            PathError: there is no such block.
            FormatError: a block has another size or dtype, or numbers that are not finite.
        """
        level = check_level(self.config, level)
        for cluster, block in blocks.items():
            cluster = check_cluster(self.config, level, cluster)
            stored = self._checked(level, cluster, block)
            index, row = self.reader.locate(level, cluster)
            self._rows.setdefault((level, index), {})[row] = stored
            self._removed.discard((level, cluster))

    def remove_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Put zeros in the place of blocks, for good; see ``remove``.

        Raises:
            PathError: there is no such block.
        """
        found = {check_block(self.config, pair) for pair in pairs}
        zeros = {level: bytes(self.config.block_bytes(level)) for level, _ in found}
        for level, cluster in found:
            index, row = self.reader.locate(level, cluster)
            self._rows.setdefault((level, index), {})[row] = zeros[level]
        self._removed |= found

    def _checked(self, level: int, cluster: int, block: np.ndarray | bytes) -> bytes:
        what = f"{self.folder}: block {cluster} of level {level} is given"
        dtype = np.dtype(STORAGE[self.config.stored_dtype])
        if isinstance(block, np.ndarray) and block.dtype != dtype:
            raise FormatError(f"{what} in {block.dtype}, expected {dtype}, as it is stored")
        stored = block.tobytes() if isinstance(block, np.ndarray) else bytes(block)
        size = self.config.block_bytes(level)
        if len(stored) != size:
            raise FormatError(f"{what} as {len(stored)} bytes, expected {size}")
        if not self._layout.finite(np.frombuffer(stored, np.uint8)):
            raise FormatError(f"{what} with NaN or infinite numbers; expected finite ones")
        return stored

    def set_blocked(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Set which blocks are blocked, as pairs (level, cluster).

        Raises:
            PathError: there is no such block.
        """
        self._blocked = frozenset(check_block(self.config, pair) for pair in pairs)

    def set_names(self, data: bytes, forget: bool = False) -> None:
        """Set the file with the names of clusters, given whole (``routing/names.py``).

        Args:
            forget: overwrite the old file on the disk.
        """
        self._names_file, self._forget_names = data, forget

    def set_checksums(self, digests: Digests) -> None:
        """Give the bank checksums of its blocks, which have to be those that it has now."""
        self._digests = digests

    # ---- the commit --------------------------------------------------------------------

    def _commit(self) -> None:
        changed: dict[str, FileEntry] = {}
        try:
            blocked = self._new_blocked()  # what is too large is refused before the first write
            overwrite = self._to_overwrite()
            self._check_space(sum(end - at for found in overwrite.values() for at, end in found))
            self._step("write")
            for (level, index), rows in self._rows.items():
                shard = self.reader.shards(level)[index]
                changed[shard.name] = self._write(shard.name, self._shard(level, index, rows))
            changed |= self._changed_checksums()
            if blocked is not None:
                changed[BLOCKED] = self._write(BLOCKED, [blocked])
            if self._names_file is not None:
                changed[NAMES] = self._write(NAMES, [self._names_file])
            changed = {
                name: entry
                for name, entry in changed.items()
                if entry != self.reader.manifest.files.get(name)
            }
            if not changed:
                self._clear()
                return
            files = dict(sorted({**self.reader.manifest.files, **changed}.items()))
            manifest = Manifest(files, revision_of(files))
            self._write(MANIFEST, [manifest_bytes(manifest)])
            self._step("journal")
            overwrite = {name: found for name, found in overwrite.items() if name in changed}
            journal.commit(self.folder, [*changed, MANIFEST], overwrite)
        except BaseException:
            self._clear()
            raise
        self.revision = manifest.revision
        self._step("apply")
        journal.apply(self.folder, self._step, lambda count: self._progress(self._total, count))
        self._clear()
        self._step("done")

    def _check_space(self, in_place: int) -> None:
        written = sum(self.reader.manifest.files[name].bytes for name in self._names())
        free = shutil.disk_usage(self.folder).free
        self._total = written + in_place
        if free < written + (1 << 20):
            raise FormatError(
                f"{self.folder}: the edit writes {written:,} bytes, and {free:,} are free; "
                "make room on the disk"
            )

    def _to_overwrite(self) -> dict[str, list[journal.Range]]:
        """Which bytes of old files must not stay on the disk; each file can be written in place."""
        found: dict[str, list[journal.Range]] = {}
        for level, cluster in sorted(self._removed):
            file, start = self.reader.find(level, cluster)
            begin = file.offset + start
            ranges = found.setdefault(file.name, [])
            if ranges and ranges[-1][1] == begin:
                begin = ranges.pop()[0]
            ranges.append((begin, file.offset + start + self.config.block_bytes(level)))
        if self._forget_names and NAMES in self.reader.manifest.files:
            found[NAMES] = [(0, self.reader.manifest.files[NAMES].bytes)]
        for name in found:
            self._check_own(self.folder / name)
        return found

    def _check_own(self, path: Path) -> None:
        """FormatError if a file cannot be overwritten, or if that would change another's too."""
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode) or status.st_nlink > 1:
            kind = "is a link" if stat.S_ISLNK(status.st_mode) else "has several names (hard links)"
            raise FormatError(
                f"{path}: {kind}, so that the numbers are, or belong, elsewhere too; copy the "
                "model folder (cp -rL), remove from the copy, and delete the other"
            )
        try:
            os.close(journal.open_to_overwrite(path))
        except OSError as error:
            raise FormatError(
                f"{path}: cannot be overwritten ({error.strerror}); what is removed would stay on "
                "the disk, make the file writable"
            ) from None

    def _names(self) -> list[str]:
        return [self.reader.shards(level)[index].name for level, index in self._rows]

    def _write(self, name: str, chunks: Iterable[bytes | memoryview]) -> FileEntry:
        with AtomicFile(self.folder, journal.PREFIX + name) as file:
            for chunk in chunks:
                file.write(chunk)
                self._progress(self._total, memoryview(chunk).nbytes)
        self._keep_mode(name)
        return FileEntry(file.size, file.sha256)

    def _keep_mode(self, name: str) -> None:
        """Let the new version of a file be read by whom the old one can be read."""
        try:
            mode = os.stat(self.folder / name).st_mode
        except FileNotFoundError:
            return
        os.chmod(self.folder / (journal.PREFIX + name), stat.S_IMODE(mode))

    def _shard(self, level: int, index: int, rows: Mapping[int, bytes]) -> Iterator[memoryview]:
        """A level file with other rows, as a stream; at its end FormatError if the old file is not
        what the manifest says."""
        shard = self.reader.shards(level)[index]
        head = memoryview(self.reader.head(level, index))
        old = hashlib.sha256(head)
        yield head
        for row in range(shard.rows):
            stored = memoryview(self.reader.stored(level, shard.first + row)).cast("B")
            old.update(stored)
            yield memoryview(rows[row]) if row in rows else stored
        if old.hexdigest() != self.reader.manifest.files[shard.name].sha256:
            raise FormatError(
                f"{self.folder / shard.name}: is not what {MANIFEST} says, so that an edit would "
                "hide the damage; copy or download the file again"
            )

    def _new_blocked(self) -> bytes | None:
        """``blocked.json``, where it lists other blocks than before; FormatError if no reader would
        take it."""
        before = self.reader.blocked
        written = {
            (level, self.reader.shards(level)[index].first + row)
            for (level, index), rows in self._rows.items()
            for row in rows
        }
        blocked = before if self._blocked is None else self._blocked
        after = BlockedBlocks(blocked, (before.removed - written) | self._removed)
        if (after, after.removed) == (before, before.removed):
            return None
        data = blocked_bytes(after)
        if len(data) > MOST_BYTES:
            raise FormatError(
                f"{self.folder / BLOCKED}: would have {len(data):,} bytes for "
                f"{len(after) + len(after.removed):,} blocks that are blocked or removed, expected "
                f"at most {MOST_BYTES:,}; name fewer of them, or open the bank without whole "
                "levels (--levels)"
            )
        return data

    def _changed_checksums(self) -> dict[str, FileEntry]:
        if self._digests is not None:
            arrays = self._digests.arrays()
        elif self.reader.checksums is not None and self._rows:
            known = self.reader.checksums
            names = [*(f"level{level}" for level in self.config.memory_levels), "generic"]
            arrays = {name: bytearray(known[name].tobytes()) for name in names}
        else:
            return {}
        for (level, index), rows in self._rows.items():
            first = self.reader.shards(level)[index].first
            for row, stored in rows.items():
                at = 32 * (first + row)
                arrays[f"level{level}"][at : at + 32] = hashlib.sha256(stored).digest()
        entry = write_checksums(self.folder, arrays, journal.PREFIX + CHECKSUMS)
        self._keep_mode(CHECKSUMS)
        return {CHECKSUMS: entry}

    def _clear(self) -> None:
        """Remove what an edit that did not commit has left."""
        if os.path.lexists(self.folder / journal.JOURNAL):
            return
        try:
            journal.discard(self.folder)
        except OSError as error:
            raise FormatError(
                f"{self.folder}: cannot be edited ({error.strerror}); the folder has to be writable"
            ) from None
