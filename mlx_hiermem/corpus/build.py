"""A corpus from documents: plan, embed, grow the tree, assign, split, pack, sum up.

Each stage leaves its result in the work folder, so that the same call goes on where a run was
stopped, at whatever moment, and comes to the same bytes. ``corpus.json`` is written last.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import FormatError, InputError
from ..routing.names import NAMES
from ..routing.tree import ClusterTree
from .config import CorpusConfig
from .embedding import EmbedTask, UnitEmbedder
from .encoders import TREE
from .folder import file_sha256
from .info import CorpusInfo, SplitInfo
from .naming import name_clusters
from .placing import Placements, place
from .plan import Plan, begin, check_folder, find, only_one
from .runners import LocalRunner, Runner
from .sources import Unit
from .summary import summarize
from .trees import UnitAssigner, grow_tree, has_names, load_tree, remove_work
from .workfolder import UnitRecord, WorkFolder, write_json
from .writer import write_split

SUMMARY = "summary.json"

#: Bytes of a unit of .txt and .jsonl.
UNIT_BYTES = 8 << 20

_FULL = (errno.ENOSPC, errno.EDQUOT)


def build_corpus(
    out: str | Path,
    config: CorpusConfig,
    runner: Runner | None = None,
    *,
    unit_bytes: int = UNIT_BYTES,
    keep_work: bool = False,
    names: bool = True,
) -> dict[str, Any]:
    """Make a corpus folder, or go on with one that a run before did not finish.

    Args:
        out: the corpus folder.
        config: what it is made of.
        runner: who embeds and assigns; this process by default. It makes no difference to the
            result.
        unit_bytes: bytes of a unit of .txt and .jsonl.
        keep_work: leave ``work/`` in the folder.
        names: name the clusters (``routing/names.py``); a tree that is given keeps the names that
            lie beside it.

    Returns:
        The summary, which is in ``summary.json`` too.

    Raises:
        InputError: the documents cannot be used, there are too few for the tree, the folder is a
            corpus already or was begun with other settings; what is done so far stays.
        ConfigError, FormatError: tokenizer, encoder or tree are missing, damaged or do not fit; or
            a file cannot be written.
    """
    out, runner = Path(out), runner or LocalRunner()
    try:
        units, files = find(config, unit_bytes)
        check_folder(out)
        with only_one(out):
            plan = begin(out, config, units, files, unit_bytes)
            return _build(out, config, plan, runner, keep_work, names)
    except OSError as error:
        advice = "free some space, then run the same command again" * (error.errno in _FULL)
        place, reason = error.filename or out, error.strerror or error
        raise FormatError(
            f"{place}: cannot be read or written ({reason}); {advice or 'check the folder'}"
        ) from None
    finally:
        runner.close()


def _build(
    out: Path, config: CorpusConfig, plan: Plan, runner: Runner, keep_work: bool, names: bool
) -> dict[str, Any]:
    work = WorkFolder(out)
    shutil.rmtree(work.attempts, ignore_errors=True)  # of a run that was killed
    task = EmbedTask(
        out.resolve(),
        config.text_field,
        config.views,
        config.window,
        plan.tokenizer["end_of_text"],
        plan.chosen.config,
        config.tree is not None,
    )
    _map(runner, partial(UnitEmbedder, task), plan.units, "embedding", "B")
    records = [_done(work, unit) for unit in plan.units]
    if not any(record.windows for record in records):
        empty = sum(record.empty for record in records)
        raise InputError(
            f"the corpus holds no token: {empty} documents, all of them empty; check --text-field"
        )
    if config.tree is None:
        with _levels_bar() as progress:
            grow_tree(work, records, config, plan.chosen, progress)
        _map(runner, partial(UnitAssigner, out.resolve()), records, "assigning", " vectors")
    with _bar("placing", sum(record.rows for record in records), " vectors") as bar:
        placements = place(work, records, config, bar.update)
    splits = _write_splits(out, config, plan, placements)
    tree = load_tree(work.routing)
    _names(work, config, plan, placements, tree, names)
    summary = summarize(work, records, placements, splits, tree.branching, tree.levels, config.seed)
    info = CorpusInfo(
        tokenizer=plan.tokenizer,
        sequence_length=config.sequence_length,
        window=config.window,
        seed=config.seed,
        views=config.views,
        branching=tree.branching,
        levels=tree.levels,
        encoder=plan.chosen.config,
        tree_sha256=file_sha256(work.routing / TREE),
        source=_source(config, plan, work, records),
        splits=splits,
        embedding_sha256=plan.chosen.embedding_sha256,
    )
    summary = {"revision": info.revision, **summary}
    write_json(out / SUMMARY, summary)
    info.save(out)
    if not keep_work:
        remove_work(work)
    return summary


# ---- stages ----------------------------------------------------------------------------


def _done(work: WorkFolder, unit: Unit) -> UnitRecord:
    record = work.record(unit.name)
    if record is None:
        raise FormatError(
            f"{work.parts / unit.name}.json: a worker has written it elsewhere; the folder has to "
            "be on storage that all machines share"
        )
    return record


def _map(
    runner: Runner, factory: Callable[[], Any], items: Sequence[Any], what: str, unit: str
) -> None:
    """Have the items done under a progress bar over their sizes."""
    with _bar(what, sum(item.size for item in items), unit) as bar:
        finished, under_way = 0, {}

        def report(item: Any, done: float) -> None:
            nonlocal finished
            if done < 1:
                under_way[id(item)] = item.size * done
            else:
                under_way.pop(id(item), None)
                finished += item.size
            bar.update(finished + int(sum(under_way.values())) - bar.n)

        runner.run(factory, items, report)


def _bar(what: str, total: int, unit: str) -> tqdm[Any]:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=None)


@contextmanager
def _levels_bar() -> Iterator[Callable[[int, int, int], None]]:
    """A bar for growing: one reading per level."""
    with tqdm(desc="growing the tree", unit=" steps", disable=None) as bar:

        def progress(level: int, done: int, total: int) -> None:
            bar.set_description(f"growing level {level}", refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        yield progress


def _write_splits(
    out: Path, config: CorpusConfig, plan: Plan, placements: Placements
) -> dict[str, SplitInfo]:
    """Pack both splits; an empty one for validation is left out."""
    splits = {}
    for name in ("train", "validation"):
        placed = getattr(placements, name)
        if not any(len(entry.windows) for entry in placed):
            if name == "train":
                raise InputError(
                    f"--validation {config.validation}: leaves no document to train on; give less"
                )
            shutil.rmtree(out / name, ignore_errors=True)
            continue
        with tqdm(desc=f"packing {name}", disable=None) as bar:

            def progress(
                what: str, done: int, total: int, bar: tqdm[Any] = bar, name: str = name
            ) -> None:
                bar.set_description(f"{what} {name}", refresh=False)
                bar.total, bar.n = total, done
                bar.refresh()

            splits[name] = write_split(
                out / name,
                placed,
                length=config.sequence_length,
                end_of_text=plan.tokenizer["end_of_text"],
                vocab_size=plan.tokenizer["vocab_size"],
                seed=config.seed,
                progress=progress,
            )
    return splits


def _names(
    work: WorkFolder,
    config: CorpusConfig,
    plan: Plan,
    placements: Placements,
    tree: ClusterTree,
    wanted: bool,
) -> None:
    """Name the clusters, unless the names came with the tree."""
    if not wanted:
        (work.routing / NAMES).unlink(missing_ok=True)
        return
    if config.tree is not None and (work.routing / NAMES).exists() and has_names(config.tree):
        return
    with tqdm(desc="naming clusters", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.update(0)

        name_clusters(
            work,
            placements.train,
            tree.branching,
            tree.levels,
            plan.tokenizer["end_of_text"],
            config.seed,
            progress,
        )


def _source(
    config: CorpusConfig, plan: Plan, work: WorkFolder, records: Sequence[UnitRecord]
) -> dict[str, Any]:
    """What was read; its fingerprint is over the texts of all documents in their order."""
    digest = hashlib.sha256()
    for record in records:
        for number in range(len(record.parts)):
            digest.update(work.array(record.unit, number, "keys").astype("<u8").tobytes())
    found: dict[str, Any] = {"fingerprint": digest.hexdigest()}
    if config.dataset is not None:
        return found | {"dataset": config.dataset, **config.dataset_options}
    names = [os.path.basename(file["path"]) for file in plan.files]
    sizes = [file["bytes"] for file in plan.files]
    return found | {"files": [list(pair) for pair in zip(names, sizes, strict=True)]}
