"""Loading a model with its memory bank: the folder, what must belong together, and the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from .anchors import check_runs, load_anchor, load_anchor_tokenizer
from .bank.journal import Snapshot
from .bank.layout import added_tree
from .bank.parts import Part
from .bank.store import MemoryBank
from .config import MemoryConfig
from .engine import MemoryLM
from .errors import ConfigError
from .memories import attach
from .models import find_model
from .routing.encoder import Encoder
from .routing.loading import load_encoder
from .routing.tree import ClusterTree


def load(
    path_or_repo: str | Path,
    bank: str | Path | None = None,
    memory_budget: int | None = None,
    revision: str | None = None,
    *,
    tiers: Mapping[int, str] | str | None = None,
    folders: Mapping[int, str | Path] | None = None,
    levels: Iterable[int] | None = None,
    subtrees: Iterable[int] | None = None,
    check_blocks: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MemoryLM:
    """Load an anchor with its memory bank.

    A bank without a tree (``mlx_hiermem init`` makes such) gives a model that cannot route.

    Args:
        path_or_repo: a model folder, the name of a model that ships ("atlas"), or a Hub repository.
        bank: the memory folder, when it is not ``memory/`` in the model folder.
        memory_budget: bytes that resident and cached blocks may take.
        revision: of the Hub repository: a branch, a tag or a commit.
        tiers, folders, check_blocks, progress: see ``MemoryBank.open``.
        levels, subtrees: the part of the bank that is wanted; of a Hub repository only the files of
            that part are downloaded. All other blocks read as zeros.

    Raises:
        ConfigError, FormatError, BudgetError, PathError: something is missing, damaged, unknown, or
            does not fit.
    """
    part = Part.of(levels, subtrees)
    folder = find_model(path_or_repo, revision, part)
    memory_folder = folder / "memory" if bank is None else Path(bank).expanduser()
    if not memory_folder.is_dir():
        raise ConfigError(f"{memory_folder}: no such folder; {_instead(folder, bank is None)}")
    store = MemoryBank.open(
        memory_folder,
        memory_budget=memory_budget,
        tiers=tiers,
        folders=folders,
        part=part,
        check_blocks=check_blocks,
        progress=progress,
    )
    try:
        anchor, config = load_anchor(folder)
        tokenizer = load_anchor_tokenizer(folder, config)
        tree, encoder = None, None
        if (memory_folder / "tree.safetensors").is_file():  # a fresh bank may have none
            tree, encoder = _load_routing(memory_folder, store.config, anchor, tokenizer)
        try:
            model = attach(anchor, store.config)
        except ConfigError as error:
            raise ConfigError(f"{memory_folder}: {error}") from None
        try:
            check_runs(model)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from None
        return MemoryLM(model, tokenizer, store, tree, encoder, config)
    except BaseException:
        store.close()
        raise


def _load_routing(
    folder: Path, config: MemoryConfig, anchor: nn.Module, tokenizer: Any
) -> tuple[ClusterTree, Encoder]:
    path = folder / "tree.safetensors"
    tree = ClusterTree.load(path)
    for added in config.added:
        # While an edit comes into force the file may still have another name.
        name = Snapshot(folder).name(added_tree(added.name))
        tree = tree.load_added(folder / name, added.roots)
    if (tree.branching, tree.levels) != (config.branching, config.levels):
        raise ConfigError(
            f"{path}: branching {tree.branching}, levels {tree.levels}; config.json says "
            f"{config.branching} and {config.levels}; they do not belong together, download the "
            "bank again"
        )
    encoder = load_encoder(config.encoder, folder=folder, anchor=anchor, tokenizer=tokenizer)
    if encoder.width != tree.width:
        raise ConfigError(
            f"{path}: grown on vectors {tree.width} wide, the encoder of config.json gives "
            f"{encoder.width}; they do not belong together, download the bank again"
        )
    return tree, encoder


def _instead(folder: Path, own: bool) -> str:
    """What to do where ``folder`` has no memory folder (``own``), or the one given is not there."""
    if own and (folder / "model" / "config.json").is_file():
        return f"{folder} is the folder of a training run; give its model, {folder / 'model'}"
    if own and (folder / "corpus.json").is_file():
        return f"{folder} is a corpus; train a model on it with `mlx_hiermem train --data {folder}`"
    if own and (folder / "manifest.json").is_file():
        return f"{folder} is a memory folder; give the model folder that it is in, {folder.parent}"
    return (
        "expected a memory bank; name one with bank (--bank), make one with `mlx_hiermem init` "
        "and train it, or use mlx_lm for a model without memories"
    )
