"""``mlx_hiermem evaluate``: what a model is worth, as a table or as JSON; one file per task.

A task is a module with ``add_arguments(parser)`` for the options that it alone reads, and
``run(args)``, which gives its JSON object and its text for people. It may have ``ONLY``: option ->
what is said where that option is given with another task.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError
from .options import add_model_arguments

#: Task -> its module, and what it measures.
TASKS = {
    "facts": ("evaluate_facts", "exact answers per memory"),
    "routing": ("evaluate_routing", "how often a question lands where its fact was trained"),
    "perplexity": ("evaluate_perplexity", "of the documents in --text"),
    "atomic": (
        "evaluate_atomic",
        "atomic numbers by how often elements are named in the training corpus",
    ),
    "leakage": ("evaluate_leakage", "what is still known of blocks that were removed"),
    "lm-eval": ("evaluate_lm_eval", "tasks of EleutherAI's lm-evaluation-harness per memory"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--task",
        choices=TASKS,
        required=True,
        help="; ".join(f"{task}: {what}" for task, (_, what) in TASKS.items()),
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N questions, texts or documents"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the wrong paths and the few-shot examples (default: 0)",
    )
    parser.add_argument("--by-family", action="store_true", help="figures per family of facts too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", metavar="FILE", help="write the JSON object to a file as well")
    for task in TASKS:
        _module(task).add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit is {args.limit}; expected at least 1")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}; expected at least 0")
    _refuse_options_of_others(args)
    output = None if args.output is None else Path(args.output)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"--output {output}: expected the name of a file in a folder that exists")
    result, text = _module(args.task).run(args)
    if output is not None:
        from ..files import AtomicFile

        with AtomicFile(output.parent, output.name) as file:
            file.write(f"{json.dumps(result, indent=2)}\n".encode())
    print(json.dumps(result) if args.json else text)
    return 0


def _module(task: str) -> ModuleType:
    return import_module(f".{TASKS[task][0]}", __package__)


def _refuse_options_of_others(args: argparse.Namespace) -> None:
    """Raise InputError where an option is given that the chosen task does not read."""
    own = _options(args.task)
    for task in TASKS:
        for name, default in _options(task).items():
            if name not in own and getattr(args, name) != default:
                option = f"--{name.replace('_', '-')}"
                said = getattr(_module(task), "ONLY", {})
                raise InputError(said.get(option, f"{option} is an option of --task {task} alone"))


def _options(task: str) -> dict[str, Any]:
    """The options that a task adds, with their defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    _module(task).add_arguments(parser)
    return vars(parser.parse_args([]))
