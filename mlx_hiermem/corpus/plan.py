"""The plan of a corpus: what is read and with what; made at the first run, kept for the others.

All that workers need is prepared before the plan is written; a run that cannot begin leaves nothing
behind, and one that goes on is told where its settings or its files differ.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, InputError
from ..models import find_model
from .config import CorpusConfig
from .encoders import Chosen, choose_encoder, open_encoder
from .folder import folder_sha256
from .info import INFO
from .sources import Unit, find_dataset_units, find_files, find_units
from .trees import take_tree
from .windows import Windower, copy_tokenizer, find_end_of_text, load_tokenizer
from .workfolder import WorkFolder, read_json, write_json

#: What only the stages after embedding depend on: they may change until a tree is grown.
_LATER = ("branching", "levels", "tree_samples", "validation", "sequence_length")


LOCK = "lock"

#: What is made before there is a plan.
_PREPARED = {"work", "tokenizer", "routing"}


@dataclass(frozen=True)
class Plan:
    """What is to be read, and with what.

    Attributes:
        units: in the order of the corpus.
        tokenizer: its entry in ``corpus.json``.
        chosen: the encoder.
        files: name, bytes and time of the last change of each file; empty for a dataset.
    """

    units: list[Unit]
    tokenizer: dict[str, Any]
    chosen: Chosen
    files: list[dict[str, Any]]


def find(config: CorpusConfig, unit_bytes: int) -> tuple[list[Unit], list[dict[str, Any]]]:
    """The units of the corpus, and what tells whether a file was changed."""
    if config.dataset is not None:
        return find_dataset_units(config.dataset, config.dataset_options), []
    paths = find_files(config.data)
    units = find_units(paths, unit_bytes)
    if config.fields and any(unit.kind == "txt" for unit in units):
        raise InputError(
            f"--views field:{config.fields[0]}: documents in .txt have no fields; give .jsonl or "
            ".parquet"
        )
    stats = [path.stat() for path in paths]
    return units, [
        {"path": str(path), "bytes": stat.st_size, "changed": stat.st_mtime_ns}
        for path, stat in zip(paths, stats, strict=True)
    ]


def check_folder(out: Path) -> None:
    """Raise InputError where the folder is not free for this corpus."""
    _check_unfinished(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    work = WorkFolder(out)
    # Without a plan a run was killed while it prepared, and what it made will be removed.
    ours = work.plan.exists() or ((work.folder / LOCK).exists() and names <= _PREPARED)
    if names and not ours:
        raise InputError(f"--out {out}: holds other files; name a folder that is new or empty")


def _check_unfinished(out: Path) -> None:
    if (out / INFO).exists():
        raise InputError(f"--out {out}: is a corpus already; name another folder, or remove it")


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Hold the lock of a corpus in the making.

    Raises:
        InputError: another process has it, or has finished the corpus.
    """
    folder = WorkFolder(out).folder
    made = [path for path in (out, folder) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--out {out}: another process is at work on it; wait for it, or name another "
                "folder"
            ) from None
        try:
            _check_unfinished(out)  # another process may have finished it since it was looked at
        except InputError:
            if folder in made:  # by us, for the lock alone
                (folder / LOCK).unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()
            raise
        try:
            yield
        except BaseException:
            # A corpus that is finished has no plan either, while its work is removed.
            if not WorkFolder(out).plan.exists() and not (out / INFO).exists():
                _forget(out, made)
            raise


def _forget(out: Path, made: Sequence[Path]) -> None:
    """Remove what was prepared for a corpus that could not be begun."""
    for name in _PREPARED:
        shutil.rmtree(out / name, ignore_errors=True)
    if out in made and not any(out.iterdir()):
        out.rmdir()


def begin(
    out: Path,
    config: CorpusConfig,
    units: list[Unit],
    files: list[dict[str, Any]],
    unit_bytes: int,
) -> Plan:
    """Read the plan of a run before, or make one and prepare what the workers need."""
    work = WorkFolder(out)
    settings = _settings(config, unit_bytes)
    if work.plan.exists():
        return _go_on(work, config, settings, units, files)
    for folder in (work.tokenizer, work.routing):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it prepared
    for folder in (work.parts, work.routing):
        folder.mkdir(parents=True, exist_ok=True)
    model = None if config.model is None else find_model(config.model)
    source = config.tokenizer or model
    assert source is not None, "a CorpusConfig has one of them"
    copy_tokenizer(source, work.tokenizer)
    end_of_text = find_end_of_text(source, load_tokenizer(work.tokenizer))
    windower = Windower(work.tokenizer, config.window, end_of_text)
    chosen = choose_encoder(work, config, model, units, windower)
    width = open_encoder(work, chosen.config).width
    if config.tree is not None:
        take_tree(config, work.routing, width)
    tokenizer = {
        "sha256": folder_sha256(work.tokenizer),
        "vocab_size": windower.vocab_size,
        "end_of_text": end_of_text,
    }
    plan = Plan(units, tokenizer, chosen, files)
    _write_plan(work, settings, plan)
    return plan


def _write_plan(work: WorkFolder, settings: dict[str, Any], plan: Plan) -> None:
    values = {
        "settings": settings,
        "files": plan.files,
        "units": len(plan.units),
        "tokenizer": plan.tokenizer,
        "encoder": plan.chosen.config,
        "embedding_sha256": plan.chosen.embedding_sha256,
    }
    write_json(work.plan, values)


def _settings(config: CorpusConfig, unit_bytes: int) -> dict[str, Any]:
    """What the parts depend on, as JSON has it. The data are compared file by file."""
    values = {key: value for key, value in vars(config).items() if key not in (*_LATER, "data")}
    for key, value in values.items():
        if isinstance(value, Path):
            values[key] = str(value.resolve())
        elif isinstance(value, tuple):
            values[key] = list(value)
    return values | {"unit_bytes": unit_bytes}


def _go_on(
    work: WorkFolder,
    config: CorpusConfig,
    settings: dict[str, Any],
    units: list[Unit],
    files: list[dict[str, Any]],
) -> Plan:
    """The plan of a run before, where this one is the same."""
    before = read_json(work.plan)
    try:
        tokenizer = dict(before["tokenizer"])
        chosen = Chosen(before["encoder"], before["embedding_sha256"])
        old_settings, old_files = dict(before["settings"]), list(before["files"])
        old_paths = [file["path"] for file in old_files]
        count = before["units"]
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"{work.plan}: not a plan; remove {work.folder}") from None
    another = "give the same to go on, or name another --out"
    for name, value in settings.items():
        if old_settings.get(name) != value:
            raise InputError(
                f"--out {work.out}: was begun with {name} {old_settings.get(name)}, this run says "
                f"{value}; {another}"
            )
    if old_paths != [file["path"] for file in files]:
        raise InputError(
            f"--out {work.out}: was begun with other files ({len(old_paths)}, now {len(files)}); "
            f"{another}"
        )
    if not files and count != len(units):
        raise InputError(
            f"--out {work.out}: the dataset had {count} shards, now {len(units)}; give "
            "--dataset-revision and begin anew"
        )
    plan = Plan(units, tokenizer, chosen, files)
    changed = [i for i, (old, new) in enumerate(zip(old_files, files, strict=True)) if old != new]
    if changed:
        name = files[changed[0]]["path"]
        if work.tree_settings.exists() or chosen.embedding_sha256 is not None:
            what = "tree was grown" if work.tree_settings.exists() else "encoder was fitted"
            raise InputError(
                f"{name}: was changed after the {what}; remove {work.out} and begin anew"
            )
        for file in changed:
            work.forget(file)
        _write_plan(work, settings, plan)
    return plan
