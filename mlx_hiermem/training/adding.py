"""Adding knowledge: grow a subtree for new documents, train its blocks alone, add it to the bank.

The anchor and all blocks that are there stay as they are: only rows of the new clusters are used
and learn (the regime ``frozen``). They start without effect: as copies of the generic memory
they learned far slower, as that is trained to its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..bank import extend
from ..bank.dtypes import all_finite, to_storage
from ..bank.quantize import Packer
from ..config import MemoryConfig
from ..corpus.private import (
    DEFAULT_VIEWS,
    PrivateCorpus,
    encode,
    find_radius,
    grow_subtree,
    read_private,
)
from ..corpus.views import check_views
from ..engine import MemoryLM
from ..errors import ConfigError, FormatError, InputError, TrainingError
from ..memories import attach, detach, start_block
from ..routing.names import NAMES, ClusterNames, name_tree, unnamed
from ..routing.tree import AddedTree
from .config import TrainConfig
from .rows import BankRows
from .setup import takes_mask
from .trainer import Trainer

#: Passes over the documents, and the fewest and most steps, where no steps are given.
PASSES, FEWEST, MOST = 12, 200, 3000
#: Texts for each leaf, and the most clusters at level 1, where these are not given.
TEXTS_PER_LEAF, MOST_ROOTS = 20, 4
_LONGEST = 2048


@dataclass(frozen=True)
class AddSettings:
    """How a memory is trained before it is added.

    Raises:
        InputError: a value is out of range.
    """

    name: str
    roots: int | None = None
    iters: int | None = None
    batch_size: int = 8
    learning_rate: float = 1e-2
    seed: int = 0
    text_field: str = "text"
    views: Sequence[str] = DEFAULT_VIEWS

    def __post_init__(self) -> None:
        for name, low in (("roots", 1), ("iters", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} is {value}; expected at least {low}")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"--learning-rate is {self.learning_rate}; expected more than 0")
        check_views(self.views)


@dataclass(frozen=True)
class Addition:
    """A trained memory that is ready to be added.

    Attributes:
        config: of the bank that it will be part of.
        trainer: holds its rows.
        tree: its file of centroids.
        leaves: (texts,) the leaf of each text that documents are routed by.
        report: for people and JSON.
    """

    config: MemoryConfig
    trainer: Trainer
    tree: bytes
    corpus: PrivateCorpus
    leaves: np.ndarray
    report: dict[str, Any]


def add_memory(
    lm: MemoryLM,
    folder: Path,
    data: Sequence[str],
    settings: AddSettings,
) -> dict[str, Any]:
    """Train a memory on documents and add it to a model's bank.

    Args:
        lm: the model; its memories are detached from the anchor by this, so it is of no more use.
        folder: of the model, which has the tokenizer.
        data: the documents: files, folders or patterns (``corpus.sources``).

    Returns:
        ``{"folder", "name", "first", "roots", "documents", "tokens", "texts", "lands", "steps",
        "loss_before", "loss", "bytes", "revision", "revision_before"}``.

    Raises:
        InputError, ConfigError, FormatError, TrainingError: documents, bank or settings are not
            what they should be. The bank is then as it was.
    """
    addition = train_addition(lm, folder, data, settings)
    memory = lm.bank.folder
    before = lm.bank.revision
    total = extend.added_bytes(addition.config, settings.name)
    try:
        with tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=None) as bar:

            def written(_: int, count: int) -> None:
                bar.update(count)

            revision = extend.add(
                memory,
                settings.name,
                addition.report["roots"],
                lambda level: stored_rows(addition, settings.name, level),
                addition.tree,
                lambda data: _names(data, memory, addition, settings.name),
                written,
            )
    finally:
        addition.trainer.memory_rows.close()
    return {
        "folder": str(memory),
        "name": settings.name,
        **addition.report,
        "bytes": total,
        "revision": revision,
        "revision_before": before,
    }


def train_addition(
    lm: MemoryLM,
    folder: Path,
    data: Sequence[str],
    settings: AddSettings,
) -> Addition:
    """Everything of :func:`add_memory` but the writing."""
    memory, bank = lm.bank.folder, lm.bank.config
    extend.check_new(memory, bank, settings.name, settings.roots or 1)
    if lm.tree is None or lm.encoder is None:
        raise ConfigError(f"{lm.bank.folder}: this bank has no tree; train it first")
    names = ClusterNames.load(memory, lm.bank.file_name(NAMES))
    if names is not None:  # what is wrong with them is to be told before the training, not after
        _check_names(names, memory, bank, bank.roots)
    with tqdm(desc="reading", unit=" documents", disable=None) as bar:
        most = min(lm.context_length or _LONGEST, _LONGEST)
        corpus = read_private(data, folder, most, settings.text_field, settings.views, bar.update)
    with tqdm(total=len(corpus.texts), desc="embedding", unit=" texts", disable=None) as bar:
        vectors = encode(lm.encoder, corpus.texts, bar.update)
    below = bank.branching ** (bank.levels - 1)  # leaves below one root
    roots = settings.roots
    if roots is None:
        roots = max(1, min(MOST_ROOTS, -(-len(vectors) // (TEXTS_PER_LEAF * below))))
    config = extend.check_new(memory, bank, settings.name, roots)
    first = config.added_roots()[settings.name].start
    shape = roots, bank.branching, bank.levels, settings.seed
    with tqdm(total=3, desc="clustering", unit="pass", disable=None) as bar:
        centroids, leaves = grow_subtree(vectors, *shape)
        bar.update()
        radius = find_radius(vectors, *shape, bar.update)
    tree = lm.tree.with_added([AddedTree(centroids, radius)])
    landed = tree.assign(vectors)[0][:, 0]
    lands = float(np.mean((landed >= first) & (landed < first + roots)))
    leaves = leaves + first * below

    rows = BankRows(
        config, lambda level, cluster: start_block(config, level, cluster, settings.seed)
    )
    trainer = _trainer(lm, config, corpus, leaves, rows, settings)
    losses = []
    with tqdm(total=trainer.config.iters, desc="training", unit="step", disable=None) as bar:
        for _ in range(trainer.config.iters):
            losses.append(trainer.step().loss)
            bar.update()
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    tail = max(1, len(losses) // 20)
    report = {
        "first": first,
        "roots": roots,
        "documents": corpus.documents,
        "tokens": corpus.tokens,
        "texts": len(corpus.texts),
        "lands": lands,
        "steps": trainer.done,
        "loss_before": losses[0],
        "loss": sum(losses[-tail:]) / tail,
    }
    number = len(config.added) - 1
    return Addition(config, trainer, tree.added_bytes(number), corpus, leaves, report)


def _trainer(
    lm: MemoryLM,
    config: MemoryConfig,
    corpus: PrivateCorpus,
    leaves: np.ndarray,
    rows: BankRows,
    settings: AddSettings,
) -> Trainer:
    packed = corpus.pack(leaves)
    batch = min(settings.batch_size, len(packed))
    steps = settings.iters
    if steps is None:
        steps = min(MOST, max(FEWEST, PASSES * len(packed) // batch))
    training = TrainConfig(
        "frozen",
        iters=steps,
        batch_size=batch,
        learning_rate=settings.learning_rate,
        final_learning_rate=settings.learning_rate / 10,
        warmup_steps=steps // 20,
        generic_probability=0.0,
        document_mask=takes_mask(lm.model.anchor),
        seed=settings.seed,
    )
    return Trainer(attach(detach(lm.model), config), packed, training, rows)


def stored_rows(addition: Addition, name: str, level: int) -> Iterator[np.ndarray]:
    """The blocks of an added memory at a level, (1, stored_size) each, as the bank stores them.

    Raises:
        TrainingError: a number is too large for the bank's dtype.
    """
    config = addition.config
    roots = config.added_roots()[name]
    below = config.branching ** (level - 1)
    packer = Packer(config, config.packing) if config.packing is not None else None
    clusters = range(roots.start * below, roots.stop * below)
    rows = addition.trainer.memory_rows.values(level, clusters)
    for cluster, values in zip(clusters, rows, strict=True):
        stored = to_storage(values, config.dtype)[None]
        where = f"block {cluster} of level {level}"
        if not all_finite(stored, config.dtype):
            raise TrainingError(
                f"{where}: holds a number too large for {config.dtype}; lower --learning-rate"
            )
        yield stored if packer is None else packer.pack(stored, where)


def _check_names(names: ClusterNames, memory: Path, config: MemoryConfig, roots: int) -> None:
    """Raise FormatError where these are not the names of the clusters of a bank."""
    try:
        names.check(config.branching, config.levels, roots)
    except FormatError as error:  # begins with the file's name
        raise FormatError(f"{memory}/{error}") from None


def _names(data: bytes, memory: Path, addition: Addition, name: str) -> bytes:
    """``names.json`` with names of the new clusters.

    Raises:
        FormatError: it has been changed during the training, and is not what it should be.
    """
    config, corpus = addition.config, addition.corpus
    roots, k = config.added_roots()[name], config.branching
    now = ClusterNames.parse(data, memory / NAMES)
    _check_names(now, memory, config, roots.start)
    levels = [list(one) for one in now.levels]
    below = k ** (config.levels - len(levels))
    members: dict[int, list[str]] = {}
    for leaf, text in zip(addition.leaves.tolist(), corpus.texts, strict=True):
        members.setdefault(leaf // below, []).append(text)
    levels[0] += [name if len(roots) == 1 else f"{name} {i}" for i in range(1, len(roots) + 1)]
    for root in roots:

        def texts(cluster: int, start: int = root * k ** (len(levels) - 1)) -> list[str]:
            return members.get(start + cluster, [])

        found = name_tree(texts, k, len(levels) - 1)
        for level, names in enumerate(found.levels if found is not None else (), 2):
            first = root * k ** (level - 1)
            levels[level - 1] += [
                unnamed(first + number) if one == unnamed(number) else one
                for number, one in enumerate(names)
            ]
    return ClusterNames(levels).to_bytes()
