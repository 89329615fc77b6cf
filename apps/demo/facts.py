"""What a page says about the model: figures and names, and nothing that belongs to MLX."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_hiermem.bank.report import FetchReport
    from mlx_hiermem.config import MemoryConfig
    from mlx_hiermem.engine import MemoryLM
    from mlx_hiermem.routing.names import ClusterNames


@dataclass(frozen=True)
class Level:
    """One level of the bank: ``level`` (from 1), how many ``clusters``, bytes of one block."""

    level: int
    clusters: int
    block_bytes: int


@dataclass(frozen=True)
class Facts:
    """What a page says about the model before anything is asked.

    Attributes:
        anchor_parameters: numbers in the anchor.
        context_length: in tokens, or None when the anchor's config does not say.
        levels: the levels with memory.
        fetch_bytes: of one fetched memory.
        bank_bytes: of the blocks of the whole bank.
        chat: whether the tokenizer has a chat template, so that a prompt is a question and not
            the beginning of a text.
        anchor_bytes: of the anchor's numbers in memory.
        config: of the bank: branching, levels, ranks.
        names: of the clusters ; None where the bank has none.
        blocked: pairs (level, cluster) that whoever started the server has blocked, for everybody.
        bank: what ``MemoryBank.inspect`` gave.
        folder: of the bank; not for the page.
    """

    anchor_parameters: int
    context_length: int | None
    levels: tuple[Level, ...]
    fetch_bytes: int
    bank_bytes: int
    chat: bool = False
    anchor_bytes: int = 0
    config: MemoryConfig | None = None
    names: ClusterNames | None = None
    blocked: frozenset[tuple[int, int]] = frozenset()
    bank: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    @classmethod
    def of(cls, lm: MemoryLM) -> Facts:
        """To be called on the thread that owns the model."""
        from mlx.utils import tree_flatten

        bank = lm.bank.inspect()
        table = [row for row in bank["levels"] if row["rank"]]
        arrays = [array for _, array in tree_flatten(lm.model.parameters())]
        return cls(
            anchor_parameters=sum(array.size for array in arrays),
            context_length=lm.context_length,
            levels=tuple(Level(r["level"], r["clusters"], r["block_bytes"]) for r in table),
            fetch_bytes=sum(row["block_bytes"] for row in table),
            bank_bytes=sum(row["total_bytes"] for row in table),
            chat=bool(lm.tokenizer.has_chat_template),
            anchor_bytes=sum(array.nbytes for array in arrays),
            config=lm.bank.config,
            names=_names(lm),
            blocked=lm.bank.blocked,
            bank=bank,
            folder=lm.bank.folder,
        )

    def name(self, level: int, cluster: int) -> str:
        """The telling words of a cluster, as they were written: not escaped. "" without any."""
        from mlx_hiermem.routing.names import unnamed

        name = "" if self.names is None else self.names.of(level, cluster)
        return "" if name == unnamed(cluster) else name

    def has(self, level: object, cluster: object) -> bool:
        """Whether there is such a block; whatever a browser has sent."""
        if type(level) is not int or type(cluster) is not int:
            return False
        return any(one.level == level and 0 <= cluster < one.clusters for one in self.levels)


def found(report: FetchReport) -> tuple[int, int]:
    """Of the blocks of a fetch that are not zeros: (found in memory, all)."""
    sources = [block.source for block in report.blocks if block.bytes]
    return sum(source != "disk" for source in sources), len(sources)


@dataclass(frozen=True)
class Held:
    """How much of the model is in memory, and how well that served, at one moment.

    Attributes:
        resident: bytes of the levels that are held as a whole.
        cached: bytes of blocks that were fetched before and are held.
        blocks: blocks that were fetched since the start, for all visitors.
        hits: of these, those that did not have to be read from a file.
    """

    resident: int
    cached: int
    blocks: int
    hits: int


def _names(lm: MemoryLM) -> ClusterNames | None:
    from mlx_hiermem.routing.names import NAMES, ClusterNames

    names = ClusterNames.load(lm.bank.folder, lm.bank.file_name(NAMES))
    if names is not None:
        config = lm.bank.config
        names.check(config.branching, config.levels, config.roots)
    return names
