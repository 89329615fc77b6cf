"""``mlx_hiermem bank inspect``: what a bank holds, level by level."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import add_model_arguments
from ..tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """What ``MemoryBank.inspect`` says of the bank."""
    from ...bank.store import MemoryBank
    from . import memory_folder

    with MemoryBank.open(memory_folder(args), memory_budget=args.memory_budget) as bank:
        return bank.inspect()


def to_text(report: dict[str, Any]) -> str:
    """The report for people."""
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
