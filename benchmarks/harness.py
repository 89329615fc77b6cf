"""What the benchmarks share: taking turns, medians, memory of a fresh process, table and JSON.

Notable: what is compared takes turns, round after round, so that a machine that slows down slows
both; the value of a row is the median over the rounds of the ratio within a round. Memory is
measured in a process of its own, since a peak never goes down again.

``python -m benchmarks.harness MODULE:FUNCTION ARGUMENTS`` is that process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_hiermem.backend import backend_name
from mlx_hiermem.commands.tables import table
from mlx_hiermem.errors import HierMemError, InputError
from mlx_hiermem.files import AtomicFile

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        id: such as "train.frozen_vs_anchor".
        value: a ratio, or what ``detail`` says.
        goal: such as "<= 1.7"; "" where there is none.
        detail: what was measured, the two medians and the spread.
    """

    id: str
    value: float
    goal: str
    detail: str

    @property
    def met(self) -> bool | None:
        """Whether the value meets the goal; None without one."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


@dataclass(frozen=True)
class Times:
    """Seconds of one thing in each round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    before: Callable[[], object] | None = None,
) -> dict[str, Times]:
    """Time each task once in every round.

    Args:
        tasks: what is timed, by name; each call has to be done when it returns (``mx.eval``).
        rounds: how many; every other one runs backwards, so that none always comes first.
        warmup: calls of each before that are not timed: compiling, first allocations.
        before: called before each task, not timed.
    """
    prepare = before or (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        for _ in range(warmup):
            prepare()
            task()
    for number in range(rounds):
        names = list(tasks) if number % 2 == 0 else list(reversed(tasks))
        for name in names:
            prepare()
            started = time.perf_counter()
            tasks[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: Times(tuple(found)) for name, found in seconds.items()}


def ratio(
    id: str, times: Mapping[str, Times], over: str, under: str, goal: str, about: str = ""
) -> Row:
    """A row: time of ``over`` ÷ time of ``under``, the median over the rounds.

    Args:
        about: put before the medians in the detail.
    """
    pairs = zip(times[over].seconds, times[under].seconds, strict=True)
    ratios = sorted(a / b for a, b in pairs)
    detail = (
        f"{over} {show_seconds(times[over].median)} ÷ {under} {show_seconds(times[under].median)}; "
        f"rounds {len(ratios)}, {ratios[0]:.3f} to {ratios[-1]:.3f}"
    )
    return Row(id, statistics.median(ratios), goal, f"{about}; {detail}" if about else detail)


def show_seconds(seconds: float) -> str:
    """A time as people read it."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


# ---- memory of a fresh process ---------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a function returned in a process of its own, and the peak of that process.

    Attributes:
        result: what JSON can hold.
        peak: largest resident memory, in bytes.
    """

    result: Any
    peak: int


def in_fresh_process(function: Callable[..., Any], **arguments: Any) -> Measured:
    """Call a module's function in a new Python process, and read the peak of its memory.

    Args:
        function: at the top of a module of this folder.
        arguments: what JSON can hold.

    Raises:
        HierMemError: the process failed; its last line is told.
    """
    module = function.__module__
    if module == "__main__":  # run as ``python -m``
        module = sys.modules["__main__"].__spec__.name
    command = [sys.executable, "-m", "benchmarks.harness"]
    command += [f"{module}:{function.__qualname__}", json.dumps(arguments)]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise HierMemError(f"{command[3]} ended with {done.returncode}: {last}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    try:
        # Not getrusage, which on Linux also knows the peak of what was there before exec.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident_memory() -> int:
    """The resident memory of this process now, in bytes."""
    import psutil

    return psutil.Process().memory_info().rss


def _worker(argv: Sequence[str]) -> None:
    module, name = argv[0].split(":")
    result = getattr(import_module(module), name)(**json.loads(argv[1]))
    print("\n" + json.dumps({"result": result, "peak": peak_memory()}))


# ---- what a script prints and writes ---------------------------------------------------


def main(
    name: str,
    measure: Callable[..., Sequence[Row]],
    argv: Sequence[str] | None = None,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """The ``main`` of a script.

    Args:
        name: of the benchmark.
        measure: called with whether this is only a smoke run: small sizes and few rounds, whose
            values say nothing; returns the rows. With ``options`` it is called with all arguments.
        argv: the arguments; those of the process by default.
        options: adds arguments of the script's own.

    Returns:
        0, also where a goal is missed: the table says so; 2 where it could not be measured.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument(
        "--smoke", action="store_true", help="small and quick; only shows that it runs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file too")
    if options is not None:
        options(parser)
    try:
        args = parser.parse_args(argv)
        _check_places(args)
        rows = list(measure(args.smoke if options is None else args))
    except HierMemError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    report = {
        "benchmark": name,
        "machine": machine(),
        "commit": commit(),
        "smoke": args.smoke,
        "rows": [asdict(row) for row in rows],
    }
    met = {True: "yes", False: "no", None: ""}
    cells = [(r.id, f"{r.value:.3f}", r.goal, met[r.met], r.detail) for r in rows]
    print(table(("id", "value", "goal", "met", "detail"), cells))
    if args.smoke:
        print("smoke run: the values say nothing")
    if args.json is not None:
        with AtomicFile(args.json.parent, args.json.name) as file:
            file.write((json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    return 0


def _check_places(args: argparse.Namespace) -> None:
    """Raise InputError where a file that is asked for cannot be written, before minutes of work."""
    for name in ("json", "png"):
        path = getattr(args, name, None)
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--{name} {path}: cannot be written ({error.strerror})") from None
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InputError(f"--{name} {path}: cannot be written; name a file of yours")


def model_option(parser: argparse.ArgumentParser) -> None:
    """``--model``, of a script that asks a model's held-out questions."""
    from mlx_hiermem.commands.options import DEFAULT_MODEL

    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="PATH_OR_REPO",
        help="model with held-out questions (default: %(default)s)",
    )


def machine() -> dict[str, Any]:
    """What it ran on."""
    import mlx.core as mx

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "backend": backend_name(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this checkout, with "+" where files differ from it; "unknown" without git."""
    try:
        git = ["git", "-C", str(_ROOT)]
        found = subprocess.run(
            [*git, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


if __name__ == "__main__":
    _worker(sys.argv[1:])
