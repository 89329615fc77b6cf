"""From leaves to placements: the split of a document, and the leaves a window is packed under.

Notable: a document's split follows from its text and the seed alone: equal texts are never on both
sides, and neither the order of the corpus nor who read it makes a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import FormatError
from .config import CorpusConfig
from .part import read_part
from .workfolder import UnitRecord, WorkFolder
from .writer import Placed


@dataclass(frozen=True)
class Placements:
    """Where every window goes.

    Attributes:
        train: one entry per part; a window once under each distinct leaf of its views.
        validation: likewise; a window under the leaf of its first view alone.
    """

    train: list[Placed]
    validation: list[Placed]


def in_validation(keys: np.ndarray, config: CorpusConfig) -> np.ndarray:
    """(D,) bool: which documents are kept for validation, by the numbers (D,) of their texts."""
    with np.errstate(over="ignore"):  # the arithmetic is meant modulo 2^64
        x = keys + np.uint64(config.seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        # SplitMix64 (Steele, Lea, Flood 2014): any change of the seed changes all bits.
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 2.0**-53 < config.validation


def place(
    work: WorkFolder,
    records: Sequence[UnitRecord],
    config: CorpusConfig,
    report: Callable[[int], object] | None = None,
) -> Placements:
    """Place every window of every part.

    Args:
        report: called with the number of vectors of each part.

    Raises:
        FormatError: a part, its keys or its leaves are damaged or do not fit together.
    """
    train, validation = [], []
    for record in records:
        for number, counts in enumerate(record.parts):
            path = work.part(record.unit, number)
            part = read_part(path)
            keys = work.array(record.unit, number, "keys")
            leaves = work.array(record.unit, number, "leaves")
            if len(leaves) != len(part.rows_window) or len(keys) != counts.documents:
                raise FormatError(
                    f"{path}: its keys or leaves are not those of this part; remove "
                    f"{record.unit}.json beside it and run again"
                )
            held = in_validation(keys, config)[part.documents]  # (W,)
            rows = np.flatnonzero(~held[part.rows_window])
            train.append(Placed(path, *_distinct(part.rows_window[rows], leaves[rows])))
            windows = np.flatnonzero(held)
            validation.append(Placed(path, windows, leaves[part.first_rows[windows]]))
            if report is not None:
                report(len(leaves))
    return Placements(train, validation)


def _distinct(windows: np.ndarray, leaves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs of window and leaf, by window and then leaf."""
    order = np.lexsort((leaves, windows))
    windows, leaves = windows[order], leaves[order]
    new = np.ones(len(windows), bool)
    new[1:] = (np.diff(windows) != 0) | (np.diff(leaves) != 0)
    return windows[new], leaves[new]
