"""Training studies: runs side by side, one processor each, whose results are kept.

Several runs of one label differ in their seed. What they share (anchors, trees, corpora) is made
first. With ``--work FOLDER`` parts and results stay there, and another study finds them.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlx_hiermem.errors import InputError
from mlx_hiermem.files import AtomicFile

from ..workers import processes
from . import report
from .report import Line
from .task import Result, Task

#: Optimizer steps of a run, and its peak learning rate (the atlas's own is 1e-2).
STEPS, RATE = 400, 1e-2
#: Runs of one label, and questions that each is asked.
SEEDS, QUESTIONS = 3, 1000
#: Of ``--smoke``.
SMOKE_STEPS, SMOKE_QUESTIONS = 2, 24


def options(parser: argparse.ArgumentParser) -> None:
    """The options of a training study."""
    parser.add_argument("--steps", type=int, metavar="N", help=f"of each run (default: {STEPS})")
    parser.add_argument(
        "--rate", type=float, metavar="X",
        help=f"peak learning rate of each run (default: {RATE:g}, or what the study says)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, metavar="N",
        help=f"ask only N questions, evenly drawn (default: {QUESTIONS})",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first of the seeds")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help=f"runs of each line (default: {SEEDS})"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs side by side (default: one for each processor; 1 if --smoke)",
    )
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep parts and results here, and use them"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figure here")


def tasks_of(args: argparse.Namespace, lines: Sequence[Task]) -> list[Task]:
    """The runs of a study: each line with each seed, and with what the options say.

    Args:
        lines: with the study's own ``steps`` and ``rate``, which the options override. A smoke run
            takes two steps, and one seed.

    Raises:
        InputError: an option is out of range.
    """
    for name in ("steps", "limit", "jobs", "seeds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; expected at least 1")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}; expected 0 or more")
    if args.rate is not None and not 0 < args.rate < math.inf:
        raise InputError(f"--rate is {args.rate}; expected more than 0")
    seeds = args.seeds or (1 if args.smoke else SEEDS)
    questions = args.limit or (SMOKE_QUESTIONS if args.smoke else QUESTIONS)
    found = []
    for line in lines:
        anchor, steps, every = line.anchor, args.steps or line.steps, line.every
        if args.smoke:
            steps = args.steps or SMOKE_STEPS
            every = min(every, 1)
            if anchor is not None and anchor.steps:
                anchor = replace(anchor, steps=SMOKE_STEPS)
        for seed in range(args.seed, args.seed + seeds):
            found.append(
                replace(
                    line, steps=steps, rate=args.rate or line.rate, seed=seed, anchor=anchor,
                    every=every, questions=questions,
                )
            )  # fmt: skip
    return found


def study(args: argparse.Namespace, lines: Sequence[Task]) -> list[Line]:
    """Do the runs of a study; see :func:`tasks_of`."""
    # To start another process takes longer than the runs of a smoke run.
    jobs = args.jobs or (1 if args.smoke else None)
    return report.lines(run_all(tasks_of(args, lines), jobs, args.work))


def run_all(tasks: Sequence[Task], jobs: int | None, work: Path | None) -> list[Result]:
    """Do all tasks, some at a time.

    Args:
        jobs: at a time; None: as many as there are processors.
        work: where parts and results are kept, and looked for first; None: nowhere.

    Returns:
        The results, in the order of the tasks.

    Raises:
        InputError: the folder cannot be written.
    """
    if work is None:
        with tempfile.TemporaryDirectory(prefix="study-") as folder:
            return _run_all(tasks, jobs, Path(folder))
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--work {work}: cannot be written ({error.strerror})") from None
    return _run_all(tasks, jobs, work)


def _run_all(tasks: Sequence[Task], jobs: int | None, work: Path) -> list[Result]:
    found: dict[str, Result] = {}
    for task in tasks:
        path = work / f"result-{task.key()}.json"
        if path.exists():
            # The label is the study's own.
            found[task.key()] = replace(Result.of(path.read_text()), task=task)
    missing = {task.key(): task for task in tasks if task.key() not in found}
    if missing:
        (work / "partial").mkdir(exist_ok=True)
        jobs = min(jobs or os.cpu_count() or 1, max(len(missing), 1))
        try:
            counter = multiprocessing.get_context("spawn").Value("q", 0)
            with processes(jobs, _begin, counter) as pool:
                calls = _shared(list(missing.values()), work)
                steps = sum(count for _, _, count in calls)
                steps += sum(_steps(task) for task in missing.values())
                with _bar(steps, counter):
                    _wait([pool.submit(_call, name, args) for name, args, _ in calls])
                    futures = {
                        pool.submit(_call, "run", (str(work), asdict(task))): key
                        for key, task in missing.items()
                    }
                    for future in as_completed(futures):
                        text = future.result()
                        key = futures[future]
                        with AtomicFile(work, f"result-{key}.json") as file:
                            file.write(text.encode())
                        found[key] = Result.of(text)
        finally:
            shutil.rmtree(work / "partial", ignore_errors=True)
    return [replace(found[task.key()], task=task) for task in tasks]


def _shared(tasks: Sequence[Task], work: Path) -> list[tuple[str, tuple[Any, ...], int]]:
    """Calls that make what several tasks want, and their steps."""
    calls: dict[tuple[Any, ...], tuple[str, tuple[Any, ...], int]] = {}
    for task in tasks:
        # The corpus of the own tree too is packed by one process alone.
        names = ("branching", "levels", "encoder", "views")
        way = {name: getattr(task, name) for name in names}
        calls[("route", *way.values())] = ("route", (str(work), way), 1)
        if task.anchor is not None and task.anchor.steps:
            fields = asdict(task.anchor)
            key = ("anchor", *fields.values(), task.seed)
            calls[key] = ("make_anchor", (str(work), fields, task.seed), task.anchor.steps)
    return list(calls.values())


def _steps(task: Task) -> int:
    return task.steps * (2 if task.generic else 1)


def _wait(futures: Sequence[Any]) -> None:
    for future in futures:
        future.result()


# ---- processes -------------------------------------------------------------------------

#: In a worker: the steps done by all, which the parent's bar shows.
_counter: Any = None


def _begin(counter: Any) -> None:
    global _counter  # of this process, which does nothing else
    _counter = counter


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    from . import worker

    def note() -> None:
        with _counter.get_lock():
            _counter.value += 1

    function: Callable[..., Any] = getattr(worker, name)
    return function(*arguments, note)


@contextmanager
def _bar(steps: int, counter: Any) -> Iterator[None]:
    """A bar over the steps of all processes."""
    from tqdm import tqdm

    over = threading.Event()
    # disable=None: no bar where stderr is no terminal.
    with tqdm(total=steps, unit="step", disable=None, smoothing=0) as bar:

        def follow() -> None:
            while not over.wait(0.5):
                bar.update(counter.value - bar.n)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            bar.update(counter.value - bar.n)
