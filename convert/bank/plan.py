"""BankPlan: which tensor of a checkpoint holds which rows of which blocks, by names and shapes.

Every block has to be covered once: what is missing, what is left over and what is there twice are
found here, before anything is written. No numbers are read for it, but those of generic memories
where several subtrees have one, which have to be the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hiermem import kinds
from mlx_hiermem.config import DTYPE_BYTES, MemoryConfig
from mlx_hiermem.errors import FormatError
from mlx_hiermem.shapes import AnchorShape, shown

from ..sources import SourceTensor
from .description import (
    CONFIG,
    Described,
    Entry,
    find_branching,
    find_kind,
    find_layers,
    find_ranks,
)
from .parts import Group, Part


@dataclass(frozen=True)
class BankPlan:
    """What is to be converted.

    Attributes:
        config: of the bank, in the dtype of the source, not quantised.
        levels: for each level with memory its groups, in the order of their clusters.
        generic: for each level with memory the parts of the generic memory's block; None: zeros.
        layouts: the layouts that were found, for people.
        notices: sentences for the report.
    """

    config: MemoryConfig
    levels: Mapping[int, Sequence[Group]]
    generic: Mapping[int, Sequence[Part]] | None
    layouts: tuple[str, ...]
    notices: Sequence[str] = field(default_factory=list)


def make_plan(
    entries: Sequence[Entry],
    described: Described,
    shape: AnchorShape,
    base_anchor: Mapping[str, Any],
    *,
    where: Path,
    tree: tuple[int, int] | None = None,
    dtype: str | None = None,
    zero_generic: bool = False,
    encoder: Mapping[str, Any] | None = None,
) -> BankPlan:
    """Find what every tensor is for.

    Args:
        entries: all tensors of the memory.
        described: what ``memory_config.json`` says.
        shape: of the anchor.
        base_anchor: name and revision of the anchor for the bank's config.
        where: the checkpoint, for messages.
        tree: branching and levels of the cluster tree, if there is one.
        dtype: to be converted to; then tensors may be of different ones.
        zero_generic: write zeros where the checkpoint has no generic memory.
        encoder: what routes a text; None: as described, or the default.

    Raises:
        FormatError: tensors are missing, left over, there twice, of another shape, or of no dtype
            that a bank can have.
        ConfigError: the memory does not fit the anchor.
    """
    name, encoder = str(where), encoder or described.encoder
    kind = find_kind(described, entries, name)
    blocks = [entry for entry in entries if not entry.place.generic]
    if not blocks:
        raise FormatError(f"{name}: has no blocks of any level, only a generic memory")
    k = find_branching(described, blocks, tree and tree[0], name)
    layers = find_layers(described, blocks, shape, name)
    ranks = find_ranks(described, blocks, tree and tree[1], name)
    every = layers == tuple(range(shape.num_hidden_layers))
    config = MemoryConfig(
        ranks=ranks,
        kind=kind,
        branching=k,
        levels=described.levels or 0,
        layers=None if every else layers,
        dtype=_dtype(entries, dtype),
        base_anchor={**base_anchor, "shape": asdict(shape)},
    )
    if encoder is not None:
        config = replace(config, encoder=encoder)
    if tree is not None and tree != (config.branching, config.levels):
        raise FormatError(
            f"{name}: the bank has branching {k} and {config.levels} levels, the tree branching "
            f"{tree[0]} and {tree[1]}; give the tree that the bank was trained with"
        )
    planner = _Planner(config, described, layers, shape)
    levels = {level: planner.level(level, blocks) for level in config.memory_levels}
    if surplus := sorted({entry.place.level for entry in blocks} - set(config.memory_levels)):
        raise FormatError(
            f"{name}: has blocks of level {surplus[0]}, but ranks are {list(ranks)}; correct "
            f"ranks in {CONFIG}"
        )
    generic = planner.generic([entry for entry in entries if entry.place.generic])
    notices = []
    if generic is None:
        if not zero_generic:
            raise FormatError(
                f"{name}: has no generic memory (memory.generic.*); give --zero-generic to write "
                "zeros, which have no effect"
            )
        notices.append("the generic memory is written as zeros: the checkpoint has none")
    layouts = tuple(sorted({entry.place.layout for entry in blocks}))
    if any(entry.subtree is not None for entry in blocks):
        layouts = tuple(f"{layout}, by subtree" for layout in layouts)
    return BankPlan(config, levels, generic, layouts, notices)


def _dtype(entries: Sequence[Entry], wanted: str | None) -> str:
    """The dtype of the bank: what is wanted, or that of all tensors."""
    first = entries[0].tensor
    for entry in entries:
        tensor = entry.tensor
        if tensor.dtype not in DTYPE_BYTES:
            raise FormatError(
                f"{tensor.where}: is {tensor.dtype}; expected {', '.join(DTYPE_BYTES)}; convert "
                "it in PyTorch first"
            )
        if wanted is None and tensor.dtype != first.dtype:
            raise FormatError(
                f"{tensor.where}: is {tensor.dtype}, but {first.name} is {first.dtype}; give "
                "--dtype to convert all to one"
            )
    return wanted or first.dtype


class _Planner:
    """Cuts levels into groups."""

    def __init__(
        self,
        config: MemoryConfig,
        described: Described,
        layers: tuple[int, ...],
        shape: AnchorShape,
    ) -> None:
        self.config = config
        self.transposed = described.transposed
        self.at = {layer: position for position, layer in enumerate(layers)}
        self.names = kinds.find(config.kind).matrices
        self.widths = kinds.find(config.kind).row_widths(shape)

    def level(self, level: int, entries: Iterable[Entry]) -> list[Group]:
        """The groups of a level, which cover its clusters once."""
        config, k = self.config, self.config.branching
        found: dict[tuple[int, int], list[Entry]] = {}
        for entry in entries:
            if entry.place.level != level:
                continue
            subtree, cluster = entry.subtree, entry.place.cluster
            below = k ** (level - 1)  # clusters of a level-1 subtree
            if subtree is not None and subtree >= k:
                raise FormatError(
                    f"{entry.tensor.where}: of subtree {subtree}, but branching is {k}: subtrees "
                    f"count from 0 to {k - 1}"
                )
            first, count = (0, k**level) if subtree is None else (subtree * below, below)
            if cluster is not None:
                if not first <= cluster < first + count:
                    raise FormatError(
                        f"{entry.tensor.where}: cluster {cluster} of level {level}, expected "
                        f"{first} to {first + count - 1}"
                        + ("" if subtree is None else f" in subtree {subtree}")
                    )
                first, count = cluster, 1
            found.setdefault((first, count), []).append(entry)
        groups: list[Group] = []
        end = 0
        for first, count in sorted(found):
            members = found[first, count]
            where = f"level {level}, clusters {first} to {first + count - 1}"
            if first < end:
                raise FormatError(
                    f"{members[0].tensor.where}: {where}, which another tensor has too (of "
                    f"{groups[-1].parts[0].tensor.where}); leave one out"
                )
            if first > end:
                raise self._gap(level, end, first)
            groups.append(Group(first, count, self._parts(members, count, level, where)))
            end = first + count
        if end < config.clusters(level):
            raise self._gap(level, end, config.clusters(level))
        return groups

    def _gap(self, level: int, first: int, end: int) -> FormatError:
        return FormatError(
            f"level {level}: clusters {first} to {end - 1} are missing; a level has "
            f"{self.config.clusters(level)} (branching {self.config.branching}); give all files "
            "of the bank"
        )

    def _parts(self, entries: Iterable[Entry], count: int, level: int, where: str) -> list[Part]:
        parts: list[Part] = []
        seen: dict[tuple[int, int], SourceTensor] = {}
        for entry in entries:
            place, tensor = entry.place, entry.tensor
            rank = (self.config.ranks[level - 1]) if level else sum(self.config.ranks)
            clusters = () if place.generic or place.cluster is not None else (count,)
            self._check(tensor, place.matrix, clusters, place.layer, rank)
            if place.layer is not None and place.layer not in self.at:
                raise FormatError(
                    f"{tensor.where}: of layer {place.layer}, which has no memory; layers with "
                    f"memory are {shown(list(self.at))}"
                )
            layers = tuple(self.at.values()) if place.layer is None else (self.at[place.layer],)
            matrix = self.names.index(place.matrix)
            for layer in layers:
                if (other := seen.setdefault((layer, matrix), tensor)) is not tensor:
                    raise FormatError(f"{tensor.where}: the same as {other.where}; leave one out")
            parts.append(
                Part(tensor, layers, matrix, bool(clusters), place.matrix in self.transposed)
            )
        if len(seen) < len(self.at) * len(self.names):
            layer, position = next(
                (layer, self.at[layer], matrix)
                for layer in self.at
                for matrix in range(len(self.names))
                if (self.at[layer], matrix) not in seen
            )[::2]
            raise FormatError(
                f"{where}: {self.names[position]} of layer {layer} is missing "
                f"({len(seen)} of {len(self.at) * len(self.names)} matrices are there)"
            )
        return parts

    def _check(
        self, tensor: SourceTensor, matrix: str, clusters: tuple[int, ...], layer: int | None,
        rank: int,
    ) -> None:  # fmt: skip
        """Raise FormatError where a tensor has another shape than its key asks for."""
        width = self.widths[self.names.index(matrix)]
        front = (*clusters, *(() if layer is not None else (len(self.at),)))
        last, other = (rank, width), (width, rank)
        if matrix in self.transposed:
            last, other = other, last
        if tensor.shape == (*front, *last):
            return
        hint = "correct the file, or rename with --key-map"
        if tensor.shape == (*front, *other):
            hint = (
                f"it lies the other way: name {matrix} as transposed in {CONFIG}"
                if matrix not in self.transposed
                else f"it is not transposed: take {matrix} out of transposed in {CONFIG}"
            )
        raise FormatError(
            f"{tensor.where}: shape is {shown(tensor.shape)}, expected {(*front, *last)}; {hint}"
        )

    def generic(self, entries: Sequence[Entry]) -> dict[int, list[Part]] | None:
        """The generic memory's parts by level; None where there is none.

        Several subtrees may have it: then it has to be the same in all of them.
        """
        by_subtree: dict[int | None, list[Entry]] = {}
        for entry in entries:
            by_subtree.setdefault(entry.subtree, []).append(entry)
        first = None
        for found in by_subtree.values():
            parts = self._generic(found)
            if first is None:
                first = parts
            elif not _same(first, parts):
                raise FormatError(
                    f"{found[0].tensor.where}: another generic memory than that of "
                    f"{entries[0].tensor.boxes[0].file.path}; leave one out with --ignore"
                )
        return first

    def _generic(self, entries: Sequence[Entry]) -> dict[int, list[Part]]:
        by_level: dict[int, list[Entry]] = {}
        for entry in entries:
            by_level.setdefault(entry.place.level, []).append(entry)
        if set(by_level) == {0}:
            parts = self._parts(by_level[0], 1, 0, "the generic memory")
            found, start = {}, 0
            for level in self.config.memory_levels:
                rank = self.config.ranks[level - 1]
                found[level] = [Part(**{**vars(part), "rank": (start, rank)}) for part in parts]
                start += rank
            return found
        if set(by_level) != set(self.config.memory_levels):
            raise FormatError(
                f"{entries[0].tensor.where}: the generic memory has levels {sorted(by_level)} (0: "
                f"all joined), expected {list(self.config.memory_levels)}, or all joined"
            )
        return {
            level: self._parts(found, 1, level, f"the generic memory, level {level}")
            for level, found in by_level.items()
        }


def _same(one: Mapping[int, Sequence[Part]], two: Mapping[int, Sequence[Part]]) -> bool:
    """Whether two generic memories have the same numbers."""

    def matrices(parts: Sequence[Part]) -> dict[tuple[int, int], np.ndarray]:
        return {
            (layer, part.matrix): array
            for part in parts
            for layer, array in zip(part.layers, part.read()[0], strict=True)
        }

    for level, parts in one.items():
        ours, theirs = matrices(parts), matrices(two[level])
        if not all(np.array_equal(array, theirs[place]) for place, array in ours.items()):
            return False
    return True
