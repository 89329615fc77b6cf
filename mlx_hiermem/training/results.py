"""What a finished run leaves: a model folder, or the result of one subtree for ``merge``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.utils import save_model
from tqdm import tqdm

from ..bank.writer import write_bank
from ..config import MemoryConfig
from ..corpus.folder import Corpus
from ..errors import FormatError
from ..folders import is_weights, model_folder
from ..memories import GENERIC
from .rows import BankRows
from .setup import Start
from .subtree import write_subtree
from .trainer import Trainer


def write_model(
    out: Path,
    trainer: Trainer,
    start: Start,
    memory: MemoryConfig | None,
    card: str,
) -> None:
    """Write the model folder (docs/format.md) of a run, whole or not at all.

    An anchor that did not learn is copied as it was; one that did has the dtype of the computation.

    Args:
        out: must not exist.
        start: what the run started from.
        memory: the memory config; None for a bare anchor.
        card: text of its README.md.
    """
    with model_folder(out) as folder:
        learned = trainer.config.trains_anchor
        for name in start.files.names:
            if not (learned and is_weights(name)):
                start.files.copy(name, folder)
        if learned:
            trainer.settle()
            try:
                save_model(folder, trainer.anchor)
            except RuntimeError as error:  # MLX's own, for a full disk too
                reason = " ".join(str(error).split())
                raise FormatError(
                    f"{out}: cannot be written ({reason}); check the folder and free space"
                ) from None
            dtype = str(trainer.dtype).removeprefix("mlx.core.")
            text = json.dumps(start.config | {"torch_dtype": dtype}, indent=2)
            (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
        if memory is not None:
            _copy_routing(start, folder / "memory")
            write_memory(folder / "memory", trainer.memory_rows, memory)


def write_memory(folder: Path, rows: BankRows, config: MemoryConfig) -> None:
    """Write the bank in training to a memory folder; blocks never visited have start values."""
    total = sum(config.clusters(level) for level in config.memory_levels)
    with tqdm(total=total, desc="bank", unit="block", leave=False, disable=None) as bar:
        levels = {
            level: _blocks(rows, level, range(config.clusters(level)), bar)
            for level in config.memory_levels
        }
        generic = [next(rows.values(level, [GENERIC])) for level in config.memory_levels]
        write_bank(folder, config, levels, np.concatenate(generic))


def write_subtree_result(
    out: Path,
    trainer: Trainer,
    corpus: Corpus,
    start: Start,
    config: MemoryConfig,
    subtree: int,
    identity: dict[str, Any],
) -> None:
    """Write the result of ``train --subtree``: the subtree's blocks, and what they belong to.

    Args:
        start: what the run started from.
        identity: of the run, as its checkpoints hold it.
    """

    def blocks(level: int) -> Iterator[np.ndarray]:
        width = config.branching ** (level - 1)
        clusters = range(subtree * width, (subtree + 1) * width)
        return _blocks(trainer.memory_rows, level, clusters)

    with model_folder(out) as folder:
        write_subtree(
            folder,
            config,
            subtree,
            blocks,
            anchor_sha256=identity["anchor"],
            tree_sha256=corpus.info.tree_sha256,
            corpus_revision=corpus.revision,
            settings=identity["settings"],
        )
        _copy_routing(start, folder / "routing")


def _copy_routing(start: Start, target: Path) -> None:
    """Copy tree and encoder of the corpus."""
    target.mkdir()
    for name in start.routing.names:
        start.routing.copy(name, target)


def _blocks(
    rows: BankRows, level: int, clusters: Iterable[int], bar: tqdm[Any] | None = None
) -> Iterator[np.ndarray]:
    for values in rows.values(level, clusters):
        yield values[None]
        if bar is not None:
            bar.update()


def model_card(
    trainer: Trainer, corpus: Corpus, memory: MemoryConfig | None, result: dict[str, Any]
) -> str:
    """The README.md of a trained model: what it is, how it was trained, what it scored."""
    config = trainer.config
    head = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx"]
    about = f"Trained with mlx-hiermem, regime `{config.regime}`, {trainer.done} steps of "
    about += f"{config.sequences_per_step} sequences of {corpus.info.sequence_length} tokens."
    lines = [*head, "---", "", about, ""]
    if memory is not None:
        lines += [
            f"Memory config: ranks {list(memory.ranks)}, branching {memory.branching}; one fetched "
            f"memory has {memory.fetch_size():,} parameters, the bank {memory.bank_size():,}.",
            "",
        ]
    if result["validation"]:
        lines += ["| memory | validation loss, nats per token |", "|---|---|"]
        lines += [f"| {name} | {loss:.4f} |" for name, loss in result["validation"].items()]
        lines += [""]
    lines += ["| setting | value |", "|---|---|"]
    settings = dict(vars(config))
    if memory is None:
        settings.pop("generic_probability")
    else:
        settings["generic_probability"] = config.generic_share(memory.branching)
    lines += [f"| {name} | {value} |" for name, value in settings.items()]
    return "\n".join([*lines, ""])
