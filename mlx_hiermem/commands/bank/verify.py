"""``mlx_hiermem bank verify``: read every file of a bank and compare it with the manifest."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import add_bank_arguments, open_bank
from ..tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bank_arguments(parser)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """``{"folder", "revision", "ok": True, "bytes", "files": [{"file", "bytes", "sha256", "ok"}]}``

    Raises:
        FormatError: at the first file that is missing or altered, or the first block that holds
            NaN or infinite numbers.
    """
    from . import progress_bytes

    with open_bank(args) as bank:
        with progress_bytes(bank.bytes_on_disk, "verify") as bar:
            files = bank.verify(progress=bar.update)
        return {
            "folder": str(bank.folder),
            "revision": bank.revision,
            "ok": True,
            "bytes": sum(file["bytes"] for file in files),
            "files": files,
        }


def to_text(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = [("ok", file["file"], f"{file['bytes']:,}") for file in report["files"]]
    return (
        f"{table(('', 'file', 'bytes'), rows)}\n{report['folder']}: {len(rows)} files, "
        f"{report['bytes']:,} bytes, revision {report['revision'][:12]}, all as the manifest says"
    )
