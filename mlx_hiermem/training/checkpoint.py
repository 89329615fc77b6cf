"""Checkpoints of a run: whole or not there, whenever the run is killed.

A checkpoint is a folder ``checkpoint-00000100``: weights, optimizer state, where the rows are in
their files, and ``state.json`` with the step and what the run is. It is written under another name,
synced and renamed; the one before is removed only then, and with several processes only when all of
them have written theirs, so that there is always one that all have.

Random state and data cursor need no arrays: both follow from the seed and the step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..errors import FormatError, TrainingError
from ..files import AtomicFile, sync_folder, write_safetensors
from .distributed import Processes
from .trainer import Trainer

_NAME = re.compile(r"checkpoint-(\d{8,})")
_ANCHOR, _OPTIMIZER, _ROWS = "anchor.safetensors", "optimizer.safetensors", "rows.safetensors"
_STATE = "state.json"


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
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

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
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            self._write(trainer, part)
            os.rename(part, target)
            sync_folder(self.folder)
        except (OSError, FormatError) as error:
            shutil.rmtree(part, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            last = self.steps()
            kept = f"the checkpoint of step {last[-1]} is whole" if last else "there is none yet"
            raise TrainingError(
                f"{target}: the checkpoint cannot be written ({reason}); {kept}: free some space "
                "and run the same command with --resume"
            ) from None
        self.processes.wait()  # until all have theirs, the one before may still be needed
        if trainer.rows is not None:
            trainer.rows.committed()
        for old in self.steps():
            if old != step:
                shutil.rmtree(self.folder / f"checkpoint-{old:08}")

    def resume(self, trainer: Trainer) -> int:
        """Go back to the last checkpoint that all processes have; returns its step.

        Raises:
            TrainingError: there is none, or it is of another run.
            FormatError: it is damaged.
        """
        steps = self.steps()
        step = min(self.processes.all(steps[-1] if steps else -1))
        if step not in steps:
            raise TrainingError(
                f"{self.folder}: no checkpoint that every process has; start without --resume"
            )
        folder = self.folder / f"checkpoint-{step:08}"
        path = folder / _STATE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            stored = state["identity"]
            if state["step"] != step:
                raise ValueError(f"step is {state['step']}, its name says {step}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{path}: damaged ({error}); restore it from a copy, or start again"
            ) from None
        difference = _difference(stored, self.identity)
        if difference is not None:
            name, then, now = difference
            raise TrainingError(
                f"{folder}: this run was started with {name} {_short(then)}, now it is "
                f"{_short(now)}; resume it as it was, or start another run in another folder"
            )
        self._read(trainer, folder)
        trainer.done = step
        for newer in steps:
            if newer != step:
                shutil.rmtree(self.folder / f"checkpoint-{newer:08}")
        return step

    def _write(self, trainer: Trainer, folder: Path) -> None:
        if trainer.weights:
            write_safetensors(folder / _ANCHOR, _arrays(trainer.weights))
            state = {k: v for k, v in trainer.optimizer.state.items() if k != "learning_rate"}
            write_safetensors(folder / _OPTIMIZER, _arrays(state))
        if trainer.rows is not None:
            write_safetensors(folder / _ROWS, trainer.rows.flush())
        text = json.dumps({"step": trainer.done, "identity": self.identity}, indent=2)
        with AtomicFile(folder, _STATE) as file:
            file.write(f"{text}\n".encode())

    def _read(self, trainer: Trainer, folder: Path) -> None:
        if trainer.weights:
            weights = _load(folder / _ANCHOR)
            _check(folder / _ANCHOR, weights, _arrays(trainer.weights))
            trainer.weights = tree_unflatten([(k, mx.array(v)) for k, v in weights.items()])
            state = [(k, mx.array(v)) for k, v in _load(folder / _OPTIMIZER).items()]
            trainer.optimizer.state = tree_unflatten(state)
            trainer.optimizer.learning_rate = trainer.config.learning_rate
            mx.eval(trainer.weights, trainer.optimizer.state)
        if trainer.rows is not None:
            trainer.rows.restore(_load(folder / _ROWS))


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(array, copy=False) for name, array in tree_flatten(tree)}


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FormatError(
            f"{path}: damaged ({reason}); restore it from a copy, or start again"
        ) from None


def _check(path: Path, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name in sorted({*found, *expected}):
        shapes = [arrays[name].shape if name in arrays else None for arrays in (found, expected)]
        if shapes[0] != shapes[1]:
            raise FormatError(
                f"{path}: {name} is {shapes[0]}, the model has {shapes[1]}; resume with the model "
                "that the run was started with"
            )


def _difference(then: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ: its name and both values."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(key for key in now if key not in then)]:
            inner = f"{name}.{key}" if name else key
            found = _difference(then.get(key), now.get(key), inner)
            if found is not None:
                return found
        return None
    return None if then == now else (name, then, now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
