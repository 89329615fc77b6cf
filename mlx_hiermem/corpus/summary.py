"""What became of a corpus: documents, windows, tokens; how evenly clusters are filled; samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .info import SplitInfo
from .part import read_part
from .placing import Placements
from .windows import load_tokenizer
from .workfolder import UnitRecord, WorkFolder
from .writer import Placed

#: Clusters of each level of which texts are shown, texts of each, and characters of each.
CLUSTERS, TEXTS, CHARACTERS = 4, 3, 200

# Tokens that are decoded for a sample.
_TOKENS = 80


def summarize(
    work: WorkFolder,
    records: Sequence[UnitRecord],
    placements: Placements,
    splits: dict[str, SplitInfo],
    branching: int,
    levels: int,
    seed: int,
) -> dict[str, Any]:
    """The summary as it is printed with ``--json`` and kept in ``summary.json``.

    Cluster sizes are counted in packed windows of the training split, and given as shares.

    Raises:
        FormatError: a part is damaged.
    """
    parts = [part for record in records for part in record.parts]
    leaves = np.concatenate([placed.leaves for placed in placements.train])
    windows = sum(len(np.unique(placed.windows)) for placed in placements.train)
    chosen = _chosen_clusters(leaves, branching, levels)
    return {
        "documents": sum(part.documents for part in parts),
        "empty_documents": sum(record.empty for record in records),
        "windows": sum(part.windows for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "copies_per_window": len(leaves) / windows,
        "splits": {
            name: {key: value for key, value in asdict(split).items() if key != "shards"}
            for name, split in splits.items()
        },
        "levels": [
            _balance(leaves // branching ** (levels - level), level, branching**level)
            for level in range(1, levels + 1)
        ],
        "samples": _samples(work, placements.train, chosen, branching, levels, seed),
    }


def _balance(ids: np.ndarray, level: int, clusters: int) -> dict[str, Any]:
    """How evenly the clusters of a level are filled; shares are of all packed windows."""
    counts = np.sort(np.unique(ids, return_counts=True)[1])
    empty = clusters - len(counts)

    def share(rank: int) -> float:  # of the cluster at this place, from the smallest on
        return 0.0 if rank < empty else float(counts[rank - empty] / len(ids))

    return {
        "level": level,
        "clusters": clusters,
        "used": len(counts),
        "smallest": share(0),
        "median": (share((clusters - 1) // 2) + share(clusters // 2)) / 2,
        "largest": share(clusters - 1),
        "balance": share(clusters - 1) * clusters,
    }


def _chosen_clusters(
    leaves: np.ndarray, branching: int, levels: int
) -> list[tuple[int, int, float]]:
    """Level, cluster and share of the largest clusters of each level."""
    chosen = []
    for level in range(1, levels + 1):
        ids, counts = np.unique(leaves // branching ** (levels - level), return_counts=True)
        for at in np.argsort(-counts, kind="stable")[:CLUSTERS].tolist():
            chosen.append((level, int(ids[at]), float(counts[at] / len(leaves))))
    return chosen


def _samples(
    work: WorkFolder,
    placed: Sequence[Placed],
    chosen: Sequence[tuple[int, int, float]],
    branching: int,
    levels: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Beginnings of some windows of the chosen clusters, drawn at random."""
    rng = np.random.default_rng([seed, 3])
    sizes = np.cumsum([0, *(len(entry.leaves) for entry in placed)])
    leaves = np.concatenate([entry.leaves for entry in placed])
    tokenizer = load_tokenizer(work.tokenizer)
    samples = []
    for level, cluster, share in chosen:
        members = np.flatnonzero(leaves // branching ** (levels - level) == cluster)
        drawn = np.sort(rng.choice(members, min(TEXTS, len(members)), replace=False))
        texts = []
        for number in drawn.tolist():
            at = int(np.searchsorted(sizes, number, "right")) - 1
            part = read_part(placed[at].path)
            window = int(placed[at].windows[number - sizes[at]])
            start, end = part.starts[window : window + 2].tolist()
            tokens = part.tokens[start : min(end, start + _TOKENS)].tolist()
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            texts.append(" ".join(text.split())[:CHARACTERS])
        samples.append({"level": level, "cluster": cluster, "share": share, "texts": texts})
    return samples
