"""What a run starts from: an anchor, a memory config that fits corpus and anchor, start values."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from ..anchors import load_anchor, openlm
from ..backend import device_facts
from ..bank.blocked import BlockedBlocks, show_blocks
from ..bank.layout import CONFIG
from ..bank.manifest import MANIFEST
from ..bank.reader import BlockReader
from ..config import AnchorShape, MemoryConfig, placement
from ..corpus.folder import Corpus, file_sha256
from ..corpus.packed import PackedCorpus
from ..errors import TrainingError
from ..folders import Originals, anchor_files
from ..memories import GENERIC, start_block
from ..models import find_model
from ..routing.embeddings import embedding_table
from .fingerprints import TREE, anchor_bytes, anchor_sha256, tree_sha256
from .rows import BankRows

#: The paper's memory config for its 160M anchor.
DEFAULT_RANKS = (256, 64, 16, 0)


@dataclass(frozen=True)
class Start:
    """The anchor that a run starts from.

    Attributes:
        anchor: the network.
        config: its ``config.json``.
        folder: its model folder; None for an anchor with random weights.
        files: of that folder, or of the corpus's tokenizer, which go into the result.
        routing: the files of the corpus's tree and encoder, which do so too.
    """

    anchor: nn.Module
    config: dict[str, Any]
    folder: Path | None
    files: Originals
    routing: Originals


def open_start(corpus: Corpus, model: str | None, size: str | None, seed: int) -> Start:
    """A trained anchor, or an OpenLM anchor with random weights.

    Args:
        model: model folder, name of a model that ships, or Hub repository.
        size: if there is no ``model``: one of the paper's anchors ("160M", "410M", "1.4B"), or a
            JSON file with the fields of an OpenLM ``config.json``.
        seed: of the random weights.

    Raises:
        TrainingError: there is no such anchor.
    """
    routing = Originals(corpus.routing_folder, _files_below(corpus.routing_folder))
    if model is not None:
        folder = find_model(model)
        files = Originals(folder, anchor_files(folder))  # before they are read
        return Start(*load_anchor(folder), folder, files, routing)
    assert size is not None, "without a model there is a size"
    if size in openlm.PRESETS:
        args = openlm.PRESETS[size]
    else:
        path = Path(size).expanduser()
        try:
            args = openlm.ModelArgs.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise TrainingError(
                f"anchor {size}: neither one of {', '.join(openlm.PRESETS)} nor a JSON file with "
                f"the fields of an OpenLM config.json ({' '.join(str(error).split())})"
            ) from None
    AnchorShape.of(args)
    mx.random.seed(seed)
    anchor = openlm.Model(args)
    openlm.init_weights(anchor)
    config = asdict(args) | {"eos_token_id": corpus.info.tokenizer["end_of_text"]}
    tokenizer = corpus.tokenizer_folder
    return Start(anchor, config, None, Originals(tokenizer, anchor_files(tokenizer)), routing)


def _files_below(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.as_posix() for path in paths if not path.name.startswith(".")]


def takes_mask(anchor: nn.Module) -> bool:
    """Whether an anchor can be told to keep attention inside documents; mlx-lm's cannot."""
    return "mask" in inspect.signature(type(anchor).__call__).parameters


def default_budget() -> int:
    """A quarter of the system's memory, in bytes."""
    return device_facts()["memory"]["system"] // 4


def check_tokens(corpus: Corpus, start: Start) -> None:
    """Raise TrainingError where the corpus was made of other tokens than the anchor's."""
    vocabulary = corpus.info.tokenizer["vocab_size"]
    table = len(embedding_table(start.anchor))
    if vocabulary > table:
        raise TrainingError(
            f"{corpus.folder}: its tokenizer has {vocabulary} tokens, the anchor {table}; "
            "cluster the corpus with the anchor's own tokenizer"
        )
    theirs = corpus.tokenizer_folder / "tokenizer.json"
    ours = None if start.folder is None else start.folder / "tokenizer.json"
    if ours is not None and theirs.is_file() and ours.is_file():
        if ours.read_bytes() != theirs.read_bytes():
            raise TrainingError(
                f"{corpus.folder}: was made with another tokenizer than {start.folder} has; "
                "cluster the corpus with --model of this anchor"
            )


def check_encoder(corpus: Corpus, anchor: nn.Module, trains_anchor: bool) -> None:
    """Raise TrainingError where the tree's encoder is made of other embeddings than the anchor's.

    So it would be after a run that changes them, unless they are frozen.
    """
    if corpus.info.encoder["type"] != "embeddings":
        return
    table = embedding_table(anchor)
    if hashlib.sha256(table.tobytes()).hexdigest() != corpus.info.embedding_sha256:
        raise TrainingError(
            f"{corpus.folder}: its tree was grown with the token embeddings of another anchor; "
            "cluster the corpus with --model of this anchor, or with a BERT encoder"
        )
    changes = {name for name, _ in tree_flatten(anchor.trainable_parameters())}
    tables = [
        f"{name}.weight"
        for name, module in anchor.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    if trains_anchor and changes & set(tables):
        raise TrainingError(
            f"{corpus.folder}: its tree's encoder is made of the anchor's token embeddings, which "
            "this run would change; give --freeze '*embed*', or cluster with a BERT encoder"
        )


def fingerprint(anchor: nn.Module) -> str:
    """The sha256 of the anchor's weights, with a progress bar for large ones."""
    total = anchor_bytes(anchor)
    with tqdm(
        total=total, desc="anchor", unit="B", unit_scale=True, delay=1, leave=False, disable=None
    ) as bar:
        return anchor_sha256(anchor, bar.update)


def freeze(anchor: nn.Module, patterns: Sequence[str], trains_anchor: bool) -> list[str]:
    """Freeze the anchor's parameters whose names match; returns the names, sorted.

    Args:
        patterns: such as ``model.embed_tokens*``; ``*`` stands for anything.
        trains_anchor: whether some of it has to learn.

    Raises:
        TrainingError: a pattern matches nothing, or nothing is left to learn.
    """
    modules = dict(anchor.named_modules())
    names = [name for name, _ in tree_flatten(anchor.parameters())]
    frozen = set()
    for pattern in patterns:
        found = {name for name in names if fnmatch(name, pattern)}
        if not found:
            raise TrainingError(
                f"freeze {pattern!r}: no parameter of the anchor has such a name; they are named "
                f"like {names[0]}"
            )
        frozen |= found
    for name in frozen:
        module, _, parameter = name.rpartition(".")
        modules[module].freeze(keys=parameter, recurse=False)
    if trains_anchor and not tree_flatten(anchor.trainable_parameters()):
        raise TrainingError(
            f"freeze {' '.join(map(repr, patterns))}: nothing of the anchor is left to learn; "
            "freeze less, or use regime frozen, which trains memories alone"
        )
    return sorted(frozen)


def memory_config(
    corpus: Corpus,
    anchor: nn.Module,
    name: str,
    ranks: Sequence[int] | None,
    layers: str,
    dtype: str,
    kind: str = "ffn",
) -> MemoryConfig:
    """The memory config for a corpus and an anchor.

    Args:
        name: of the anchor, for the record.
        ranks: one per level of the corpus's tree; by default the paper's, for trees of 4 levels.
        layers: which have memory; see ``config.placement``.

    Raises:
        ConfigError: there is no such kind, or no such layers.
        TrainingError: the ranks are not as many as the tree has levels.
    """
    if ranks is None and corpus.info.levels == len(DEFAULT_RANKS):
        ranks = DEFAULT_RANKS
    if ranks is None or len(ranks) != corpus.info.levels:
        given = "none are given" if ranks is None else f"given are {','.join(map(str, ranks))}"
        raise TrainingError(
            f"ranks: the corpus's tree has {corpus.info.levels} levels, {given}; give one rank "
            "for each level, 0 where there is to be no memory"
        )
    shape = AnchorShape.of(anchor)
    return MemoryConfig(
        ranks=tuple(ranks),
        kind=kind,
        branching=corpus.info.branching,
        layers=placement(layers, shape.num_hidden_layers),
        encoder=corpus.info.encoder,
        dtype=dtype,
        base_anchor={"name": name, "shape": asdict(shape)},
    )


def bank_folder(start: Start) -> Path | None:
    """The memory folder that comes with the anchor, if there is one."""
    memory = None if start.folder is None else start.folder / "memory"
    return memory if memory is not None and (memory / MANIFEST).is_file() else None


def like_bank(
    corpus: Corpus,
    bank: Path | None,
    ranks: Sequence[int] | None,
    layers: str | None,
    dtype: str | None,
    kind: str | None,
) -> tuple[Sequence[int] | None, str, str, str]:
    """What of a memory config was not given (None), as in the bank that training goes on from.

    Args:
        bank: its memory folder; without one the defaults are taken.

    Raises:
        TrainingError: the bank is for a tree of another shape than the corpus's.
    """
    if bank is not None:
        theirs = MemoryConfig.load(bank / CONFIG)
        if (theirs.branching, theirs.levels) != (corpus.info.branching, corpus.info.levels):
            raise TrainingError(
                f"{bank}: is for a tree of branching {theirs.branching} and {theirs.levels} "
                f"levels, that of {corpus.folder} has {corpus.info.branching} and "
                f"{corpus.info.levels}; cluster with --branching {theirs.branching} --levels "
                f"{theirs.levels}, or give --fresh-memory to start another bank"
            )
        where = "uniform" if theirs.layers is None else ",".join(map(str, theirs.layers))
        ranks, layers = ranks or theirs.ranks, layers or where
        dtype, kind = dtype or theirs.dtype, kind or theirs.kind
    return ranks, layers or "uniform", dtype or "bfloat16", kind or "ffn"


def bank_revision(bank: Path | None) -> str | None:
    """The sha256 of a bank's manifest, which names that of every file; None for no bank."""
    return None if bank is None else file_sha256(bank / MANIFEST)


def open_rows(
    corpus: Corpus,
    config: MemoryConfig,
    seed: int,
    memory: Path | None,
    state: Path,
    budget: int,
) -> BankRows:
    """The bank in training, with its files in ``state``.

    Args:
        seed: of the start values.
        memory: the memory folder of a bank, whose blocks training goes on from: those that are not
            zeros. One without a tree goes with any.

    Raises:
        TrainingError: that bank is of another tree or memory config, or not all of its blocks are
            to be trained on from: some are added, blocked or removed.
    """
    if memory is None:

        def start(level: int, cluster: int) -> np.ndarray:
            return start_block(config, level, cluster, seed)

        return BankRows(config, start, state, budget)
    reader = BlockReader(memory)
    if reader.config.packing is not None:
        raise TrainingError(
            f"{memory}: the bank is quantised ({reader.config.packing}); go on from the one that "
            "it was made from, or give --fresh-memory to start another"
        )
    if reader.config.added:
        names = ", ".join(one.name for one in reader.config.added)
        raise TrainingError(
            f"{memory}: has added memories ({names}), which a run would leave out; train the bank "
            "without them and add them to the result, or give --fresh-memory to start another"
        )
    _check_blocked(memory, reader.blocked)
    routed = (memory / TREE).is_file()
    for name in ("kind", "ranks", "branching", "layers", *(["encoder"] if routed else [])):
        theirs, ours = getattr(reader.config, name), getattr(config, name)
        if theirs != ours:
            raise TrainingError(
                f"{memory}: {name} is {theirs}, this run's {ours}; give the same to go on from "
                "this bank, or --fresh-memory to start another"
            )
    if routed and tree_sha256(memory) != corpus.info.tree_sha256:
        raise TrainingError(
            f"{memory}: its tree is not the one that {corpus.folder} was clustered with; cluster "
            f"the corpus with --tree {memory}, or give --fresh-memory to start another bank"
        )

    def stored(level: int, cluster: int) -> np.ndarray:
        block = reader.block(level, None if cluster == GENERIC else cluster)
        # A block of zeros cannot learn: its gradients are zeros, or, in kv, the same for all pairs.
        # Start values have no effect either.
        return block if block.any() else start_block(config, level, cluster, seed)

    return BankRows(config, stored, state, budget)


def _check_blocked(memory: Path, blocked: BlockedBlocks) -> None:
    """Raise TrainingError where blocks of a bank are switched off or gone.

    A run fetches and trains every block, and its result is a new bank, without the list: so what
    was blocked or removed would work again, and nobody would have said so.
    """
    if blocked:
        raise TrainingError(
            f"{memory}: has blocked blocks ({show_blocks(blocked)}), which a run would train and "
            "switch on again; unblock them first, in a copy of the model if need be (mlx_hiermem "
            "bank unblock), or give --fresh-memory to start another bank"
        )
    if blocked.removed:
        raise TrainingError(
            f"{memory}: has removed blocks ({show_blocks(blocked.removed)}), which a run would "
            "train anew from the corpus; if they may come back, put zeros in their place "
            "(docs/training.md), or give --fresh-memory to start another bank"
        )


def of_subtree(
    corpus: Corpus, config: MemoryConfig, subtree: int
) -> tuple[PackedCorpus, PackedCorpus | None]:
    """The sequences of one level-1 subtree, for training and for validation.

    Raises:
        TrainingError: there is no such subtree, or the corpus has no sequence of it.
    """
    if not 0 <= subtree < config.branching:
        raise TrainingError(
            f"subtree {subtree}: the tree's level-1 clusters are 0 to {config.branching - 1}"
        )
    width = config.branching ** (config.levels - 1)

    def of(split: PackedCorpus) -> PackedCorpus:
        return split.select(split.leaves // width == subtree)

    train, held_out = of(corpus.train), corpus.validation
    if not len(train):
        raise TrainingError(f"subtree {subtree}: {corpus.folder} has no sequence of it")
    return train, None if held_out is None else of(held_out)
