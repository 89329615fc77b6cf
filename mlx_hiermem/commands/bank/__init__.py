"""``mlx_hiermem bank``: look at a memory bank and change it; one file per action."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from typing import Any

from ..options import memory_folder  # noqa: F401

#: Every action with its one-line summary, in the order of ``--help``.
ACTIONS = {
    "inspect": "show what a bank holds, level by level",
    "verify": "read every file of a bank and compare it with the manifest",
    "push": "publish a model with its bank on the Hub",
    "quantize": "write a bank again in fewer bits",
    "add": "teach a bank new documents, in clusters of their own",
    "block": "switch blocks off, for everybody who opens the bank",
    "unblock": "switch blocks on again",
    "remove": "remove blocks for good: their numbers are overwritten",
    "names": "name the clusters of a bank by telling words",
    "checksums": "give a bank the checksums of its blocks",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    parser.set_defaults(refuse=parser.error)
    for name, summary in ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=f"{summary}.")
        module = import_module(f"{__package__}.{name}")
        module.add_arguments(action)
        action.add_argument("--json", action="store_true", help="print one JSON object")
        action.set_defaults(report=module.report, to_text=module.to_text)


def run(args: argparse.Namespace) -> int:
    if args.action is None:
        args.refuse(f"no action is given; --help tells of {', '.join(ACTIONS)}")
    report = args.report(args)
    print(json.dumps(report, indent=2) if args.json else args.to_text(report))
    return 0


def progress_bytes(total: int, description: str) -> Any:
    """A progress bar in bytes: on stderr, gone when done, not there where nobody looks."""
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc=description, leave=False, disable=None)
