"""``mlx_hiermem init``: a model folder with a fresh bank, for any model that mlx-lm loads."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import TYPE_CHECKING, Any

from ..config import DTYPE_BYTES, KINDS, PLACEMENTS
from ..errors import InputError
from .options import parse_numbers

if TYPE_CHECKING:
    from ..making import Made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Not argparse's choices: its errors are more than one line.
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_REPO",
        help="the anchor: model folder, name of a model that ships, or Hub repository",
    )
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of the Hub repository"
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="R,R",
        help="memory config: one rank per level, such as 512,128,32,0",
    )
    parser.add_argument(
        "--mlx-path", required=True, metavar="FOLDER", help="model folder to write; must be new"
    )
    parser.add_argument(
        "--kind",
        default="ffn",
        help=f"of memory: {', '.join(KINDS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        default="uniform",
        metavar="WHERE",
        help=f"with memory: {', '.join(PLACEMENTS)}, or indices such as 0,3,5 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--branching",
        metavar="K",
        help="children of each cluster (default: that of --tree, else 16)",
    )
    parser.add_argument(
        "--bank-dtype",
        default="bfloat16",
        metavar="DTYPE",
        help=f"of the blocks: {', '.join(DTYPE_BYTES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--tree",
        metavar="FOLDER",
        help="corpus or memory folder, whose tree and encoder go into the bank; without it nothing "
        "can be routed until the model is trained",
    )
    parser.add_argument(
        "--fresh-memory", action="store_true", help="leave a bank behind that the model has"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    ranks, branching = _numbers("--config", args.config), None
    if args.branching is not None:
        branching, *more = _numbers("--branching", args.branching)
        if more:
            raise InputError(f"--branching {args.branching}: expected one number")

    from tqdm import tqdm

    from ..making import make_model

    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, total: int, count: int) -> None:
        if what not in bars:
            # Only if it takes two seconds, and not where nobody looks (disable=None).
            bars[what] = tqdm(
                total=total, unit="B", unit_scale=True, desc=what, leave=False, disable=None,
                delay=2,
            )  # fmt: skip
        bars[what].update(count)

    try:
        made = make_model(
            args.model,
            args.mlx_path,
            ranks,
            kind=args.kind,
            layers=args.layers,
            branching=branching,
            dtype=args.bank_dtype,
            tree=args.tree,
            revision=args.revision,
            fresh_memory=args.fresh_memory,
            progress=progress,
        )
    finally:
        for bar in bars.values():
            bar.close()
    print(json.dumps(to_dict(made)) if args.json else to_text(made))
    return 0


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return parse_numbers(text)
    except InputError as error:
        raise InputError(f"{option} {error}") from None


def to_dict(made: Made) -> dict[str, Any]:
    """What ``--json`` prints; ``fetch_size`` and ``bank_size`` are numbers, the rest bytes."""
    config = made.config
    return {
        "model": str(made.folder),
        "kind": config.kind,
        "ranks": list(config.ranks),
        "branching": config.branching,
        "levels": config.levels,
        "layers": list(config.memory_layers()),
        "dtype": config.dtype,
        "base_anchor": dict(config.base_anchor or {}),
        "fetch_size": config.fetch_size(),
        "bank_size": config.bank_size(),
        "bank_bytes": made.bank.bytes,
        "disk_bytes": made.bank.stored,
        "sparse": made.bank.sparse,
        "tree": made.has_tree,
        "revision": made.bank.revision,
    }


def to_text(made: Made) -> str:
    """The same for people, and what to do next."""
    from .bank.inspect import show_bytes

    config, bank = made.config, made.bank
    layers, every = config.memory_layers(), config.anchor_shape().num_hidden_layers
    where = "all" if len(layers) == every else f"{len(layers)} of"
    folder = shlex.quote(str(made.folder))
    size, stored = show_bytes(bank.bytes), show_bytes(bank.stored)
    disk = f"in sparse files, which take {stored} of the disk"
    if not bank.sparse:
        disk = f"in files that take {stored} of the disk: this file system has no sparse ones"
    lines = [
        f"{made.folder}: {config.kind} memories {','.join(map(str, config.ranks))} on {where} "
        f"{every} layers, branching {config.branching}, without effect; revision "
        f"{bank.revision[:12]}",
        f"{config.fetch_size():,} numbers in a fetched memory, {config.bank_size():,} in the bank: "
        f"{size} of {config.dtype}, {disk}",
    ]
    if made.has_tree:
        lines.append(f"next: mlx_hiermem train --model {folder} --data CORPUS --run RUN")
        return "\n".join(lines)
    lines += [
        "it has no tree, so nothing can be routed until it is trained:",
        f"  mlx_hiermem cluster --model {folder} --branching {config.branching} --levels "
        f"{config.levels} --data TEXTS --out CORPUS",
        f"  mlx_hiermem train --model {folder} --data CORPUS --run RUN",
    ]
    return "\n".join(lines)
