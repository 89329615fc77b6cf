"""Put the results of ``train --subtree`` together: one model folder with the whole bank.

Everything is compared (``agreement.py``) before anything is written. Notable: the shards of the
deeper levels are linked, where the file system can, and copied elsewhere; every byte of them is
compared with its checksum either way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..anchors import load_anchor
from ..bank.blocked import BLOCKED
from ..bank.checksums import CHECKSUMS
from ..bank.dtypes import to_storage
from ..bank.files import find
from ..bank.header import build_header
from ..bank.layout import CONFIG, GENERIC, GENERIC_TENSOR, is_added_tree, shards
from ..bank.manifest import MANIFEST, FileEntry, write_manifest
from ..bank.reader import BlockReader
from ..bank.verify import compute_digests
from ..bank.writer import write_shard
from ..config import MemoryConfig
from ..errors import TrainingError
from ..files import AtomicFile
from ..folders import Originals, anchor_files, check_new, copy_file, model_folder
from ..memories import GENERIC as GENERIC_CLUSTER
from ..memories import start_block
from ..routing.names import NAMES
from .agreement import Progress, check_anchor, find_routing, fingerprint, open_results
from .subtree import SubtreeResult, read_rows


@dataclass(frozen=True)
class MergeReport:
    """What was merged.

    Attributes:
        folder: the model folder.
        revision: of its bank.
        subtrees: the folder of each subtree's result, in their order.
        files, bytes: of the bank's level files.
        linked: how many of these files share their place on the disk with the results'.
        generic: the model that the generic memory comes from; None: start values.
        routing: the folder that the tree comes from.
    """

    folder: str
    revision: str
    subtrees: list[str]
    files: int
    bytes: int
    linked: int
    generic: str | None
    routing: str


def merge(
    runs: Sequence[str | Path],
    anchor: str | Path,
    out: str | Path,
    generic: str | Path | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge one result of each level-1 subtree into a model folder that ``load`` opens.

    Args:
        runs: folders of results or of runs, in any order.
        anchor: the model folder of the frozen anchor.
        out: the model folder to write; it appears whole or not at all.
        generic: the run or model folder with the generic memory; without one it has its start
            values, which have no effect.
        progress: see ``Progress``.

    Raises:
        TrainingError: the results do not belong together, or not to the anchor.
        FormatError: a file is missing or damaged, or cannot be written.
        InputError: ``out`` exists.
    """
    anchor, out = Path(anchor), Path(out).expanduser()
    check_new(out)
    results = open_results(runs)
    config = results[0].config
    files = Originals(anchor, anchor_files(anchor))
    check_anchor(anchor, results[0], progress)
    routing = find_routing(results, anchor)
    routes = Originals(routing, _routing_files(routing))
    numbers = _generic(results[0], generic, progress)
    total = files.bytes + sum(entry.bytes for result in results for entry in result.files.values())

    def read(count: int) -> None:
        if progress is not None:
            progress("merge", count, total)

    with model_folder(out) as folder:
        for name in files.names:
            files.copy(name, folder, read)
        _write_card(folder, results[0], generic)
        memory = folder / "memory"
        memory.mkdir()
        known: dict[str, FileEntry] = {}
        for name in routes.names:
            find(routing, name)
            file = routes.copy(name, memory)
            known[name] = FileEntry(file.size, file.sha256)
        known |= _write_first_level(memory, results, read)
        linked = 0
        for result in results:
            for level in config.memory_levels:
                for part in result.files_of(level) if level > 1 else ():
                    linked += _bring(result, part.name, memory, read)
                    known[part.name] = result.files[part.name]
        levels = [entry for name, entry in known.items() if name.startswith("level-")]
        header = build_header(GENERIC_TENSOR, config.dtype, numbers.shape, {"format": "mlx"})
        text = (json.dumps(config.to_dict(), indent=2) + "\n").encode()
        for name, data in ((GENERIC, header + numbers.tobytes()), (CONFIG, text)):
            with AtomicFile(memory, name) as file:
                file.write(data)
            known[name] = FileEntry(file.size, file.sha256)
        write_manifest(memory, known)
        reader = BlockReader(memory)
        try:
            known[CHECKSUMS] = compute_digests(reader).write(memory)
        finally:
            reader.close()
        revision = write_manifest(memory, known).revision
    return MergeReport(
        folder=str(out),
        revision=revision,
        subtrees=[str(result.folder) for result in results],
        files=len(levels),
        bytes=sum(entry.bytes for entry in levels),
        linked=linked,
        generic=None if generic is None else str(generic),
        routing=str(routing),
    )


# ---- the parts of the bank -------------------------------------------------------------


def _generic(
    result: SubtreeResult, source: str | Path | None, progress: Progress | None
) -> np.ndarray:
    """The generic memory (fetch_size,) in the storage dtype: of a model, or start values."""
    config = result.config
    levels = config.memory_levels
    if source is None:
        seed = result.settings.get("seed", 0)
        blocks = [start_block(config, level, GENERIC_CLUSTER, seed) for level in levels]
        return to_storage(np.concatenate(blocks), config.dtype)
    folder = Path(source).expanduser()
    folder = folder / "model" if (folder / "model" / "memory").is_dir() else folder
    model, _ = load_anchor(folder)
    if fingerprint(model, progress) != result.anchor_sha256:
        raise TrainingError(
            f"{folder}: its generic memory was trained on another anchor than {result.folder}; "
            "train it on the same anchor (regime frozen), or leave --generic out"
        )
    reader = BlockReader(folder / "memory")
    try:
        # Of the tree it knows nothing; everything else decides what its numbers mean.
        for name in ("kind", "ranks", "layers"):
            theirs, ours = (_meaning(one, name) for one in (reader.config, config))
            if theirs != ours:
                raise TrainingError(
                    f"{folder}: {name} of its memory config is {theirs}, that of the runs {ours}; "
                    "give a generic memory of the same"
                )
        blocks = [reader.block(level, None) for level in levels]
    finally:
        reader.close()
    return to_storage(np.concatenate(blocks), config.dtype)


def _meaning(config: MemoryConfig, name: str) -> Any:
    return config.memory_layers() if name == "layers" else getattr(config, name)


def _write_first_level(
    memory: Path, results: Sequence[SubtreeResult], read: Callable[[int], None]
) -> dict[str, FileEntry]:
    """Level 1, whose rows are one from each result, as one stream."""
    config = results[0].config

    def rows() -> Iterator[np.ndarray]:
        for result in results:
            for part in result.files_of(1):
                result.verify(part.name, read)
                yield read_rows(result, part)

    stream = rows()
    return {
        part.name: write_shard(memory, config, part, islice(stream, part.rows))
        for part in shards(config, 1)
    }


def _bring(result: SubtreeResult, name: str, memory: Path, read: Callable[[int], None]) -> bool:
    """Put a file of a result into the bank, verified; returns whether it is a link."""
    source = find(result.folder, name)
    try:
        os.link(source, memory / name)
    except OSError:  # another file system, or one without links
        file = copy_file(source, memory, name, read)
        result.check(name, FileEntry(file.size, file.sha256))
        return False
    result.verify(name, read)
    return True


def _routing_files(folder: Path) -> list[str]:
    """The files of a folder that route: all but hidden ones and those of a bank."""
    names = [
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()
    ]
    bank = {CONFIG, GENERIC, MANIFEST, CHECKSUMS, BLOCKED}
    if any(map(is_added_tree, names)):
        bank.add(NAMES)  # some are of added memories
    return [
        name
        for name in names
        if name not in bank
        and not name.startswith("level-")
        and not is_added_tree(name)
        and not any(part.startswith(".") for part in name.split("/"))
    ]


def _write_card(folder: Path, result: SubtreeResult, generic: str | Path | None) -> None:
    config = result.config
    lines = [
        "---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx", "---", "",
        f"An anchor with a memory bank, trained as {config.branching} independent subtrees on the "
        "frozen anchor and merged with mlx-hiermem.",
        "",
        f"Memory config: ranks {list(config.ranks)}, branching {config.branching}; one fetched "
        f"memory has {config.fetch_size():,} parameters, the bank {config.bank_size():,}. The "
        f"generic memory {'has its start values' if generic is None else 'was trained too'}.",
        "",
        "| setting | value |", "|---|---|",
        *(f"| {name} | {value} |" for name, value in result.settings.items()),
        "",
    ]  # fmt: skip
    with AtomicFile(folder, "README.md") as file:
        file.write("\n".join(lines).encode())
