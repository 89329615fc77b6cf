"""Names for the clusters of a corpus' tree, from the documents that were placed in them.

Notable: only some windows of each cluster are read, and of each its first tokens. They are copied
from the parts to a file in the order of the clusters, so that naming reads it from front to back
and nothing has to fit in memory. Which windows follows from the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..routing.names import name_tree, named_levels
from .part import read_part
from .windows import load_tokenizer
from .workfolder import WorkFolder
from .writer import Placed

#: Tokens of a window that are looked at.
TOKENS = 128

#: Windows in all that are looked at, about; most and fewest of one cluster.
WINDOWS, _MOST, _FEWEST = 1 << 18, 1024, 16


def name_clusters(
    work: WorkFolder,
    placed: Sequence[Placed],
    branching: int,
    levels: int,
    end_of_text: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``names.json`` beside the tree.

    Args:
        placed: the windows of the training split, a list for each part.
        branching, levels: of the tree.
        end_of_text: token id.
        seed: of the choice of windows.
        progress: called with clusters done, and all of them.

    Raises:
        FormatError: a part is damaged.
        OSError: the disk is full.
    """
    named = named_levels(branching, levels)
    if not named:
        return
    clusters = branching**named
    chosen, starts = _choose(placed, branching ** (levels - named), clusters, seed)
    sample = _copy(work, placed, chosen, end_of_text)
    tokenizer = load_tokenizer(work.tokenizer)

    def texts(cluster: int) -> list[str]:
        rows = np.asarray(sample[starts[cluster] : starts[cluster + 1]])
        return [
            # The last word may have been cut.
            text.rsplit(None, 1)[0] if cut and text.strip() else text
            for text, cut in zip(
                _decode(tokenizer, [row[row != end_of_text].tolist() for row in rows]),
                (rows != end_of_text).all(axis=1).tolist(),
                strict=True,
            )
        ]

    def report(done: int) -> None:
        if progress is not None:
            progress(done, clusters)

    names = name_tree(texts, branching, named, report)
    assert names is not None, "there are levels to name"
    names.save(work.routing)
    work.name_sample.unlink()


def _choose(
    placed: Sequence[Placed], below: int, clusters: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which placements are looked at.

    Returns:
        (n,) int64 numbers of placements, those of one cluster next to each other; and
        (clusters + 1,) int64, where those of each cluster start.
    """
    most = min(_MOST, max(_FEWEST, WINDOWS // clusters))
    ids = np.concatenate([np.empty(0, np.int64), *(entry.leaves // below for entry in placed)])
    order = np.random.default_rng([seed, 4]).permutation(len(ids))
    order = order[np.argsort(ids[order], kind="stable")]
    bounds = np.searchsorted(ids[order], np.arange(clusters + 1))
    rank = np.arange(len(order)) - bounds[ids[order]]
    kept = rank < most
    counts = np.minimum(np.diff(bounds), most)
    return order[kept], np.concatenate([[0], np.cumsum(counts)])


def _copy(
    work: WorkFolder, placed: Sequence[Placed], chosen: np.ndarray, end_of_text: int
) -> np.ndarray:
    """(n, TOKENS) uint32, mapped: the chosen windows' first tokens, filled with end-of-text."""
    places = np.argsort(chosen)  # in the order of the parts
    numbers = chosen[places]
    start = 0
    # Written, not mapped: on a full disk a write fails, where a page of a map is a crash.
    with open(work.name_sample, "wb", buffering=0) as file:
        for entry in placed:
            end = start + len(entry.leaves)
            first, last = np.searchsorted(numbers, (start, end)).tolist()
            if first < last:
                part = read_part(entry.path)
                windows = entry.windows[numbers[first:last] - start].tolist()
                for place, window in zip(places[first:last].tolist(), windows, strict=True):
                    row = np.full(TOKENS, end_of_text, "<u4")
                    tokens = part.tokens[part.starts[window] : part.starts[window + 1]][:TOKENS]
                    row[: len(tokens)] = tokens
                    file.seek(place * row.nbytes)
                    file.write(row.tobytes())
            start = end
    if not len(chosen):
        return np.empty((0, TOKENS), np.uint32)
    return np.memmap(work.name_sample, "<u4", "r", shape=(len(chosen), TOKENS))


def _decode(tokenizer: Any, tokens: list[list[int]]) -> list[str]:
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.decode_batch(tokens, skip_special_tokens=True)
    return [tokenizer.decode(one, skip_special_tokens=True) for one in tokens]
