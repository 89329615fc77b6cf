"""What the subcommands that open a model share: its options, and how it is opened."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..engine import MemoryLM

#: The model that ships with the package.
DEFAULT_MODEL = "atlas"

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--bank`` and ``--memory-budget``, which :func:`load_model` reads."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="PATH_OR_REPO",
        help="model folder, name of a model that ships, or Hub repository (default: %(default)s)",
    )
    parser.add_argument(
        "--bank", metavar="FOLDER", help="memory folder, if it is not memory/ of the model folder"
    )
    parser.add_argument(
        "--memory-budget",
        type=parse_bytes,
        metavar="SIZE",
        help="bytes that resident and cached blocks may take together, such as 2GB or 512MiB",
    )


def parse_bytes(text: str) -> int:
    """A number of bytes: ``1500000``, ``2GB`` (10^9), ``1.5GiB`` (2^30); case does not matter.

    Raises:
        InputError: it is no such number, or below one byte.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    size = 0
    if found and found[2] in _UNITS:
        number, unit = found[1], _UNITS[found[2]]
        size = int(float(number) * unit) if "." in number else int(number) * unit
    if size < 1:
        raise InputError(
            f"a number of bytes: {text[:40]!r} is none; give one above 0 such as 500MB, 2GB or "
            "1.5GiB"
        )
    return size


def load_model(args: argparse.Namespace) -> MemoryLM:
    """Open the model that the options of :func:`add_model_arguments` name.

    Raises:
        ConfigError, FormatError, BudgetError: as :func:`mlx_hiermem.load`.
    """
    from ..engine import load  # imports mlx-lm, which --help can do without

    return load(args.model, bank=args.bank, memory_budget=args.memory_budget)
