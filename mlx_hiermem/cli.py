"""The ``mlx_hiermem`` command: a lazy dispatcher to one module per subcommand.

A subcommand lives in ``commands/NAME.py`` with ``add_arguments(parser)`` and ``run(args) -> int``.
Only the module of the chosen subcommand is imported, so ``--help`` loads none of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from . import __version__
from .backend import preload_blas
from .errors import HierMemError, of_the_machine

#: Every subcommand with its one-line summary, in the order of ``--help``.
COMMANDS = {
    "generate": "answer one prompt with a fetched memory and report what was fetched",
    "chat": "talk to a model in the terminal",
    "demo": "open the model that ships with the package in the browser",
    "serve": "answer an OpenAI-compatible API over HTTP, with a memory per request",
    "init": "make a model folder with a fresh memory bank, for any model that mlx-lm loads",
    "train": "train an anchor, or memories on it, on a corpus that cluster has made",
    "evaluate": "measure facts, routing, perplexity or lm-eval tasks, with and without memory",
    "cluster": "make a corpus: embed documents, grow the tree, assign, pack",
    "merge": "put the subtrees that train --subtree trained together to one model",
    "bank": "look at a memory bank, change it, publish it",
    "convert": "bring anchors and banks from PyTorch, and back",
    "doctor": "show the backend, its speed, the versions, and what to mend",
}

EXIT_FAULT, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the arguments after the program's name; the process's own by default.

    Returns:
        The exit code: 0 done, 2 bad input (a :class:`HierMemError`) or a machine without the
        memory or the disk for it, 130 interrupted, 1 a fault of ours. argparse leaves with
        ``SystemExit(2)`` on wrong use by itself.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Taken out here, so that it may stand anywhere, after a nested subcommand too.
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        args = _parse(argv)
        return args.run(args)
    except HierMemError as error:
        if debug:
            raise
        return _report(of_the_machine(error) or str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`mlx_hiermem … | head`). Python would complain once
        # more when it flushes stdout at exit, so stdout goes nowhere from here on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAULT
    except Exception as error:
        if debug:
            raise
        if (reason := of_the_machine(error)) is not None:
            return _report(reason, EXIT_USAGE)
        text = f"{type(error).__name__}: {error}"
        return _report(f"{text} (a fault of ours; --debug shows where)", EXIT_FAULT)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlx_hiermem",
        description="Language models with hierarchical memories, fetched once per context.",
        epilog="`mlx_hiermem SUBCOMMAND --help` lists the options of a subcommand.",
    )
    parser.add_argument("--version", action="version", version=f"mlx_hiermem {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="SUBCOMMAND", required=True)
    # No option before the subcommand takes a value, so the first bare word is the subcommand.
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    if not argv:
        parser.error(f"no subcommand is given; --help tells of {', '.join(COMMANDS)}")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary}.")
        if name == chosen:
            preload_blas()
            command = import_module(f"{__package__}.commands.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(subparsers.choices[args.command], args, unknown)
    return args


def _refuse(
    parser: argparse.ArgumentParser, args: argparse.Namespace, unknown: list[str]
) -> NoReturn:
    """Leave with what is unknown to a subcommand, and what may have been meant."""
    options: list[str] = []
    nested: argparse.ArgumentParser | None = parser
    while nested is not None:  # a subcommand may have actions with options of their own
        parser, nested = nested, None
        for action in parser._actions:
            options += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                nested = action.choices.get(getattr(args, action.dest))
    names = [text.partition("=")[0] for text in unknown]
    close = [name for text in names for name in get_close_matches(text, options, 1)]
    meant = f"did you mean {', '.join(close)}? " if close else ""
    parser.error(
        f"unrecognized arguments: {' '.join(unknown)}; {meant}`{parser.prog} --help` lists the "
        "options"
    )


def _report(text: str, code: int) -> int:
    print(f"mlx_hiermem: error: {' '.join(text.splitlines())}", file=sys.stderr)
    return code
