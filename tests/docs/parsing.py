"""What the programs of this repository take, asked of their own parsers; nothing is run."""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from unittest.mock import patch

from mlx_hiermem.cli import COMMANDS, main

_parse = argparse.ArgumentParser.parse_known_args


class _Parsed(BaseException):
    """The program has parsed its arguments: it is stopped there."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def parse(program: Sequence[str]) -> argparse.ArgumentParser:
    """Have a program parse its arguments, and stop it then.

    Args:
        program: ``["mlx_hiermem", ...]`` or ``["python", "-m", module, ...]``.

    Returns:
        The parser that it did it with.

    Raises:
        AssertionError: the arguments are wrong, or it has no parser; what it said is the text.
    """
    depth = 0

    def stopping(self, args=None, namespace=None):
        nonlocal depth
        depth += 1  # a parser of subcommands calls theirs
        self.allow_abbrev = False  # the docs write options out
        try:
            found = _parse(self, args, namespace)
        finally:
            depth -= 1
        if depth or found[1]:  # what is unknown the program has to refuse
            return found
        raise _Parsed(self)

    with patch.object(argparse.ArgumentParser, "parse_known_args", stopping):
        return _stopped(program)


def parser_of(program: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a program, whatever its arguments; the subcommand has to be among them.

    Raises:
        AssertionError: it has none.
    """

    def stopping(self, args=None, namespace=None):
        raise _Parsed(self)

    with patch.object(argparse.ArgumentParser, "parse_known_args", stopping):
        return _stopped(program)


def _stopped(program: Sequence[str]) -> argparse.ArgumentParser:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if program[0] == "mlx_hiermem":
                main(list(program[1:]))
            else:
                assert program[1] == "-m", f"{' '.join(program)}: not `python -m MODULE`"
                _run_module(program[2], program[3:])
    except _Parsed as parsed:
        return parsed.parser
    except (SystemExit, ImportError) as error:
        raise AssertionError(f"{' '.join(program)}: {said.getvalue()} {error}") from None
    raise AssertionError(f"{' '.join(program)}: ended without parsing; {said.getvalue()}")


def _run_module(module: str, arguments: Sequence[str]) -> None:
    if module == "mlx_hiermem":
        sys.exit(main(list(arguments)))
    with patch.object(sys, "argv", [module, *arguments]), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of modules loaded before
        runpy.run_module(module, run_name="__main__", alter_sys=True)


@cache
def options(program: tuple[str, ...]) -> frozenset[str]:
    """Every option of a program, those of its subcommands too.

    Raises:
        AssertionError: there is no such program.
    """
    return frozenset(_options(parser_of(program)))


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _options(inner)


def actions(command: str) -> list[str]:
    """The actions of a subcommand, such as those of ``bank``."""
    for action in _subparser(command)._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices)
    return []


def _subparser(command: str) -> argparse.ArgumentParser:
    for action in parser_of(["mlx_hiermem", command])._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[command]
    raise AssertionError("mlx_hiermem has no subcommands")


@cache
def options_of(command: str, action: str | None = None) -> frozenset[str]:
    """The options of ``mlx_hiermem COMMAND``, or of one of its actions."""
    assert command in COMMANDS, f"mlx_hiermem {command}: no such subcommand"
    parser = _subparser(command)
    if action is not None:
        inner = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        assert action in inner.choices, f"mlx_hiermem {command} {action}: no such action"
        parser = inner.choices[action]
    return frozenset(_options(parser)) | {"--debug"}


def every_option() -> frozenset[str]:
    """Every option of every subcommand."""
    found = {"--debug", "--version", "--help"}
    return frozenset(found.union(*(options_of(command) for command in COMMANDS)))
