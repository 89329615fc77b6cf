"""The tree of a corpus: grown on a sample of its vectors, or taken from elsewhere; and assigning.

Notable: the sample is drawn by row number over all parts in their order, so it is the same whoever
made the parts; it is written to a file, shuffled, and mapped, so that it need not fit in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FormatError, InputError
from ..routing.grow import grow
from ..routing.names import NAMES, ClusterNames
from ..routing.tree import ClusterTree
from .config import DEFAULT_BRANCHING, DEFAULT_LEVELS, CorpusConfig
from .encoders import TREE, Chosen
from .part import read_part
from .placing import in_validation
from .windows import copy_files
from .workfolder import UnitRecord, WorkFolder, read_json, write_array, write_json

#: Vectors that are gathered, and assigned, at a time.
_ROWS = 1 << 14

Report = Callable[[float], None]


def load_tree(routing: Path) -> ClusterTree:
    """The tree of a routing folder.

    Raises:
        FormatError: it is missing or damaged.
    """
    return ClusterTree.load(routing / TREE)


def take_tree(config: CorpusConfig, routing: Path, width: int) -> None:
    """Copy the tree that is given, as it is, into the routing folder, with its names.

    Args:
        width: of the encoder's vectors.

    Raises:
        InputError: it is not of the shape that is asked for, or of another width.
        FormatError: it is missing or damaged, or its names are.
    """
    folder = config.tree
    assert folder is not None, "a tree is given"
    tree = load_tree(folder)
    for name in ("branching", "levels"):
        asked, found = getattr(config, name), getattr(tree, name)
        if asked not in (None, found):
            raise InputError(
                f"--{name} is {asked}, but the tree in {folder} has {found}; leave it out"
            )
    if tree.width != width:
        raise InputError(
            f"{folder / TREE}: grown on vectors {tree.width} wide, the encoder gives {width}; "
            "leave --encoder out to take the tree's own"
        )
    names = ClusterNames.load(folder)
    if names is not None:
        names = names.of_tree(tree.branching)
        names.check(tree.branching, tree.levels)
        names.save(routing)
    copy_files(folder, routing, [TREE])


def has_names(folder: Path) -> bool:
    """Whether the tree in ``folder`` has names beside it, which go where it goes."""
    return (folder / NAMES).exists()


# ---- growing ---------------------------------------------------------------------------


def grow_tree(
    work: WorkFolder,
    records: Sequence[UnitRecord],
    config: CorpusConfig,
    chosen: Chosen,
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Grow the tree on a sample of the vectors of the training documents, and save it.

    Args:
        progress: as :func:`grow`.

    Raises:
        InputError: there are fewer windows than clusters; or a tree was grown before with other
            settings.
        FormatError: a part is damaged, or a file cannot be written.
    """
    settings = _settings(config)
    grown = work.routing / TREE
    if work.tree_settings.exists() and grown.exists():
        before = read_json(work.tree_settings)
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"{work.out}: its tree was grown with {name} {before.get(name)}, this run says "
                    f"{value}; give the same to go on, or remove {work.tree_settings} to grow "
                    "another tree"
                )
        return
    rows = _training_rows(work, records, config)
    k, p = _shape(config)
    if rows.windows < k**p:
        raise InputError(_too_few(rows.windows, k, p))
    vectors = _sample(work, records, rows, config)
    # What is left of a tree that is not wanted any more goes before the new settings are written.
    grown.unlink(missing_ok=True)
    (work.routing / NAMES).unlink(missing_ok=True)
    for path in work.parts.glob("*.leaves.npy"):
        path.unlink()
    write_json(work.tree_settings, settings)

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, len(vectors), _ROWS):
            yield vectors[start : start + _ROWS]

    tree = grow(chunks, k, p, seed=config.seed, progress=progress)
    ClusterTree(tree.centroids, chosen.config).save(grown)
    work.sample.unlink()


def _shape(config: CorpusConfig) -> tuple[int, int]:
    """k and p of the tree that is grown."""
    return config.branching or DEFAULT_BRANCHING, config.levels or DEFAULT_LEVELS


def _settings(config: CorpusConfig) -> dict[str, int | float]:
    """What the tree depends on besides the vectors."""
    branching, levels = _shape(config)
    return {
        "branching": branching,
        "levels": levels,
        "tree_samples": config.tree_samples,
        "validation": config.validation,
    }


def _too_few(windows: int, k: int, p: int) -> str:
    levels = max((level for level in range(1, p) if k**level <= windows), default=0)
    fewer = f"--levels {levels}" if levels else f"--branching {max(2, windows)} --levels 1"
    return (
        f"the corpus has {windows} windows of text to train on, fewer than the {k**p} clusters of "
        f"{p} levels of {k}; give more documents, or for instance {fewer}"
    )


@dataclass(frozen=True)
class _Rows:
    """Which vectors of the corpus are of training documents: (N,) bool over all parts."""

    mine: np.ndarray
    windows: int


def _training_rows(work: WorkFolder, records: Sequence[UnitRecord], config: CorpusConfig) -> _Rows:
    mine, windows = [np.empty(0, bool)], 0
    for record in records:
        for number in range(len(record.parts)):
            part = read_part(work.part(record.unit, number))
            held = in_validation(work.array(record.unit, number, "keys"), config)
            kept = ~held[part.documents]
            windows += int(kept.sum())
            mine.append(kept[part.rows_window])
    return _Rows(np.concatenate(mine), windows)


def _sample(
    work: WorkFolder, records: Sequence[UnitRecord], rows: _Rows, config: CorpusConfig
) -> np.ndarray:
    """(n, c) float32, mapped: the sample, in an order that is shuffled with the seed."""
    rng = np.random.default_rng([config.seed, 1])
    every = np.flatnonzero(rows.mine)
    count = min(config.tree_samples, len(every))
    chosen = every[rng.choice(len(every), count, replace=False)]  # in a random order already
    places = np.argsort(chosen)  # of the chosen rows in the sample, in the order of the parts
    chosen = chosen[places]
    start, width = 0, 0
    # Written, not mapped: on a full disk a write fails, where a page of a map is a crash.
    with open(work.sample, "wb", buffering=0) as file:
        for record in records:
            for number in range(len(record.parts)):
                vectors = read_part(work.part(record.unit, number)).vectors
                width, end = vectors.shape[1], start + len(vectors)
                first, last = np.searchsorted(chosen, (start, end)).tolist()
                found = vectors[chosen[first:last] - start]
                for place, vector in zip(places[first:last].tolist(), found, strict=True):
                    file.seek(place * width * 4)
                    file.write(vector.tobytes())
                start = end
    return np.memmap(work.sample, np.float32, "r", shape=(count, width))


# ---- assigning -------------------------------------------------------------------------


class UnitAssigner:
    """Finds the leaf of every vector of a unit. One per worker process."""

    def __init__(self, out: Path) -> None:
        self.work = WorkFolder(out)
        self.tree = load_tree(self.work.routing)

    def __call__(self, record: UnitRecord, report: Report | None = None) -> UnitRecord:
        """Assign the vectors of a unit's parts, unless that is done.

        Raises:
            FormatError: a part is damaged, or the leaves cannot be written.
        """
        done = 0
        for number in range(len(record.parts)):
            path = self.work.part(record.unit, number, "leaves.npy")
            vectors = read_part(self.work.part(record.unit, number)).vectors
            if not path.exists():
                leaves = [np.empty(0, np.int64)]
                for start in range(0, len(vectors), _ROWS):
                    leaves.append(self.tree.assign(vectors[start : start + _ROWS])[0][:, -1])
                    if report is not None:
                        report((done + start) / record.size)
                with self.work.attempt(f"{record.unit}-leaves") as folder:
                    write_array(folder / path.name, np.concatenate(leaves))
            done += len(vectors)
        return record


def remove_work(work: WorkFolder) -> None:
    """Remove the work folder.

    Raises:
        FormatError: it cannot be removed.
    """
    try:
        shutil.rmtree(work.folder)
    except OSError as error:
        raise FormatError(
            f"{work.folder}: cannot be removed ({error.strerror}); the corpus is whole without it"
        ) from None
