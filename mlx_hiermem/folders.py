"""Model folders as a whole: they appear under their name when all is written, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path

from .errors import FormatError, InputError
from .files import AtomicFile, sync_folder

_CHUNK = 1 << 22
#: The files of an anchor's folder, as patterns of their names: weights, and everything else.
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")
OTHERS = ("*.json", "tokenizer*", "*.jinja", "*.txt", "LICENSE*")
# One of these is in every folder that ``overwrite`` may replace: a model, or a bank for PyTorch.
_MARKS = ("config.json", "memory_config.json")


@contextmanager
def model_folder(
    out: str | Path, *, overwrite: bool = False, keep: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """A folder to write a model into, which becomes ``out`` on leaving without an error.

        with model_folder("my-model") as folder:
            ...  # write into folder

    Until then it is the hidden folder ``.NAME.partial`` beside ``out``. On leaving, all of it is
    synced to the disk and renamed; on an error it is removed. What a killed process has left there
    is removed by the next one; a lock keeps two processes apart.

    Args:
        overwrite: let it take the place of a model folder that is there, which stays until all is
            written.
        keep: asked whether to go on with what a killed process has left in the folder it is given.
            With it, an interrupt (Ctrl-C) leaves the folder there too.

    Raises:
        InputError: ``out`` exists, or another process is writing it.
        FormatError: it cannot be written.
    """
    out = Path(out).expanduser()
    check_new(out, overwrite)
    out = out.parent.resolve() / out.name
    made = [parent for parent in (out.parent, *out.parent.parents) if not parent.exists()]
    temporary = out.parent / f".{out.name}.partial"
    done, lock = False, -1
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            done = True  # it is theirs: not to be removed
            raise InputError(
                f"{out}: another process is writing it now; wait for it, or give another name"
            ) from None
        _bring_back(out)
        check_new(out, overwrite)
        if keep is None or not keep(temporary):
            for path in temporary.iterdir():
                _remove(path)
        yield temporary
        check_new(out, overwrite)
        _sync_tree(temporary)
        _put_in_place(temporary, out)
        done = True
    except (KeyboardInterrupt, SystemExit):
        done = keep is not None
        raise
    except OSError as error:
        raise FormatError(
            f"{out}: cannot be written ({error.strerror or error}); check the folder and free space"
        ) from None
    finally:
        if not done:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in made:  # the innermost first; those that hold something stay
                try:
                    parent.rmdir()
                except OSError:
                    break
        if lock >= 0:
            os.close(lock)


def check_new(out: Path, overwrite: bool = False) -> None:
    """Raise InputError where ``out``, the folder to be written, exists already.

    Args:
        overwrite: it may be a model folder, or an empty one; nothing else is replaced.
    """
    if not out.name:
        raise InputError(f"{str(out)!r}: no name of a folder; give the model folder to write")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(f"{out}: exists already; remove it, or give another folder")
    if out.is_symlink() or not out.is_dir():
        raise InputError(f"{out}: is no folder; only a model folder is overwritten")
    if any(out.iterdir()) and not any((out / name).is_file() for name in _MARKS):
        raise InputError(
            f"{out}: holds something else than a model (no config.json); give another folder"
        )


def _put_in_place(temporary: Path, out: Path) -> None:
    """Rename a finished folder to its name; what was there before goes when that is safe."""
    old = _old(out)
    if os.path.lexists(out):
        os.rename(out, old)
    os.rename(temporary, out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _bring_back(out: Path) -> None:
    """Put a folder back that a process killed while it replaced it has left aside."""
    old = _old(out)
    if not out.name or not old.is_dir():
        return
    if os.path.lexists(out):
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(old, out)


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def anchor_files(source: Path) -> list[str]:
    """Names of the files in a model's folder that make up the anchor and its tokenizer.

    Its README.md is not one of them: it may speak of another memory.
    """
    found = {path.name for pattern in OTHERS for path in source.glob(pattern) if path.is_file()}
    found |= {path.name for pattern in WEIGHTS for path in source.glob(pattern)}
    return sorted(name for name in found if not name.startswith("."))


def is_weights(name: str) -> bool:
    """Whether a file of an anchor is one of those with its weights."""
    return any(fnmatch(name, pattern) for pattern in WEIGHTS)


def copy_file(
    source: Path, folder: Path, name: str, progress: Callable[[int], None] | None = None
) -> AtomicFile:
    """Copy a file to ``folder``/``name``; it appears whole or not at all.

    Args:
        progress: called with the bytes copied since the call before.

    Returns:
        The file written: its ``size`` and ``sha256``.

    Raises:
        FormatError: one of them cannot be read or written.
    """
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    target = folder / name
    with AtomicFile(target.parent, target.name) as file:
        try:
            with open(source, "rb", buffering=0) as old:
                while chunk := old.read(_CHUNK):
                    file.write(chunk)
                    if progress is not None:
                        progress(len(chunk))
        except OSError as error:
            raise FormatError(f"{source}: cannot be read ({error.strerror})") from None
    return file


class Originals:
    """Files of a folder that are copied later, and have to be by then what they are now.

    What is looked at first and copied hours later may have been cut short, replaced or taken away
    in between: that is told, and not copied.

    Args:
        folder: that they are in.
        names: of them.

    Raises:
        FormatError: one of them cannot be read.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self._known = {name: self._state(name) for name in names}

    @property
    def names(self) -> list[str]:
        """Names of the files."""
        return list(self._known)

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return sum(size for size, _ in self._known.values())

    def copy(
        self, name: str, target: Path, progress: Callable[[int], None] | None = None
    ) -> AtomicFile:
        """Copy one of them to ``target``/``name``; as :func:`copy_file`.

        Raises:
            FormatError: it is not what it was, or cannot be read or written.
        """
        self._check(name)
        file = copy_file(self.folder / name, target, name, progress)
        self._check(name)
        return file

    def _check(self, name: str) -> None:
        if self._state(name) != self._known[name]:
            raise FormatError(
                f"{self.folder / name}: was changed while it was used; see what it is now, and run "
                "the command again"
            )

    def _state(self, name: str) -> tuple[int, int]:
        path = self.folder / name
        try:
            status = os.stat(path)
        except OSError as error:
            raise FormatError(
                f"{path}: cannot be read ({error.strerror}); bring it back, and run the command "
                "again"
            ) from None
        return status.st_size, status.st_mtime_ns


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_tree(folder: Path) -> None:
    """Bring all files of a folder, and their names, to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fd = os.open(Path(parent) / name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(parent))
