"""What the subcommands that open a model share: its options, and how it is opened."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from ..bank.store import MemoryBank
    from ..engine import MemoryLM

#: The model that ships with the package.
DEFAULT_MODEL = "atlas"

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`load_model` and :func:`open_bank` read: the model, its bank, and how the
    bank is held."""
    add_bank_arguments(parser)
    group = parser.add_argument_group("how the bank is held")
    group.add_argument(
        "--memory-budget",
        type=parse_bytes,
        metavar="SIZE",
        help="bytes that resident and cached blocks may take together, such as 2GB or 512MiB; "
        "shallow levels are placed first",
    )
    group.add_argument(
        "--tier",
        type=parse_tier,
        action="append",
        default=[],
        metavar="LEVEL=TIER",
        help="hold a level so: resident, cached or disk; may be given for each level",
    )
    group.add_argument(
        "--check-blocks",
        action="store_true",
        help="compare each block with its checksum when it is first read",
    )


def add_bank_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`memory_folder` and :func:`bank_files` read: where the files are."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="PATH_OR_REPO",
        help="model folder, name of a model that ships, or Hub repository (default: %(default)s)",
    )
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of the Hub repository"
    )
    group = parser.add_argument_group("the memory bank")
    group.add_argument(
        "--bank", metavar="FOLDER", help="memory folder, if it is not memory/ of the model folder"
    )
    group.add_argument(
        "--level-folder",
        type=parse_level_folder,
        action="append",
        default=[],
        metavar="LEVEL=FOLDER",
        help="the files of a level lie in another folder, such as on an external disk",
    )
    group.add_argument(
        "--levels",
        type=parse_numbers,
        metavar="L,L",
        help="only these levels, such as 1,2; the others read as zeros and are not downloaded",
    )
    group.add_argument(
        "--subtrees",
        type=parse_numbers,
        metavar="C,C",
        help="only what is below these clusters of level 1, such as 0,3",
    )


def parse_tier(text: str) -> tuple[int, str]:
    """A level and its tier, ``2=cached``.

    Raises:
        InputError: the text is no such pair.
    """
    level, name = _pair("--tier", text, "LEVEL=TIER, such as 2=cached")
    return level, name


def parse_level_folder(text: str) -> tuple[int, str]:
    """A level and the folder of its files, ``3=/mnt/disk/memory``.

    Raises:
        InputError: the text is no such pair.
    """
    return _pair("--level-folder", text, "LEVEL=FOLDER, such as 3=/mnt/disk/memory")


def _pair(option: str, text: str, expected: str) -> tuple[int, str]:
    found = re.fullmatch(r"\s*(\d{1,9})\s*=\s*(\S.*)", text, re.ASCII)
    if not found:
        raise InputError(f"{option}: {text[:40]!r} is none; give {expected}")
    return int(found[1]), found[2].strip()


def parse_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between, ``1,2``.

    Raises:
        InputError: the text is no such list.
    """
    if not re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*", text, re.ASCII):
        raise InputError(f"{text[:40]!r}: expected numbers with commas between, such as 1,2")
    return tuple(int(one) for one in text.split(","))


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
        ConfigError, FormatError, BudgetError, PathError: as :func:`mlx_hiermem.load`.
    """
    from ..loading import load  # imports mlx-lm, which --help can do without

    with _reading() as progress:
        return load(
            args.model,
            bank=args.bank,
            memory_budget=args.memory_budget,
            revision=args.revision,
            tiers=dict(args.tier),
            folders=dict(args.level_folder),
            levels=args.levels,
            subtrees=args.subtrees,
            check_blocks=args.check_blocks,
            progress=progress,
        )


def public_name(args: argparse.Namespace) -> str:
    """What clients and visitors know the model by: of a folder its name alone."""
    folder = Path(args.model).expanduser()
    return folder.resolve().name if folder.exists() else args.model


def private_folders(args: argparse.Namespace) -> tuple[str, ...]:
    """The folders that no client or visitor is to see, as an error may name them."""
    folder = Path(args.model).expanduser()
    given = [args.bank, *(where for _, where in args.level_folder)]
    folders = [Path(where).expanduser() for where in given if where is not None]
    folders += [folder] if folder.exists() else []
    found = {str(Path.home())}
    for path in folders:
        found |= {str(path), str(path.absolute()), str(path.resolve())}
    # A bare name may be any word of a text, and is what the model is called.
    return tuple(one for one in found if "/" in one and one != "/")


def memory_folder(args: argparse.Namespace) -> Path:
    """The memory folder that ``--bank`` or ``--model`` names.

    Raises:
        ConfigError: there is no such model.
    """
    if args.bank is not None:
        return Path(args.bank).expanduser()
    from ..bank.parts import Part
    from ..models import find_model

    return find_model(args.model, args.revision, Part.of(args.levels, args.subtrees)) / "memory"


def editable_folder(args: argparse.Namespace) -> Path:
    """As :func:`memory_folder`, for a command that changes the bank.

    Raises:
        InputError: it is of a model that ships with the package, which everybody takes as it is, or
            lies in the Hub's cache, where a change is lost with the next download.
    """
    from ..bank.files import hub_blobs
    from ..models import is_shipped

    folder = memory_folder(args)
    if is_shipped(folder):
        reason, copy = "ships with the package and is not changed", "cp -r"
    elif hub_blobs(folder.resolve()):
        reason, copy = "lies in the cache of the Hub, which is not changed", "cp -rL"
    else:
        return folder
    raise InputError(
        f"{args.model or folder}: {reason}; copy it first ({copy} {folder.parent} my-model), and "
        "give --model my-model"
    )


def open_bank(args: argparse.Namespace) -> MemoryBank:
    """Open the bank alone that the options of :func:`add_model_arguments` name.

    With those of :func:`add_bank_arguments` alone no level is held in memory.

    Raises:
        ConfigError, FormatError, BudgetError, PathError: as ``MemoryBank.open``.
    """
    from ..bank.parts import Part
    from ..bank.store import MemoryBank

    holding = hasattr(args, "memory_budget")
    with _reading() as progress:
        return MemoryBank.open(
            memory_folder(args),
            memory_budget=args.memory_budget if holding else None,
            tiers=dict(args.tier) if holding else "disk",
            folders=dict(args.level_folder),
            part=Part.of(args.levels, args.subtrees),
            check_blocks=holding and args.check_blocks,
            progress=progress,
        )


@contextmanager
def _reading() -> Iterator[Callable[[int, int], None]]:
    """A progress bar for resident levels, which is there only if they take two seconds."""
    from tqdm import tqdm

    bars: list[Any] = []

    def progress(total: int, count: int) -> None:
        if not bars:
            bars.append(
                tqdm(
                    total=total, unit="B", unit_scale=True, desc="resident levels",
                    leave=False, disable=None, delay=2,
                )
            )  # fmt: skip
        bars[0].update(count)

    try:
        yield progress
    finally:
        for bar in bars:
            bar.close()
