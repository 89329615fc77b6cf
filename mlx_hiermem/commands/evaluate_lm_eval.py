"""``mlx_hiermem evaluate --task lm-eval``: tasks of lm-evaluation-harness, per memory."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import InputError
from .options import load_model
from .tables import table

#: As in ``evaluation.lm_eval.model``, which needs lm-eval.
MEMORIES = ("none", "generic", "fetched", "blocked")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this task reads."""
    group = parser.add_argument_group("tasks of lm-evaluation-harness, for --task lm-eval")
    group.add_argument(
        "--tasks",
        metavar="NAME,NAME",
        help="CK, SK (the paper's), or names of lm-eval's or your own tasks and groups",
    )
    group.add_argument(
        "--task-path",
        metavar="FOLDER",
        help="with task files (.yaml) of your own; they are programs, so take them only from whom "
        "you trust",
    )
    group.add_argument(
        "--memory",
        metavar="WORD,WORD",
        help=f"of {', '.join(MEMORIES)} (default: none,generic,fetched)",
    )
    group.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples in each context; by default what each task says. A task that says 0 keeps 0",
    )
    group.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="the most sequences at once"
    )
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="of an answer; by default what each task says"
    )
    group.add_argument(
        "--route-on",
        action="append",
        default=[],
        metavar="TASK=TEMPLATE",
        help="route the documents of a task by this Jinja template over their fields, such as "
        "'boolq={{question}}'; may be given for each task",
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as an object for JSON, and as text for people.

    Raises:
        InputError: an option cannot be used, lm-eval is not installed, or a task cannot be run.
    """
    from ..evaluation.lm_eval import run as runner

    if args.tasks is None:
        raise InputError("--task lm-eval needs --tasks, such as --tasks CK,SK")
    for option in ("num_fewshot", "batch_size", "max_tokens"):
        value, least = getattr(args, option), int(option != "num_fewshot")
        if value is not None and value < least:
            raise InputError(f"--{option.replace('_', '-')} is {value}; expected at least {least}")
    settings = runner.Settings(
        _memories(args.memory or "none,generic,fetched"),
        args.limit,
        args.num_fewshot,
        args.batch_size,
        args.max_tokens,
        args.seed,
        dict(map(_route, args.route_on)),
    )
    runner.available()
    lm = load_model(args)
    runner.check_memories(lm, settings.memories)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    result = runner.evaluate(lm, runner.load_tasks(names, args.task_path), settings)
    return result, show(result)


def show(result: dict[str, Any]) -> str:
    """The table of a result of ``evaluation.lm_eval.run.evaluate``."""
    memories, rows, notes = result["memories"], [], []
    for name, task in result["tasks"].items():
        for metric, values in task["metrics"].items():
            cells = [_cell(**values[memory]) for memory in memories]
            rows.append([name, metric, task["n"], task["shots"], *cells])
        if count := task["longer_than_context"]:
            notes.append(
                f"{name}: {count} of {task['n']} documents are longer than the model's context."
            )
    parts = [table(["task", "metric", "n", "shots", *memories], rows)]
    if result["groups"]:
        means = [
            [group, len(found["tasks"]), *(_cell(found[memory]) for memory in memories)]
            for group, found in result["groups"].items()
        ]
        parts += [
            "Means of the first of " + ", ".join(_shares()) + " that each task has:",
            table(["group", "tasks", *memories], means),
        ]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _shares() -> tuple[str, ...]:
    from ..evaluation.lm_eval.run import SHARES

    return SHARES


def _cell(value: float | None, stderr: float | None = None) -> str:
    if value is None:
        return "-"
    figure = f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"
    return figure if stderr is None else f"{figure} ±{stderr:.4f}"


def _memories(text: str) -> tuple[str, ...]:
    memories = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    if wrong := [memory for memory in memories if memory not in MEMORIES]:
        raise InputError(f"--memory: {wrong[0]!r} is none; expected some of {', '.join(MEMORIES)}")
    return memories


def _route(text: str) -> tuple[str, str]:
    task, equals, template = text.partition("=")
    if not (task.strip() and equals and template.strip()):
        raise InputError(
            f"--route-on {text[:60]}: expected TASK=TEMPLATE, such as 'boolq={{{{question}}}}'"
        )
    return task.strip(), template
