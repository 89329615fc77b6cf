"""``mlx_hiermem bank remove``: remove blocks from a bank, for good."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ..generate import parse_block
from ..options import editable_folder

if TYPE_CHECKING:
    from ...bank.remove import Removal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="FOLDER", help="model folder whose bank is edited, in memory/"
    )
    parser.add_argument("--bank", metavar="FOLDER", help="memory folder, in place of --model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--block",
        dest="blocks",
        nargs="+",
        type=parse_block,
        default=[],
        metavar="LEVEL:CLUSTER",
        help="blocks, such as 2:40",
    )
    what.add_argument(
        "--subtree",
        dest="roots",
        nargs="+",
        type=_cluster,
        default=[],
        metavar="CLUSTER",
        help="clusters of level 1, each with all that is below it",
    )
    what.add_argument("--name", metavar="NAME", help="an added memory, with its clusters")
    parser.add_argument("--yes", action="store_true", help="do not ask; needed without a terminal")
    parser.set_defaults(revision=None, levels=None, subtrees=None)


def _cluster(text: str) -> int:
    return parse_block(f"1:{text}")[1]


def report(args: argparse.Namespace) -> dict[str, Any]:
    """What ``bank.remove.remove`` says.

    Raises:
        InputError: nobody has agreed, or there is nothing to remove.
        PathError: there is no such block.
        FormatError, ConfigError: the bank is damaged or cannot be written.
    """
    from ...bank.remove import finish

    if (args.model is None) == (args.bank is None):
        raise InputError("give the bank to edit: either --model FOLDER or --bank FOLDER")
    folder = editable_folder(args)
    finished = finish(folder)
    try:
        return _remove(folder, args)
    except InputError as error:
        more = "; what a removal that was stopped had left is overwritten now" if finished else ""
        raise InputError(f"{error}{more}") from None


def _remove(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from ...bank.extend import drop
    from ...bank.remove import remove
    from . import progress_bytes

    name = args.name
    roots = args.roots if name is None else _roots_of(folder, name)
    again = name is not None  # its numbers may be gone already, where this was stopped before
    if not args.yes:
        _ask(folder, args.blocks, roots, again)
    with progress_bytes(0, "remove") as bar:

        def progress(total: int, count: int) -> None:
            bar.total = total
            bar.update(count)

        found = remove(folder, args.blocks, roots, names_without, progress, again=again)
        if name is not None:
            found |= {"revision": drop(folder, name, progress), "name": name}
        return found


def _roots_of(folder: Path, name: str) -> list[int]:
    """The clusters of level 1 that an added memory has."""
    from ...bank.reader import BlockReader

    reader = BlockReader(folder)
    try:
        known = reader.config.added_roots()
    finally:
        reader.close()
    if name not in known:
        raise InputError(
            f"{folder}: has no added memory {name}; it has {', '.join(known) or 'none'}"
        )
    return list(known[name])


def _ask(folder: Path, blocks: list[tuple[int, int]], roots: list[int], again: bool) -> None:
    """Raise InputError unless somebody agrees."""
    from ...bank.reader import BlockReader
    from ...bank.remove import plan

    reader = BlockReader(folder)
    try:
        removal = plan(reader, blocks, roots, again)
    finally:
        reader.close()
    what = f"{describe(removal)} of {folder}"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError(
            f"nothing was removed: {what} would be gone for good, and there is no terminal to ask "
            "on; give --yes"
        )
    print(f"Remove {what}, for good? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError("nothing was removed")


def describe(removal: Removal) -> str:
    """Such as ``17 blocks (1 of level 1, 16 of level 2; 3.4 MB)``."""
    from .inspect import show_bytes

    return _blocks(removal.levels, show_bytes(removal.bytes))


def _blocks(levels: dict[Any, int], size: str) -> str:
    count = sum(levels.values())
    each = ", ".join(f"{number:,} of level {level}" for level, number in levels.items())
    return f"{count:,} block{'s' * (count != 1)} ({each}; {size})"


def names_without(folder: Path, clusters: Collection[tuple[int, int]]) -> bytes | None:
    """The file of names in which some clusters have none; None where nothing changes."""
    from ...routing.names import ClusterNames, unnamed

    names = ClusterNames.load(folder)
    if names is None:
        return None
    gone = set(clusters)
    blank = ClusterNames(
        [
            [unnamed(i) if (level, i) in gone else name for i, name in enumerate(known)]
            for level, known in enumerate(names.levels, 1)
        ]
    )
    return None if blank.levels == names.levels else blank.to_bytes()


def to_text(report: dict[str, Any]) -> str:
    """The report for people."""
    from .inspect import show_bytes

    names = "; names of these clusters are blank now" if report["names_changed"] else ""
    if "name" in report:
        names = f"; there is no memory {report['name']} any more"
    return (
        f"{report['folder']}: {_blocks(report['levels'], show_bytes(report['bytes']))} removed and "
        f"overwritten{names}; revision {report['revision'][:12]}\n"
        "What the rest of the model still knows: mlx_hiermem evaluate --task leakage"
    )
