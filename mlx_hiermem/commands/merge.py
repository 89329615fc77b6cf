"""``mlx_hiermem merge``: put the subtrees that ``train --subtree`` trained together."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..training.merge import MergeReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of the runs, one of each level-1 subtree"
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_REPO",
        help="the frozen anchor that was --model of the runs",
    )
    parser.add_argument(
        "--generic",
        metavar="RUN_OR_MODEL",
        help="run or model folder with the generic memory; without one it stays at its start "
        "values, which have no effect",
    )
    parser.add_argument(
        "--mlx-path", required=True, metavar="FOLDER", help="model folder to write; must be new"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..models import find_model
    from ..training.merge import merge

    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, count: int, total: int) -> None:
        if what not in bars:
            # On stderr, gone when done, and not there at all where nobody looks (disable=None).
            bars[what] = tqdm(
                total=total, unit="B", unit_scale=True, desc=what, leave=False, disable=None
            )
        bars[what].update(count)

    try:
        report = merge(args.runs, find_model(args.model), args.mlx_path, args.generic, progress)
    finally:
        for bar in bars.values():
            bar.close()
    print(json.dumps(asdict(report), indent=2) if args.json else _text(report))
    return 0


def _text(report: MergeReport) -> str:
    copied = report.files - report.linked
    lines = [
        f"{report.folder}: {len(report.subtrees)} subtrees merged, revision {report.revision[:12]}",
        f"{report.files} files of the bank, {report.bytes:,} bytes; {report.linked} linked, "
        f"{copied} written; tree from {report.routing}",
    ]
    if report.generic is None:
        lines.append(
            "generic memory: start values, which have no effect; --generic takes a trained one"
        )
    else:
        lines.append(f"generic memory: from {report.generic}")
    return "\n".join(lines)
