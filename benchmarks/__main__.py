"""``python -m benchmarks run --out DIR``: all benchmarks and studies, one after the other.

``run`` leaves tables, JSON, figures and a report in DIR; what is there already is not run again.
``compare`` sets two such folders side by side. ``results`` writes docs/results.md from one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_hiermem.errors import HierMemError

from . import catalogue


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run all, or those that are named")
    run.add_argument("names", nargs="*", metavar="NAME", help="such as fetch or levels")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="where it goes")
    run.add_argument("--smoke", action="store_true", help="small and quick; shows that all run")
    run.add_argument("--speed", action="store_true", help="only the benchmarks of speed")
    run.add_argument("--studies", action="store_true", help="only the studies")
    compare = commands.add_parser("compare", help="compare two runs")
    compare.add_argument("before", type=Path, metavar="DIR")
    compare.add_argument("after", type=Path, metavar="DIR")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file too")
    results = commands.add_parser("results", help="write docs/results.md and its figures")
    results.add_argument("folder", type=Path, metavar="DIR", help="of a run")
    results.add_argument(
        "--docs", type=Path, default=Path("docs"), metavar="FOLDER", help="(default: docs)"
    )
    commands.add_parser("list", help="say what there is")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        if args.command == "run":
            from .run import run, wanted

            return run(wanted(args.names, args.speed, args.studies), args.out, args.smoke)
        if args.command == "compare":
            from .compare import compare

            compare(args.before, args.after, args.json)
        elif args.command == "results":
            from .results import write_results

            write_results(args.folder, args.docs)
        else:
            for entry in catalogue.ALL:
                paper = f" ({entry.paper})" if entry.paper else ""
                print(f"{entry.short:16} {entry.title}{paper}")
    except HierMemError as error:
        print(f"python -m benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
