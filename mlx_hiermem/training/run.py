"""A run: steps, validation, checkpoints, and what people see of them, until it ends or is stopped.

Ctrl-C, or a ``kill``, lets the step end, writes a checkpoint and leaves; a second one leaves at
once. A checkpoint is written when the step after it has turned out to have a loss: so there is
always one that training can go on from, also after a loss that is no number.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from ..corpus.packed import PackedCorpus
from ..errors import HierMemError
from .checkpoint import Checkpoints
from .config import Cadence
from .curves import Curves
from .trainer import LossError, Trainer
from .validation import validate


def run(
    trainer: Trainer,
    folder: Path,
    checkpoints: Checkpoints,
    validation: PackedCorpus | None,
    cadence: Cadence,
) -> dict[str, Any]:
    """Train to the last step, from wherever ``trainer`` is.

    Args:
        folder: where ``log.jsonl`` and ``curves.png`` are written.
        validation: held-out sequences; None: no validation.

    Returns:
        ``{"step", "stopped", "loss", "validation"}``: steps done, whether a signal stopped it
        before its end, the mean loss of the last tenth of the steps done now, and the last
        validation.

    Raises:
        HierMemError: the loss is no number, a checkpoint cannot be written, or whatever else: the
            last checkpoint is whole, and the text says how to go on from it.
    """
    try:
        return _run(trainer, folder, checkpoints, validation, cadence)
    except LossError as error:
        how = "the lower value, --resume and --accept-changes"
        raise with_advice(error, checkpoints, how) from None
    except HierMemError as error:
        raise with_advice(error, checkpoints) from None


def with_advice(
    error: HierMemError, checkpoints: Checkpoints, how: str = "--resume"
) -> HierMemError:
    """The same error, saying how to go on: with the same command and ``how``."""
    steps = checkpoints.steps()
    advice = "there is no checkpoint yet: start again"
    if steps:
        advice = f"the checkpoint of step {steps[-1]} is whole: go on from it with the same command"
        advice += f" and {how}"
    return type(error)(f"{error}; {advice}")


def _run(
    trainer: Trainer,
    folder: Path,
    checkpoints: Checkpoints,
    validation: PackedCorpus | None,
    cadence: Cadence,
) -> dict[str, Any]:
    config, shown = trainer.config, trainer.processes.rank == 0
    if validation is None or not len(validation):
        cadence = replace(cadence, val_batches=0)
    losses: list[float] = []
    last: dict[str, float] | None = None
    resumed_at = trainer.done if checkpoints.steps() else None
    with _signals() as stop, Curves(folder) if shown else _Silent() as curves:
        curves.rewind(-1 if resumed_at is None else resumed_at)

        def save() -> None:
            checkpoints.save(trainer)
            curves.plot()

        with tqdm(
            total=config.iters,
            initial=trainer.done,
            desc=config.regime,
            unit="step",
            disable=None if shown else True,
        ) as bar:
            while True:
                at_end = trainer.done == config.iters
                due = at_end or trainer.done % cadence.steps_per_eval == 0
                if validation is not None and cadence.val_batches and due:
                    last = validate(trainer, validation, cadence.val_batches)
                    _check_finite(trainer, last)
                    if trainer.done != resumed_at:  # else it is in the log already
                        curves.validation(trainer.done, last)
                    if shown:
                        _say(bar, f"step {trainer.done}: validation {_numbers(last)}")
                # All processes stop at the same step: a signal may reach only one of them.
                stopped = bool(max(trainer.processes.all(int(stop.asked))))
                if at_end or stopped:
                    save()
                    break
                report = trainer.step(save if trainer.done % cadence.save_every == 0 else None)
                losses.append(report.loss)
                curves.step(asdict(report))
                bar.update()
                bar.set_postfix_str(
                    f"loss {report.loss:.3f}, {report.tokens_per_second:,.0f} tokens/s",
                    refresh=False,
                )
                if shown and report.step % cadence.steps_per_report == 0:
                    recent = losses[-cadence.steps_per_report :]
                    _say(
                        bar,
                        f"step {report.step}: loss {sum(recent) / len(recent):.4f}, learning rate "
                        f"{report.learning_rate:.3g}, gradient norm {report.gradient_norm:.3g}, "
                        f"{report.tokens_per_second:,.0f} tokens/s",
                    )
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "step": trainer.done,
        "stopped": stopped and trainer.done < config.iters,
        "loss": sum(tail) / len(tail) if tail else None,
        "validation": last,
    }


def _check_finite(trainer: Trainer, losses: dict[str, float]) -> None:
    for name, loss in losses.items():
        if not math.isfinite(loss):
            with trainer.processes.together():
                raise LossError(
                    f"step {trainer.done}: the validation loss with memory {name} is {loss}: lower "
                    f"learning_rate ({trainer.config.learning_rate:g}) or clip "
                    f"({trainer.config.clip:g})"
                )


def _numbers(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def _say(bar: tqdm[Any], line: str) -> None:
    """A line on stderr that does not break the progress bar."""
    bar.write(line, file=sys.stderr)


class _Silent:
    """The curves of the processes that do not write them."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def step(self, values: dict[str, Any]) -> None:
        pass

    def validation(self, step: int, losses: dict[str, float]) -> None:
        pass

    def plot(self) -> None:
        pass


class _Stop:
    asked = False


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Note SIGINT and SIGTERM instead of dying of them; the second one kills."""
    stop = _Stop()
    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def note(number: int, _: object) -> None:
        stop.asked = True
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:  # not the main thread: signals are another's business
        pass
    try:
        yield stop
    finally:
        for noted, handler in before.items():
            try:
                signal.signal(noted, handler)
            except ValueError:
                break
