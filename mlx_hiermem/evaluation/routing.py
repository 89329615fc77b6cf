"""The routing task: does a question arrive where its fact was trained?

The paper routes a document by its whole text and a question by the question alone, and does not
measure whether both arrive at the same place; a block knows only what was trained into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .questions import Question

if TYPE_CHECKING:
    from ..engine import MemoryLM


def landed(lm: MemoryLM, questions: Sequence[Question]) -> np.ndarray:
    """Where each question lands, by its prompt.

    Returns:
        (N, p) bool: whether the prompt's cluster at level l is one above a leaf under which a
        document of the fact was trained, or that leaf itself.
    """
    paths = lm.assign([question.prompt for question in questions])
    return lands(paths, [question.leaves for question in questions], lm.bank.config.branching)


def lands(paths: np.ndarray, leaves: Sequence[Sequence[int]], branching: int) -> np.ndarray:
    """(N, p) bool for paths (N, p) and the trained leaves of each: see :func:`landed`."""
    levels = paths.shape[1]
    right = np.zeros(paths.shape, bool)
    for level in range(1, levels + 1):
        below = branching ** (levels - level)  # leaves below one cluster of this level
        for row, (path, trained) in enumerate(zip(paths, leaves, strict=True)):
            right[row, level - 1] = path[level - 1] in {leaf // below for leaf in trained}
    return right


def summary(right: np.ndarray) -> dict[str, Any]:
    """``{"levels": [share at level 1, ..., share at the leaf], "n": questions}``."""
    return {"levels": [float(share) for share in right.mean(axis=0)], "n": len(right)}


def by_family(questions: Sequence[Question], right: np.ndarray) -> dict[str, dict[str, Any]]:
    """:func:`summary` of each family."""
    families = np.array([question.family for question in questions])
    return {str(family): summary(right[families == family]) for family in np.unique(families)}
