"""``mlx_hiermem convert``: anchors and banks that were trained in PyTorch, and the way back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..bank.files import allow_open_files
from ..config import DTYPE_BYTES
from ..errors import InputError

_WHAT = ("all", "bank", "anchor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Not argparse's choices: its errors are more than one line.
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_REPO",
        help="the anchor: OpenLM checkpoint (.pt, .safetensors, DCP folder, Hugging Face folder), "
        "any model that mlx-lm converts, or an MLX model; with --to torch the model folder",
    )
    parser.add_argument("--mlx-path", metavar="FOLDER", help="model folder to write")
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of the Hub repository"
    )
    group = parser.add_argument_group("the memory bank")
    group.add_argument(
        "--bank",
        metavar="PATH",
        help="checkpoint of the bank, or a folder with one for each subtree (default: the "
        "memory that --model holds, if it does)",
    )
    group.add_argument(
        "--memory-config",
        metavar="FILE",
        help="what the names do not say (default: memory_config.json beside the bank)",
    )
    group.add_argument(
        "--key-map", metavar="FILE", help="JSON object: regular expression -> name, or null"
    )
    group.add_argument("--ignore", metavar="REGEX", help="leave out the tensors of these names")
    group.add_argument(
        "--zero-generic", action="store_true", help="write zeros if there is no generic memory"
    )
    group.add_argument(
        "--tree", metavar="PATH", help="k-means tree: file or folder, also a corpus or a memory"
    )
    group.add_argument(
        "--encoder",
        metavar="JSON",
        help='what routes a text, such as {"type": "bert", "model": "FOLDER"} '
        "(default: all-MiniLM-L6-v2)",
    )
    group = parser.add_argument_group("the anchor")
    group.add_argument(
        "--model-config", metavar="FILE", help="model_config JSON or params.txt of OpenLM"
    )
    group.add_argument(
        "--tokenizer", metavar="PATH_OR_REPO", help="where to take the tokenizer's files from"
    )
    group.add_argument("--head-dim", type=int, metavar="N", help="size of a head")
    group.add_argument("--rope-theta", type=float, metavar="F", help="base of the rotary embedding")
    group.add_argument(
        "--rope-bf16",
        action="store_true",
        help="round the rotary frequencies to bfloat16, as OpenLM did in bfloat16 training",
    )
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--dtype", help=f"of anchor and bank: {', '.join(DTYPE_BYTES)} (default: as they are)"
    )
    group.add_argument(
        "-q",
        "--quantize",
        nargs="?",
        const="all",
        metavar="WHAT",
        help=f"{', '.join(_WHAT)} (without a word: all)",
    )
    group.add_argument("--q-bits", type=int, metavar="N", help="bits (default: 4)")
    group.add_argument("--q-group-size", type=int, metavar="N", help="numbers that share a scale")
    group.add_argument("--q-mode", metavar="MODE", help="affine, mxfp4, nvfp4 or mxfp8")
    group.add_argument(
        "--overwrite", action="store_true", help="replace the model folder that is there"
    )
    group = parser.add_argument_group("what is done")
    group.add_argument(
        "--dry-run", action="store_true", help="only print what would go where, and how large it is"
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="compare logits with the original in PyTorch; the result stands in README.md",
    )
    group.add_argument("--to", metavar="torch", help="the way back: an MLX model to PyTorch")
    group.add_argument("--torch-path", metavar="FOLDER", help="with --to torch: folder to write")
    group.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.to is not None:
        return _back(args)
    if args.torch_path is not None:
        raise InputError("--torch-path goes with --to torch; give --mlx-path FOLDER")
    if args.mlx_path is None:
        raise InputError("--mlx-path is missing: the model folder to write")
    if args.dtype is not None and args.dtype not in DTYPE_BYTES:
        raise InputError(f"--dtype {args.dtype!r}: expected one of {', '.join(DTYPE_BYTES)}")
    if args.quantize is not None and args.quantize not in _WHAT:
        raise InputError(f"--quantize {args.quantize!r}: expected one of {', '.join(_WHAT)}")
    if args.quantize is None and (args.q_bits or args.q_group_size or args.q_mode):
        raise InputError("--q-bits, --q-group-size and --q-mode go with --quantize")
    from ..convert.report import to_text

    allow_open_files()  # a checkpoint may have any number of them
    from ..convert.request import Request
    from ..convert.run import convert

    request = Request.of(args)
    with _bars() as progress:
        done = convert(request, progress)
    if args.json:
        print(json.dumps(done.to_dict()))
    elif args.dry_run:
        print(to_text(done.report))
    else:
        print(done.to_text())
    if done.report.problem is not None:
        raise InputError(done.report.problem)
    return 0


def _back(args: argparse.Namespace) -> int:
    if args.to != "torch":
        raise InputError(f"--to {args.to!r}: expected torch")
    if args.torch_path is None or args.mlx_path is not None:
        raise InputError("--to torch takes --torch-path FOLDER, the folder to write")
    from ..convert.to_torch import to_torch

    with _bars() as progress:
        done = to_torch(args.model, args.torch_path, overwrite=args.overwrite, progress=progress)
    print(json.dumps(done.to_dict()) if args.json else done.to_text())
    return 0


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars: bytes per second and the time left, for what takes two seconds."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, total: int, count: int) -> None:
        if what not in bars:
            unit = {"unit": " run"} if what == "verify" else {"unit": "B", "unit_scale": True}
            # Only where somebody looks (disable=None).
            bars[what] = tqdm(
                total=total, desc=what, leave=False, disable=None, delay=2, **unit
            )  # fmt: skip
        bars[what].update(count)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()
