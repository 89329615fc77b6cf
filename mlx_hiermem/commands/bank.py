"""``mlx_hiermem bank``: inspect a memory bank, or verify its files against its manifest."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .options import add_model_arguments
from .tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in (
        ("inspect", "show what a bank holds, level by level"),
        ("verify", "read every file of a bank and compare it with the manifest"),
    ):
        action = actions.add_parser(name, help=summary, description=f"{summary}.")
        add_model_arguments(action)
        action.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    report = inspect(args) if args.action == "inspect" else verify(args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(_inspect_text(report) if args.action == "inspect" else _verify_text(report))
    return 0


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """What ``MemoryBank.inspect`` says of the bank."""
    from ..bank.store import MemoryBank

    with MemoryBank.open(_folder(args), memory_budget=args.memory_budget) as bank:
        return bank.inspect()


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """``{"folder", "revision", "ok": True, "bytes", "files": [{"file", "bytes", "sha256", "ok"}]}``

    Raises:
        FormatError: at the first file that is missing or altered.
    """
    from tqdm import tqdm

    from ..bank.manifest import read_manifest
    from ..bank.store import MemoryBank

    folder = _folder(args)
    with MemoryBank.open(folder, memory_budget=args.memory_budget, resident=()) as bank:
        total = sum(entry.bytes for entry in read_manifest(folder).files.values())
        # On stderr, gone when done, and not there at all where nobody looks (disable=None).
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="verify", leave=False, disable=None
        ) as bar:
            files = bank.verify(progress=bar.update)
        return {
            "folder": str(folder),
            "revision": bank.revision,
            "ok": True,
            "bytes": sum(file["bytes"] for file in files),
            "files": files,
        }


def _folder(args: argparse.Namespace) -> Path:
    if args.bank is not None:
        return Path(args.bank).expanduser()
    from ..models import find_model

    return find_model(args.model) / "memory"


def _inspect_text(report: dict[str, Any]) -> str:
    lines = [
        f"{report['folder']}: {report['kind']} memories, branching {report['branching']}, "
        f"revision {report['revision'][:12]}",
        f"{report['bank_size']:,} numbers, {report['fetch_size']:,} in one fetched memory; "
        f"{report['bytes_held']:,} of at most {report['memory_budget']:,} bytes held",
    ]
    columns = (
        "level", "clusters", "rank", "block_size", "block_bytes", "total_bytes", "dtype",
        "shards", "tier", "blocked",
    )  # fmt: skip
    header = [column.replace("block_size", "numbers").replace("_", " ") for column in columns]
    rows = [
        [f"{row[column]:,}" if isinstance(row[column], int) else row[column] for column in columns]
        for row in report["levels"]
    ]
    return "\n".join([*lines, table(header, rows)])


def _verify_text(report: dict[str, Any]) -> str:
    rows = [("ok", file["file"], f"{file['bytes']:,}") for file in report["files"]]
    return (
        f"{table(('', 'file', 'bytes'), rows)}\n{report['folder']}: {len(rows)} files, "
        f"{report['bytes']:,} bytes, revision {report['revision'][:12]}, all as the manifest says"
    )
