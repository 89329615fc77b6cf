"""``mlx_hiermem bank inspect``: what a bank holds, level by level, and what of it is used."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ..evaluate_facts import open_model
from ..options import add_model_arguments, open_bank
from ..tables import table

if TYPE_CHECKING:
    from ...bank.store import MemoryBank
    from .uses import Uses

#: Blocked blocks that are named one by one.
_NAMED = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("use counts, from one of")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--text",
        metavar="FILE",
        help="documents, each routed by its text: .jsonl with a text a line, or .txt with blank "
        "lines between them",
    )
    source.add_argument(
        "--corpus",
        metavar="FOLDER",
        help="the training sequences of a corpus that cluster has made with the bank's tree",
    )
    source.add_argument(
        "--questions",
        action="store_true",
        help="the held-out questions in the model folder, each routed by its prompt",
    )
    group = parser.add_argument_group("the tree with its use counts")
    group.add_argument("--tree", action="store_true", help="draw it as text")
    group.add_argument("--picture", metavar="FILE.png", help="draw it as a PNG")


def report(args: argparse.Namespace) -> dict[str, Any]:
    """What ``MemoryBank.inspect`` says of the bank, and with a source of counts also ``"uses"``
    (see ``Uses.to_dict``), with ``--tree`` ``"tree"`` (lines of text), with ``--picture``
    ``"picture"`` (where it is).

    Raises:
        InputError: a picture without a source of counts, or one that cannot go where it should.
        ConfigError, FormatError, BudgetError, PathError: the bank or the source is not as it
            should be.
    """
    _check(args)
    if args.text is None and not args.questions:
        with open_bank(args) as bank:
            return _report(args, bank, _corpus(args, bank))
    from . import uses

    lm = open_model(args)
    with lm.bank as bank:
        if args.text is not None:
            return _report(args, bank, uses.of_text(lm, args.text))
        return _report(args, bank, uses.of_questions(lm, args.model))


def _check(args: argparse.Namespace) -> None:
    """Raise InputError before anything slow begins."""
    wanted = [f"--{name}" for name in ("tree", "picture") if getattr(args, name)]
    if wanted and args.text is None and args.corpus is None and not args.questions:
        raise InputError(
            f"{' and '.join(wanted)}: shows how often each cluster is used, so give what is to be "
            "counted: --text FILE, --corpus FOLDER or --questions"
        )
    if args.picture is not None:
        path = Path(args.picture).expanduser()
        if path.suffix.lower() != ".png":
            raise InputError(f"--picture {args.picture!r}: expected a name that ends in .png")
        if path.is_dir() or not path.parent.is_dir():
            found = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise InputError(
                f"--picture {args.picture!r}: {found}; give a file name in a folder that is there"
            )
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"--picture {args.picture!r}: the folder {path.parent} is read-only")


def _corpus(args: argparse.Namespace, bank: MemoryBank) -> Uses | None:
    from . import uses

    return None if args.corpus is None else uses.of_corpus(args.corpus, bank.config, bank.folder)


def _report(args: argparse.Namespace, bank: MemoryBank, uses: Uses | None) -> dict[str, Any]:
    found = bank.inspect()
    if uses is None:
        return found
    found["uses"] = uses.to_dict()
    if args.tree:
        from .picture import draw_text

        found["tree"] = draw_text(uses, bank.blocked, getattr(sys.stdout, "encoding", None))
    if args.picture is not None:
        from .picture import draw

        path = Path(args.picture).expanduser()
        draw(path, uses, found)
        found["picture"] = str(path)
    return found


# ---- text ------------------------------------------------------------------------------


def to_text(report: dict[str, Any]) -> str:
    """The report for people; its bytes are rounded, those in the JSON are not."""
    size, fetch = report["bank_size"], report["fetch_size"]
    bank_bytes, fetch_bytes = report["bank_bytes"], report["fetch_bytes"]
    lines = [
        f"{report['folder']}: {report['kind']} memories, branching {report['branching']}, "
        f"revision {report['revision'][:12]}",
        f"{size:,} numbers, {fetch:,} in one fetched memory; {show_bytes(bank_bytes)} against "
        f"{show_bytes(fetch_bytes)}, {_ratio(bank_bytes, fetch_bytes)} as much",
        _levels(report),
        f"{show_bytes(report['bytes_held'])} of at most {show_bytes(report['memory_budget'])} held",
        *_added(report),
        *_elsewhere(report),
        *_blocked(report),
    ]
    if "uses" in report:
        uses = report["uses"]
        lines.append(f"used: by {uses['total']:,} {uses['what']} of {uses['source']}")
    if "tree" in report:
        lines += ["", *report["tree"]]
    if "picture" in report:
        lines += ["", f"picture: {report['picture']}"]
    return "\n".join(lines)


def _added(report: dict[str, Any]) -> list[str]:
    """The added memories, each with its clusters of level 1."""
    found = []
    for one in report["added"]:
        last = one["first"] + one["roots"] - 1
        found.append(f"{one['name']} ({one['first']}{f' to {last}' * (one['roots'] > 1)})")
    return [f"added, with their clusters of level 1: {', '.join(found)}"] if found else []


def _levels(report: dict[str, Any]) -> str:
    """The table with a row per level; some columns are there only if they say something."""
    levels = report["levels"]
    part = any(row["rank"] and row["present_bytes"] != row["total_bytes"] for row in levels)
    used = report["uses"]["levels"] if "uses" in report else None
    header = ["level", "clusters", "rank", "numbers", "dtype", "block", "level bytes"]
    header += ["present"] * part
    removed = bool(report["removed"])
    header += ["shards", "tier", "blocked"] + ["removed"] * removed
    header += ["used"] * (used is not None) + ["why"]
    rows = []
    for row in levels:
        cells = [row["level"], f"{row['clusters']:,}", row["rank"], f"{row['block_size']:,}"]
        cells += [_dtype(report, row), show_bytes(row["block_bytes"])]
        cells += [show_bytes(row["total_bytes"])]
        cells += [show_bytes(row["present_bytes"])] * part
        cells += [row["shards"], row["tier"], f"{row['blocked']:,}"]
        cells += [f"{row['removed']:,}"] * removed
        if used is not None:
            cells.append(f"{len(used[str(row['level'])]):,}")
        rows.append([*cells, row["why"]])
    return table(header, rows)


def _dtype(report: dict[str, Any], row: dict[str, Any]) -> str:
    packing = report["quantization"]
    if packing is None:
        return row["dtype"]
    return f"{packing['bits']}-bit {packing['mode']}/{packing['group_size']}"


def _elsewhere(report: dict[str, Any]) -> list[str]:
    """A line for each level whose files lie in another folder."""
    return [
        f"level {row['level']} lies in {row['folder']}"
        for row in report["levels"]
        if row["rank"] and row["folder"] != report["folder"]
    ]


def _blocked(report: dict[str, Any]) -> list[str]:
    """What is blocked, what is removed, and whether that has come to its end."""
    lines = []
    for what in ("blocked", "removed"):
        pairs = [f"{level}:{cluster}" for level, cluster in report[what]]
        if pairs:
            rest = len(pairs) - _NAMED
            more = f" and {rest:,} more" if rest > 0 else ""
            lines.append(f"{what} (level:cluster): {', '.join(pairs[:_NAMED])}{more}")
    if report["removal_unfinished"]:
        lines.append(
            "a removal was stopped before its numbers were overwritten on the disk: any edit of "
            "the bank brings it to its end, such as the same `bank remove` again"
        )
    return lines


def _ratio(whole: int, part: int) -> str:
    ratio = whole / part
    return f"{ratio:,.0f} times" if ratio >= 9.95 else f"{ratio:.1f} times"


def show_bytes(count: int) -> str:
    """A number of bytes in two digits or three, such as ``9.2 GB``, ``36 MB`` or ``768 B``."""
    if count < 1000:
        return f"{count} B"
    size, units = count / 1000, ["kB", "MB", "GB", "TB", "PB", "EB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.1f} {units[0]}" if size < 9.95 else f"{size:.0f} {units[0]}"
