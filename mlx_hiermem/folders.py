"""Model folders as a whole: they appear under their name when all is written, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import FormatError, InputError
from .files import AtomicFile, sync_folder

_CHUNK = 1 << 22
#: The files of an anchor's folder, as patterns of their names: weights, and everything else.
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")
OTHERS = ("*.json", "tokenizer*", "*.jinja", "*.txt", "LICENSE*")


@contextmanager
def model_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write a model into, which becomes ``out`` on leaving without an error.

        with model_folder("my-model") as folder:
            ...  # write into folder

    Until then it is the hidden folder ``.NAME.partial`` beside ``out``. On leaving, all of it is
    synced to the disk and renamed; on an error it is removed. What a killed process has left there
    is removed by the next one; a lock keeps two processes apart.

    Raises:
        InputError: ``out`` exists, or another process is writing it.
        FormatError: it cannot be written.
    """
    out = Path(out).expanduser()
    check_new(out)
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
        for path in temporary.iterdir():
            _remove(path)
        yield temporary
        check_new(out)
        _sync_tree(temporary)
        os.rename(temporary, out)
        sync_folder(out.parent)
        done = True
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


def check_new(out: Path) -> None:
    """Raise InputError where ``out``, the folder to be written, exists already."""
    if not out.name:
        raise InputError(f"{str(out)!r}: no name of a folder; give the model folder to write")
    if os.path.lexists(out):
        raise InputError(f"{out}: exists already; remove it, or give another folder")


def anchor_files(source: Path, weights: bool = True) -> list[str]:
    """Names of the files in a model's folder that make up the anchor and its tokenizer.

    Its README.md is not one of them: it may speak of another memory.

    Args:
        weights: with the weights; without them for an anchor that has new ones.
    """
    found = {path.name for pattern in OTHERS for path in source.glob(pattern) if path.is_file()}
    of_weights = {path.name for pattern in WEIGHTS for path in source.glob(pattern)}
    chosen = found | of_weights if weights else found - of_weights
    return sorted(name for name in chosen if not name.startswith("."))


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
