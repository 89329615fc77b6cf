"""``mlx_hiermem bank block``: switch blocks of a bank off, for everybody who opens it."""

from __future__ import annotations

import argparse
from typing import Any

from ..generate import parse_block
from ..options import editable_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "blocks",
        nargs="+",
        type=parse_block,
        metavar="LEVEL:CLUSTER",
        help="a block, such as 1:3",
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="model folder whose bank is edited, in memory/"
    )
    parser.add_argument("--bank", metavar="FOLDER", help="memory folder, in place of --model")
    parser.set_defaults(revision=None, levels=None, subtrees=None)


def report(args: argparse.Namespace, block: bool = True) -> dict[str, Any]:
    """``{"folder", "revision", "revision_before", "blocked", "blocked_before"}``.

    Raises:
        PathError: there is no such block, or it was removed.
        FormatError, ConfigError: the bank is damaged or cannot be written. Nothing has changed
            then.
    """
    from ...bank.address import check_cluster, check_level
    from ...bank.blocked import removed_error
    from ...bank.edit import BankEdit
    from ...errors import InputError

    if (args.model is None) == (args.bank is None):
        raise InputError("give the bank to edit: either --model FOLDER or --bank FOLDER")
    with BankEdit(editable_folder(args)) as edit:
        before, revision = edit.reader.blocked, edit.revision
        named = set()
        for level, cluster in args.blocks:
            level = check_level(edit.config, level)
            named.add((level, check_cluster(edit.config, level, cluster)))
        for pair in sorted(named & before.removed):
            raise removed_error(edit.folder, *pair)
        after = before | named if block else before - named
        edit.set_blocked(after)
    return {
        "folder": str(edit.folder),
        "revision": edit.revision,
        "revision_before": revision,
        "blocked": [list(pair) for pair in sorted(after)],
        "blocked_before": [list(pair) for pair in sorted(before)],
    }


def to_text(report: dict[str, Any]) -> str:
    """The report for people."""
    shown = ", ".join(f"{level}:{cluster}" for level, cluster in report["blocked"]) or "none"
    count = len(report["blocked"]) - len(report["blocked_before"])
    changed = f"{abs(count)} block{'s' * (abs(count) != 1)} {'un' * (count < 0)}blocked"
    return (
        f"{report['folder']}: {changed}, revision {report['revision'][:12]}; blocked now: {shown}"
    )
