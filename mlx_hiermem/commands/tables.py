"""Plain text for people: tables, numbers of bytes, and what an answer fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bank.store import MemoryBank
    from ..engine import Response
    from ..routing.tree import ClusterPath


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell, all aligned to the right but words."""
    cells = [list(header), *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = [any(cell[:1].isalpha() for cell in column[1:]) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if word else f"{cell:>{width}}"
            for cell, width, word in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)


def show_path(path: ClusterPath) -> str:
    """The ids of a path from the root to the leaf, as ``--path`` takes them."""
    return ",".join(map(str, path.ids))


def show_fetch(last: Response) -> str:
    """The memory of an answer: its kind and path, and a table with one row per level."""
    head = f"memory {last.memory}"
    if last.path is not None:
        head += f", path {show_path(last.path)}"
    if not last.fetch.blocks:
        return f"{head} (nothing is fetched)"
    rows = [
        (
            block.level,
            "generic" if block.cluster is None else block.cluster,
            f"{block.bytes:,}",
            f"{block.ms:.2f}",
            block.source,
            "yes" if block.blocked else "no",
        )
        for block in last.fetch.blocks
    ]
    return f"{head}\n{table(('level', 'cluster', 'bytes', 'ms', 'source', 'blocked'), rows)}"


def show_tiers(bank: MemoryBank) -> str:
    """Where each level is held, and why, on one line."""
    levels = (f"{level} {tier} ({bank.tiers.why[level]})" for level, tier in bank.tiers.of.items())
    return f"levels: {'; '.join(levels)}; {bank.bytes_held:,} of {bank.memory_budget:,} bytes held"


def show_speed(last: Response) -> str:
    """Tokens and speeds of an answer, in the words of mlx-lm's ``generate``."""
    return (
        f"prompt {last.prompt_tokens} tokens, {last.prompt_tps:.1f} tokens/s; "
        f"answer {last.generation_tokens} tokens, {last.tokens_per_second:.1f} tokens/s; "
        f"peak memory {last.peak_memory / 1e9:.3f} GB"
    )
