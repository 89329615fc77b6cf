"""``mlx_hiermem bank quantize``: write a bank again in fewer bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...quantization import Quantization
from ..options import memory_folder
from ..tables import table

_CARD = "README.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_REPO",
        help="model folder, name of a model that ships, or Hub repository",
    )
    parser.add_argument(
        "--mlx-path",
        required=True,
        metavar="FOLDER",
        help="model folder to write: the same anchor with the quantised bank; must not exist",
    )
    parser.add_argument(
        "--q-bits", type=int, default=4, metavar="N", help="bits per number (default: %(default)s)"
    )
    parser.add_argument(
        "--q-mode",
        choices=("affine", "mxfp4", "nvfp4", "mxfp8"),
        help="how (default: affine; nvfp4 for rows whose width divides by 16 only)",
    )
    parser.add_argument(
        "--q-group-size", type=int, metavar="N", help="numbers that share a scale (default: 64)"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    parser.set_defaults(bank=None, levels=None, subtrees=None)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """What ``quantize_bank`` says, and ``folder``.

    Raises:
        InputError: the folder to write exists.
        ConfigError, FormatError: as ``quantize_bank``. Nothing is left behind then.
    """
    from ...bank.quantize import quantize_bank
    from ...files import AtomicFile
    from ...folders import Originals, model_folder
    from . import progress_bytes

    source = memory_folder(args)
    out = Path(args.mlx_path).expanduser()
    others = Originals(source.parent, _others(source.parent))
    with model_folder(out) as folder, progress_bytes(0, "quantize") as bar:

        def progress(total: int, count: int) -> None:
            bar.total = total
            bar.update(count)

        result = quantize_bank(
            source, folder / "memory", args.q_bits, args.q_mode, args.q_group_size, progress
        )
        for name in others.names:
            others.copy(name, folder)
        with AtomicFile(folder, _CARD) as file:
            file.write(_card(result).encode())
    return {"folder": str(out), **result}


def _others(model: Path) -> list[str]:
    """The files of a model folder besides its bank and its card."""
    paths = (path.relative_to(model) for path in sorted(model.rglob("*")) if path.is_file())
    return [
        path.as_posix()
        for path in paths
        if not any(part.startswith(".") for part in path.parts)
        and path.parts[0] not in ("memory", _CARD)
    ]


def _card(result: dict[str, Any]) -> str:
    """A model card; the one of the model that was quantised tells of another bank."""
    tags = [
        "---",
        "library_name: mlx",
        "pipeline_tag: text-generation",
        "tags:",
        "- mlx",
        "---",
        "",
    ]
    packing = Quantization.of(result["quantization"])
    text = (
        f"An anchor with a memory bank that was quantised ({packing}) with mlx-hiermem: "
        f"{result['bytes']:,} bytes in place of {result['bytes_before']:,}."
    )
    return "\n".join([*tags, text, ""])


def to_text(report: dict[str, Any]) -> str:
    """The report for people."""
    packing = Quantization.of(report["quantization"])
    before, after = report["bytes_before"], report["bytes"]
    rows = [
        ("quantization", str(packing)),
        ("bytes of the bank", f"{after:,} ({before / after:.2f} times smaller than {before:,})"),
        ("error", f"{100 * report['error']:.2f} % of the numbers' root mean square"),
        ("revision", report["revision"][:12]),
    ]
    return f"{report['folder']}\n{table(('', ''), rows)}"
