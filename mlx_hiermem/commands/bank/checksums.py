"""``mlx_hiermem bank checksums``: give a bank the checksums of its blocks."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import editable_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="FOLDER", help="model folder whose bank is edited, in memory/"
    )
    parser.add_argument("--bank", metavar="FOLDER", help="memory folder, in place of --model")
    parser.set_defaults(revision=None, levels=None, subtrees=None)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """``{"folder", "revision", "revision_before", "blocks"}``.

    The files have to be what the manifest says: checksums of damaged blocks would hide the damage.

    Raises:
        FormatError, ConfigError: the bank is damaged or cannot be written. Nothing has changed
            then.
    """
    from ...bank.edit import BankEdit
    from ...bank.verify import compute_digests, verify_bank
    from ...errors import InputError
    from . import progress_bytes

    if (args.model is None) == (args.bank is None):
        raise InputError("give the bank to edit: either --model FOLDER or --bank FOLDER")
    with BankEdit(editable_folder(args)) as edit:
        before = edit.revision
        config = edit.config
        total = sum(entry.bytes for entry in edit.reader.manifest.files.values())
        with progress_bytes(2 * total, "checksums") as bar:
            verify_bank(edit.reader, bar.update)
            edit.set_checksums(compute_digests(edit.reader, bar.update))
    return {
        "folder": str(edit.folder),
        "revision": edit.revision,
        "revision_before": before,
        "blocks": sum(config.clusters(level) + 1 for level in config.memory_levels),
    }


def to_text(report: dict[str, Any]) -> str:
    """The report for people."""
    return (
        f"{report['folder']}: checksums of {report['blocks']:,} blocks, revision "
        f"{report['revision'][:12]}"
    )
