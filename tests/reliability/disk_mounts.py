"""Disks that are full, cannot be written, or go away: real ones, where this machine lets us mount.

``Memory`` is a small tmpfs. ``Image`` is an ext4 in a file, which can be cut off at any moment: all
that is not on it by then is lost, as when power fails.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

#: FS_IOC_SHUTDOWN of Linux, and its argument for: without writing down what is in memory.
_SHUTDOWN, _AT_ONCE = 0x8004587D, 2

#: Files and folders that no test needs.
MANY = 1 << 20


def _system(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout.strip()


class Memory:
    """A tmpfs of so many bytes, mounted at ``folder``. A context manager.

    Args:
        files: the most files and folders that it takes.
    """

    def __init__(self, folder: Path, size: int, files: int = MANY) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        _system("mount", "-t", "tmpfs", "-o", _options(size, files), "tmpfs", folder)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        _system("umount", "-l", self.folder)

    def resize(self, size: int, files: int = MANY) -> None:
        """Give it another size."""
        _system("mount", "-o", f"remount,{_options(size, files)}", self.folder)

    def set_writable(self, writable: bool) -> None:
        """Let it be written, or not."""
        _system("mount", "-o", f"remount,{'rw' if writable else 'ro'}", self.folder)


def _options(size: int, files: int) -> str:
    return f"size={-(-size // 4096) * 4096},nr_inodes={files}"


class Image:
    """An ext4 of so many bytes at ``folder``. A context manager.

    It is mounted under another name, and that at ``folder``: so that it can be taken out and put in
    while files of it are open.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self._home = folder.with_name(f"{folder.name}.home")
        self._file = folder.with_name(f"{folder.name}.img")
        for path in (folder, self._home):
            path.mkdir(parents=True, exist_ok=True)
        with self._file.open("wb") as file:
            file.truncate(size)
        _system("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", self._file)
        self._connect()

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self._disconnect()
        self._file.unlink()

    def _connect(self) -> None:
        # A device of its own, not that of a disk which was cut off and whose files are open still.
        device = _system("losetup", "--find", "--show", self._file)
        try:
            _system("mount", device, self._home)
        finally:
            _system("losetup", "--detach", device)  # when nobody uses it any more
        self.put_in()

    def _disconnect(self) -> None:
        self.take_out()
        _system("umount", "-l", self._home)

    def sync(self) -> None:
        """Write down all that is in memory."""
        _system("sync", "-f", self._home)

    def cut_off(self) -> None:
        """From now on every read and write of it fails, and what was not written down is lost."""
        fd = os.open(self._home, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _AT_ONCE))
        finally:
            os.close(fd)

    def connect(self) -> None:
        """Mount it again. Who has files of it open keeps those of the disk that was cut off."""
        self._disconnect()
        self._connect()

    def take_out(self) -> None:
        """Nobody finds it any more; who has files of it open may go on with them."""
        _system("umount", "-l", self.folder)

    def put_in(self) -> None:
        """It can be found again."""
        _system("mount", "--bind", self._home, self.folder)


@cache
def can_mount() -> bool:
    """Whether this machine lets us mount a tmpfs."""
    with TemporaryDirectory() as folder:
        try:
            with Memory(Path(folder) / "disk", 1 << 20):
                return True
        except OSError:
            return False


@cache
def can_cut_off() -> bool:
    """Whether this machine lets us mount a disk and cut it off."""
    if shutil.which("mkfs.ext4") is None:
        return False
    with TemporaryDirectory() as folder:
        try:
            with Image(Path(folder) / "disk", 16 << 20) as disk:
                disk.cut_off()
                disk.connect()
                return True
        except OSError:
            return False
