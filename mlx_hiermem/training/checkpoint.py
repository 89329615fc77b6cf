"""Checkpoints of a run: whole or not there, whenever the run is killed.

A checkpoint is a folder ``checkpoint-00000100``: weights, optimizer state, where the rows are in
their files, and ``state.json`` with the step and what the run is. It is written under another name,
synced and renamed; the one before is removed only then, and with several processes only when all of
them have written theirs, so that there is always one that all have. What is removed is renamed
first: a folder of such a name is whole.

Random state and data cursor need no arrays: both follow from the seed and the step.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..corpus.folder import file_sha256
from ..errors import FormatError, HierMemError, TrainingError
from ..files import AtomicFile, sync_folder, write_safetensors
from .distributed import Processes
from .trainer import Trainer

_NAME = re.compile(r"checkpoint-(\d{8,})")
_ANCHOR, _OPTIMIZER, _ROWS = "anchor.safetensors", "optimizer.safetensors", "rows.safetensors"
_STATE = "state.json"

#: Settings that a run may go on with otherwise than it was started, if that is asked for: no array
#: has another shape for it, and each step still sees its own sequences.
CHANGEABLE = (
    "learning_rate", "final_learning_rate", "warmup_steps", "weight_decay", "clip", "anchor_share",
    "iters",
)  # fmt: skip


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder`` that are whole, ascending."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def holds_run(state: Path) -> bool:
    """Whether there is a checkpoint of any process below ``state``: a run that can go on."""
    return state.is_dir() and any(whole_steps(folder) for folder in state.iterdir())


@contextmanager
def state_folder(folder: Path) -> Iterator[Path]:
    """The folder of one process's checkpoints and rows, this process's alone while it is open.

    What a process that was killed before its first checkpoint has left there is removed; so is all
    of it on leaving without a checkpoint.

    Raises:
        TrainingError: it cannot be made, or another process is using it.
    """
    made = [parent for parent in (folder.parent, folder.parent.parent) if not parent.exists()]
    lock = -1
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not whole_steps(folder):
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except BlockingIOError:
            raise TrainingError(
                f"{folder}: another process is training this run now; wait for it, or give --run "
                "another folder"
            ) from None
        except OSError as error:
            raise TrainingError(
                f"{folder}: cannot be written ({error.strerror}); check whose folder it is and "
                "free space, or give --run another one"
            ) from None
        try:
            yield folder
        finally:
            if not whole_steps(folder):
                shutil.rmtree(folder, ignore_errors=True)
                for parent in made:
                    _remove_if_empty(parent)
    finally:
        if lock >= 0:
            os.close(lock)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass  # it holds something, or is gone


class Checkpoints:
    """The checkpoints of one process of a run.

    Args:
        folder: the process's own folder.
        identity: what the run is (settings, corpus, anchor, ...), as JSON: a run resumes only as
            what it was.
        processes: of the run.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], processes: Processes) -> None:
        self.folder = folder
        # As it comes back from JSON, so that the two can be compared.
        self.identity = json.loads(json.dumps(identity))
        self.processes = processes

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, ascending."""
        return whole_steps(self.folder)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of where ``trainer`` is, and remove the one before.

        Raises:
            TrainingError: it cannot be written; the one before is still there.
        """
        step = trainer.done
        if step in self.steps():
            return
        target = self.folder / f"checkpoint-{step:08}"
        part = self.folder / f".{target.name}.partial"
        with self.processes.together():  # until all have theirs, the one before may be needed
            try:
                self._clean()
                part.mkdir(parents=True)
                self._write(trainer, part)
                os.rename(part, target)
                sync_folder(self.folder)
            except (OSError, HierMemError) as error:
                shutil.rmtree(part, ignore_errors=True)
                reason = getattr(error, "strerror", None) or error
                raise TrainingError(
                    f"{target}: the checkpoint cannot be written ({reason}); check the folder and "
                    "free space"
                ) from None
        if trainer.rows is not None:
            trainer.rows.committed()
        self._clean(old for old in self.steps() if old != step)

    def resume(self, trainer: Trainer, accept_changes: bool = False) -> dict[str, tuple[Any, Any]]:
        """Go back to the last checkpoint that all processes have.

        Args:
            accept_changes: go on although settings of ``CHANGEABLE`` are not what they were.

        Returns:
            The settings that were changed: what they were, and what they are.

        Raises:
            TrainingError: there is none, or it is of another run.
            FormatError: it is damaged.
        """
        steps = self.steps()
        lasts = self.processes.all(steps[-1] if steps else -1)
        with self.processes.together():
            return self._resume(trainer, steps, lasts, accept_changes)

    def _resume(
        self, trainer: Trainer, steps: list[int], lasts: list[int], accept_changes: bool
    ) -> dict[str, tuple[Any, Any]]:
        step = min(lasts)
        if max(lasts) <= 0 and step < 0:  # killed while the first one was written: nothing is lost
            self._clean(steps)
            return {}
        if step not in steps:
            raise TrainingError(
                f"{self.folder}: no checkpoint that all {len(lasts)} processes have; resume with "
                "as many as the run was started with, in the same order"
            )
        folder = self.folder / f"checkpoint-{step:08}"
        path = folder / _STATE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            stored, files = state["identity"], dict(state["files"])
            if state["step"] != step:
                raise ValueError(f"step is {state['step']}, its name says {step}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from None
        changed = {}
        for place, then, now in _differences(stored, self.identity):
            name = place.removeprefix("settings.")
            changeable = name != place and name in CHANGEABLE
            if not changeable or not accept_changes:
                advice = ", or add --accept-changes" if changeable else ""
                raise TrainingError(
                    f"{folder}: this run was started with {name} {_short(then)}, now it is "
                    f"{_short(now)}; resume it as it was{advice}, or start another run in another "
                    "folder"
                )
            changed[name] = (then, now)
        if step > trainer.config.iters:
            raise TrainingError(
                f"{folder}: iters is {trainer.config.iters}, but {step} steps are done; give more"
            )
        self._read(trainer, folder, files)
        trainer.done = step
        self._clean(newer for newer in steps if newer != step)
        return changed

    def _clean(self, superseded: Iterable[int] = ()) -> None:
        """Remove checkpoints, and whatever was left half-written or half-removed."""
        try:
            for step in superseded:
                name = f"checkpoint-{step:08}"
                os.rename(self.folder / name, self.folder / f".{name}.old")
            for pattern in (".checkpoint-*.partial", ".checkpoint-*.old"):
                for path in self.folder.glob(pattern):
                    shutil.rmtree(path)
        except OSError as error:
            raise TrainingError(
                f"{self.folder}: an old checkpoint cannot be removed ({error.strerror}); check "
                "whose folder it is"
            ) from None

    def _write(self, trainer: Trainer, folder: Path) -> None:
        files = {}
        if trainer.weights:
            state = {k: v for k, v in trainer.optimizer.state.items() if k != "learning_rate"}
            files[_ANCHOR] = write_safetensors(folder / _ANCHOR, _arrays(trainer.weights))
            files[_OPTIMIZER] = write_safetensors(folder / _OPTIMIZER, _arrays(state))
        if trainer.rows is not None:
            files[_ROWS] = write_safetensors(folder / _ROWS, trainer.rows.flush())
        state = {"step": trainer.done, "identity": self.identity, "files": files}
        with AtomicFile(folder, _STATE) as file:
            file.write(f"{json.dumps(state, indent=2)}\n".encode())

    def _read(self, trainer: Trainer, folder: Path, sha256: Mapping[str, str]) -> None:
        if trainer.weights:
            trainer.weights = _filled(trainer.weights, folder / _ANCHOR, sha256)
            state = {k: v for k, v in trainer.optimizer.state.items() if k != "learning_rate"}
            trainer.optimizer.state = _filled(state, folder / _OPTIMIZER, sha256)
            trainer.optimizer.learning_rate = trainer.config.learning_rate
            mx.eval(trainer.weights, trainer.optimizer.state)
        if trainer.rows is not None:
            trainer.rows.restore(_load(folder / _ROWS, sha256))


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(array, copy=False) for name, array in tree_flatten(tree)}


def _load(path: Path, sha256: Mapping[str, str]) -> dict[str, np.ndarray]:
    try:
        if file_sha256(path) != sha256.get(path.name):
            raise ValueError("its sha256 is not the one that was written")
        return load_file(path)
    except (OSError, FormatError, SafetensorError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> FormatError:
    reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
    return FormatError(
        f"{path}: damaged ({reason}); restore it from a copy, or remove "
        f"{path.parent.parent.parent} and start again"
    )


def _filled(tree: Any, path: Path, sha256: Mapping[str, str]) -> Any:
    """``tree`` with the arrays of a file in the place of its own, whatever else is in it."""
    found, expected = _load(path, sha256), _arrays(tree)
    for name in sorted({*found, *expected}):
        shapes = [arrays[name].shape if name in arrays else None for arrays in (found, expected)]
        if shapes[0] != shapes[1]:
            raise FormatError(
                f"{path}: {name} is {shapes[0]}, the model has {shapes[1]}; resume with the model "
                "that the run was started with"
            )
    return tree_map_with_path(lambda name, _: mx.array(found[name]), tree)


def _differences(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: name and both values."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(key for key in now if key not in then)]:
            yield from _differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield name, then, now


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
