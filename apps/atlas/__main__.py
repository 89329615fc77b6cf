"""``python -m apps.atlas build --seed 0``: make the model that ships, from nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlx_hiermem.backend import keep_freed_memory, preload_blas
from mlx_hiermem.errors import HierMemError

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m apps.atlas", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="run all stages and write the model folder")
    build.add_argument("--jobs", type=int, default=2, help="stages side by side (default: 2)")
    names = commands.add_parser("names", help="name the clusters of a model folder anew")
    for command in (build, names):
        command.add_argument(
            "--out",
            type=Path,
            default=ROOT / "mlx_hiermem" / "assets" / "atlas",
            help="the model folder (default: the one in the package)",
        )
    stage = commands.add_parser("stage", help="run one stage")
    stage.add_argument("name")
    for command in (build, names, stage):
        command.add_argument("--seed", type=int, default=0)
    for command in (build, stage):
        command.add_argument(
            "--work",
            type=Path,
            default=ROOT / "build" / "atlas",
            help="where stages keep their results",
        )
    args = parser.parse_args()

    # Before the first import of MLX, which the other modules bring.
    preload_blas()
    keep_freed_memory()
    from .build import add_names
    from .build import build as build_atlas
    from .recipe import STAGES, Recipe

    recipe = Recipe(seed=args.seed)
    try:
        if args.command == "build":
            build_atlas(recipe, args.work, args.out, max(1, args.jobs))
        elif args.command == "names":
            print(f"revision {add_names(recipe, args.out)}")
        elif args.name in STAGES:
            STAGES[args.name][0](recipe, args.work)
        else:
            parser.error(f"stage {args.name!r}: expected one of {', '.join(STAGES)}")
    except HierMemError as error:
        print(f"apps.atlas: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
