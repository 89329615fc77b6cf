"""manifest.json: the size and sha256 of every file of a bank, and the bank's revision.

It is written last, so a folder without it holds no bank yet. Notable: the revision can be
made with ``sha256sum`` alone; see :func:`revision_of`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ADDED_VERSION, FORMAT_VERSION
from ..errors import FormatError
from ..files import AtomicFile
from .files import check_name, find, hash_file, read_text
from .layout import is_added_tree

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The file table (names relative to the folder) and the revision that follows from it."""

    files: Mapping[str, FileEntry]
    revision: str


def revision_of(files: Mapping[str, FileEntry]) -> str:
    """The sha256 (hex) of the lines ``<sha256>  <name>``, ordered by name, as UTF-8.

    These are the lines that ``sha256sum`` prints.
    """
    lines = (f"{files[name].sha256}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(folder: Path, known: Mapping[str, FileEntry] | None = None) -> Manifest:
    """Write the manifest over every file in ``folder`` (folders in it too; hidden ones not).

    Args:
        folder: the memory folder.
        known: entries of files that were hashed while they were written; others are read.

    Raises:
        FormatError: a file cannot be read, has a name that cannot be listed, or is a link.
    """
    known = known or {}
    files = {}
    for name in _names(folder):
        path = folder / name
        if not check_name(name):
            raise FormatError(f"{str(path)!r}: cannot be listed in the manifest; rename the file")
        if path.is_symlink():
            raise FormatError(f"{path}: is a link; put the file itself there")
        files[name] = known.get(name) or FileEntry(*hash_file(folder, name))
    manifest = Manifest(files, revision_of(files))
    with AtomicFile(folder, MANIFEST) as file:
        file.write(manifest_bytes(manifest))
    return manifest


def manifest_bytes(manifest: Manifest) -> bytes:
    """The file of a manifest."""
    files = {
        name: {"bytes": entry.bytes, "sha256": entry.sha256}
        for name, entry in manifest.files.items()
    }
    version = _version(manifest.files)
    table = {"format_version": version, "revision": manifest.revision, "files": files}
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def _version(files: Iterable[str]) -> int:
    """The format version of a bank with these files: each added memory has a tree file."""
    return ADDED_VERSION if any(map(is_added_tree, files)) else FORMAT_VERSION


def _names(folder: Path) -> list[str]:
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in (*files, *links):
            relative = (Path(parent) / name).relative_to(folder).as_posix()
            if not name.startswith(".") and relative != MANIFEST:
                names.append(relative)
    return sorted(names)


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Read and check ``folder/manifest.json``; the files themselves are not looked at.

    Args:
        name: of the file to read for it (an edit that is being made has another).

    Raises:
        FormatError: it is missing or is not what docs/format.md says.
    """
    path = folder / MANIFEST

    def wrong(found: str) -> FormatError:
        return FormatError(f"{path}: {found}; copy, download or write the bank again")

    if not os.path.lexists(folder / name):  # False, not an error, where the disk has gone
        raise FormatError(
            f"{path}: no such file; the bank was not written to its end or not copied whole, "
            "write or download it again"
        )
    try:
        table = json.loads(read_text(folder, name))
    except (ValueError, RecursionError) as error:
        raise wrong(f"not valid JSON ({str(error)[:80]})") from None
    if not isinstance(table, dict) or set(table) != {"format_version", "revision", "files"}:
        raise wrong("expected an object with exactly format_version, revision and files")
    version = table["format_version"]
    if type(version) is not int or version not in (FORMAT_VERSION, ADDED_VERSION):
        raise FormatError(
            f"{path}: format_version is {repr(version)[:40]}, expected {FORMAT_VERSION} or "
            f"{ADDED_VERSION}; update mlx_hiermem or convert the bank"
        )
    if not isinstance(table["files"], dict):
        raise wrong("files is not an object")
    files = {name: _entry(name, value, wrong) for name, value in table["files"].items()}
    if version != _version(files):
        raise wrong(f"format_version is {version}, but its files are those of {_version(files)}")
    revision = revision_of(files)
    if table["revision"] != revision:
        raise wrong(
            f"revision is {str(table['revision'])[:64]!r}, but its file table gives {revision!r}"
        )
    return Manifest(files, revision)


def _entry(name: str, value: Any, wrong: Callable[[str], FormatError]) -> FileEntry:
    if not check_name(name) or name == MANIFEST:
        raise wrong(f"files names {name[:80]!r}, expected a relative name inside the folder")
    if (
        not isinstance(value, dict)
        or set(value) != {"bytes", "sha256"}
        or type(value["bytes"]) is not int
        or not 0 <= value["bytes"] < 2**63
        or not isinstance(value["sha256"], str)
        or not re.fullmatch("[0-9a-f]{64}", value["sha256"])
    ):
        raise wrong(f"the entry of {name} is not an object of bytes and sha256")
    return FileEntry(value["bytes"], value["sha256"])


def check_listed(folder: Path, manifest: Manifest, expected: Iterable[str]) -> None:
    """Raise FormatError if a file that the config asks for is not in the manifest."""
    missing = [name for name in expected if name not in manifest.files]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FormatError(
            f"{folder / MANIFEST}: does not list {', '.join(missing[:3])}{more}, which config.json "
            "asks for; the bank is not complete or its config was changed, download it again"
        )


def check_size(path: Path, size: int, entry: FileEntry) -> None:
    """Raise FormatError if a file does not have the size listed."""
    if size != entry.bytes:
        state = "truncated" if size < entry.bytes else "changed"
        raise FormatError(
            f"{path}: {state}: {size} bytes, {MANIFEST} says {entry.bytes}; copy or download the "
            "bank again"
        )


def check_sha256(path: Path, sha256: str, entry: FileEntry) -> None:
    """Raise FormatError if a file does not have the checksum listed."""
    if sha256 != entry.sha256:
        raise FormatError(
            f"{path}: altered: sha256 is {sha256}, {MANIFEST} says {entry.sha256}; one of them is "
            "of another revision, download the bank again"
        )


def verify_files(
    folder: Path,
    manifest: Manifest,
    progress: Callable[[int], None] | None = None,
    real_name: Callable[[str], str] = str,
) -> list[dict[str, Any]]:
    """Hash every file of the manifest.

    Args:
        progress: called with the number of bytes read since the call before.
        real_name: gives the name that a file has now (while an edit comes into force, another).

    Returns:
        For each file ``{"file", "bytes", "sha256", "ok": True}``, in the manifest's order.

    Raises:
        FormatError: at the first file that is missing or differs, naming it.
    """
    results = []
    for name, entry in manifest.files.items():
        real = real_name(name)
        check_size(folder / name, find(folder, real).stat().st_size, entry)
        size, sha256 = hash_file(folder, real, progress)
        check_size(folder / name, size, entry)
        check_sha256(folder / name, sha256, entry)
        results.append({"file": name, "bytes": size, "sha256": sha256, "ok": True})
    return results
