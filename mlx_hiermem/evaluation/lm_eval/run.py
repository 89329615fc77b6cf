"""Runs tasks of lm-eval with several memories, and puts what came of it in one object.

``available`` may be called where lm-eval is not installed; all else needs it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import HierMemError, InputError, one_line

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from ...engine import MemoryLM
    from .routes import Routes

#: The groups that come with this package, and SQuAD 1.1.
GROUPS = Path(__file__).parent / "groups"

#: A task's main metric is the first of these that it has; they are shares, so that a group has a
#: mean. acc_norm is the accuracy with each choice's log-probability divided by its length.
SHARES = ("acc_norm", "acc", "exact_match", "em", "contains", "f1")


@dataclass(frozen=True)
class Settings:
    """How tasks are run.

    Attributes:
        memories: of ``model.MEMORIES``, in the order of the columns.
        limit: only the first so many documents of each task.
        num_fewshot: in place of what tasks say, but for tasks that say 0 (lm-eval's own rule).
        batch_size: the most sequences at once.
        max_tokens: the longest answer, in place of what tasks say.
        seed: of the few-shot examples.
        route_on: task -> Jinja template of the text that is routed, see ``routes.Routes``.
    """

    memories: tuple[str, ...] = ("none", "generic", "fetched")
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    max_tokens: int | None = None
    seed: int = 0
    route_on: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tasks:
    """Tasks that are ready to run.

    Attributes:
        tasks: name -> lm-eval's task, its documents loaded.
        groups: name -> the tasks in it.
    """

    tasks: dict[str, Task]
    groups: dict[str, list[str]]


def available() -> None:
    """Raise InputError where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"lm-eval cannot be imported ({error}); get it with pip install 'mlx-hiermem[eval]'"
        ) from None


def load_tasks(names: Sequence[str], task_path: str | Path | None = None) -> Tasks:
    """Load tasks and groups of tasks by name, and their documents.

    A task's file is a program: it may name Python functions and holds templates that are run.

    Args:
        names: of lm-eval, of :data:`GROUPS`, or of the files below ``task_path``.
        task_path: a folder with task files, which go before lm-eval's.

    Raises:
        InputError: a name is unknown, a task's file is wrong, or its documents cannot be had.
    """
    folders = [GROUPS]
    if task_path is not None:
        if not Path(task_path).is_dir():
            raise InputError(
                f"--task-path {task_path}: no such folder; expected one with task files (.yaml)"
            )
        folders.append(Path(task_path))
    if not names:
        raise InputError("there are no tasks to run; name some, such as CK,SK")
    with redirect_stdout(sys.stderr):
        manager = _manager(names, folders)
        if unknown := [name for name in names if name not in manager.task_index]:
            near = get_close_matches(unknown[0], manager.all_tasks, 3, 0.5)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise InputError(
                f"task {unknown[0]!r} is neither lm-eval's nor in a readable file below the folder "
                f"of --task-path{hint}"
            )
        tasks: dict[str, Task] = {}
        groups: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            try:
                found = manager.load([name])
                for task in found["tasks"].values():
                    _check(task)
            except HierMemError:
                raise
            except Exception as error:  # whatever a task's file, or the source of its data, raises
                raise _failed(name, "could not be loaded", error) from error
            tasks |= found["tasks"]
            for group, members in found["groups"].items():
                groups[group] = [task.task_name for task in members.get_all_tasks()]
    return Tasks(tasks, groups)


def _manager(names: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """lm-eval's task manager; without its own tasks, which are many, where none is asked for."""
    from lm_eval.tasks import TaskManager

    try:
        manager = TaskManager(include_path=list(folders), include_defaults=False)
        if all(_whole(name, manager.task_index) for name in names):
            return manager
        return TaskManager(include_path=list(folders))
    except Exception as error:
        raise _failed(str(folders[-1]), "has a task file that cannot be read", error) from error


def _whole(name: Any, index: Mapping[str, Any]) -> bool:
    """Whether a task, or a group with all that it names, is in an index of lm-eval."""
    if name not in index:
        return False
    config = index[name].cfg or {}
    members = config.get("task") if "group" in config else None
    if not isinstance(members, list):
        return True
    named = [one.get("task", one.get("group")) if isinstance(one, dict) else one for one in members]
    return all(isinstance(one, str) and _whole(one, index) for one in named)


def _check(task: Task) -> None:
    for flag, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "needs "
                       "more than text")):  # fmt: skip
        if getattr(task, flag, False):
            raise InputError(f"task {task.task_name} {what}, which is not done here; leave it out")


def _failed(name: str, what: str, error: Exception) -> InputError:
    reason = one_line(f"{type(error).__name__}: {error}", 300)
    return InputError(
        f"task {name}: {what} ({reason}); see to its file, and that its data set is in the local "
        "cache or there is a network"
    )


def check_memories(lm: MemoryLM, memories: Sequence[str]) -> None:
    """Raise InputError where a model cannot have one of the memories."""
    from .model import check_memory

    for memory in memories:
        check_memory(lm, memory)


def evaluate(lm: MemoryLM, chosen: Tasks, settings: Settings) -> dict[str, Any]:
    """Run tasks once with each memory.

    Returns:
        For JSON::

            {"memories": [...],
             "tasks": {task: {"metric": its main one, "n": documents, "shots": few-shot examples,
                              "routed_on": template or null, "longer_than_context": documents,
                              "metrics": {metric: {memory: {"value", "stderr"}}}}},
             "groups": {group: {"tasks": [...], memory: mean of the tasks' main metrics}},
             "limit", "seed", "lm_eval": its version}

        ``stderr`` is null for what is no mean over documents; a mean is null where a task's main
        metric is no share.

    Raises:
        InputError: a memory that the model cannot have, or a document that a task's templates, or
            the template that says what is routed, do not fit.
    """
    from .model import HierMemLM
    from .routes import Routes

    if unknown := [task for task in settings.route_on if task not in chosen.tasks]:
        raise InputError(
            f"--route-on {unknown[0]}: no such task runs; expected one of {', '.join(chosen.tasks)}"
        )
    routes = Routes(settings.route_on, chosen.tasks)
    for task in chosen.tasks.values():
        _prepare(task, settings)
    found, longer = {}, {}
    # mlx-lm and lm-eval print on stdout, where our own result goes.
    with redirect_stdout(sys.stderr):
        for memory in settings.memories:
            model = HierMemLM(lm, memory, settings.max_tokens, settings.batch_size, routes=routes)
            found[memory] = _run(model, chosen, settings)
            longer[memory] = model.longer
    tasks = {
        name: _of_task(task, name, found, longer, routes) for name, task in chosen.tasks.items()
    }
    return {
        "memories": list(settings.memories),
        "tasks": tasks,
        "groups": {
            group: {"tasks": members, **_means(members, tasks, settings.memories)}
            for group, members in chosen.groups.items()
        },
        "limit": settings.limit,
        "seed": settings.seed,
        "lm_eval": version("lm_eval"),
    }


def _prepare(task: Task, settings: Settings) -> None:
    """Set a task's shots, and build its first request, where a wrong template shows."""
    own = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    try:
        task.set_fewshot_seed(seed=settings.seed)
        with redirect_stdout(sys.stderr):
            task.build_all_requests(limit=1)
    except Exception as error:
        raise _failed(task.task_name, "no request can be built", error) from error


def _run(model: Any, chosen: Tasks, settings: Settings) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    for task in chosen.tasks.values():
        task.set_fewshot_seed(seed=settings.seed)  # the same examples with each memory
    return evaluate(
        model,
        {"tasks": chosen.tasks},
        limit=settings.limit,
        # lm-eval's bootstrap forks, which a process that runs MLX may not survive.
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=model.use_chat_template,
    )


def _of_task(
    task: Task,
    name: str,
    found: Mapping[str, dict[str, Any]],
    longer: Mapping[str, set[tuple[str | None, int | None]]],
    routes: Routes,
) -> dict[str, Any]:
    first = next(iter(found.values()))
    metrics: dict[str, dict[str, dict[str, float | None]]] = {}
    filters = {key.partition(",")[2] for key in first["results"][name] if "," in key}
    for memory, results in found.items():
        for key, value in results["results"][name].items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            samples = [
                sample[metric]
                for sample in results["samples"][name]
                if sample["filter"] == kept and metric in sample
            ]
            label = metric if len(filters) == 1 else key
            metrics.setdefault(label, {})[memory] = {
                "value": float(value) if math.isfinite(value) else None,
                "stderr": _stderr(task, metric, samples),
            }
    main = next((metric for metric in SHARES if metric in metrics), next(iter(metrics), None))
    return {
        "metric": main,
        "n": first["n-samples"][name]["effective"],
        "shots": first["n-shot"][name],
        "routed_on": routes.template(name),
        "longer_than_context": len(
            {
                document
                for of_memory in longer.values()
                for document in of_memory
                if document[0] == name
            }
        ),
        "metrics": metrics,
    }


def _stderr(task: Task, metric: str, values: Sequence[Any]) -> float | None:
    """The standard error of a mean over documents, as lm-eval takes it; None for all else."""
    from lm_eval.api.metrics import mean, mean_stderr

    if task.aggregation().get(metric) is not mean or len(values) < 2:
        return None
    return float(mean_stderr(values))


def _means(
    members: Sequence[str], tasks: Mapping[str, dict[str, Any]], memories: Sequence[str]
) -> dict[str, float | None]:
    """Per memory the mean of the main metrics, each task counting once."""
    means: dict[str, float | None] = {}
    for memory in memories:
        values = [
            tasks[name]["metrics"][tasks[name]["metric"]][memory]["value"]
            for name in members
            if tasks[name]["metric"] in SHARES
        ]
        whole = len(values) == len(members) and values and None not in values
        means[memory] = sum(values) / len(values) if whole else None
    return means
