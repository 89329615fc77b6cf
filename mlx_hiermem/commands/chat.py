"""``mlx_hiermem chat``: talk to a model in the terminal.

With a chat template the conversation is kept (``conversation.Conversation``), and the memory is
routed on the last message alone; ``--refetch`` and ``--kv-cache`` say otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from ..errors import HierMemError, InputError
from .generate import (
    add_answer_arguments,
    add_refetch_arguments,
    check_answer_arguments,
    parse_block,
    parse_refetch,
    prepare,
    show_times,
    write,
)
from .options import add_model_arguments, load_model
from .tables import show_fetch, show_path, show_speed

if TYPE_CHECKING:
    from collections.abc import Callable

    import mlx.core as mx

    from ..engine import MemoryLM, Response
    from ..refetch import Refetch

HELP = """\
/memory fetched|generic|none  which memory the next answers use
/block 1:3, /unblock 1:3      block a block (level 1, cluster 3), or take that back
/refetch turn|tokens:N|never  when the memory is routed anew; then keep or recompute, if need be
/path                         path and fetch report of the last answer
/reset                        forget the conversation
/quit                         leave (so do Ctrl-D and Ctrl-C)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_answer_arguments(parser)
    add_refetch_arguments(parser, "turn")


def run(args: argparse.Namespace) -> int:
    check_answer_arguments(args)
    refetch = parse_refetch(args)
    lm = load_model(args)
    chat = Chat(lm, args.memory, args.max_tokens, prepare(lm, args), refetch)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lets input() edit a line and recall earlier ones)
    print(chat.greeting)
    try:
        while chat.turn(_read_line()):
            pass
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():  # where ^D or ^C is all that stands on the line
            print()
    return 0


class Chat:
    """What a terminal does with a conversation.

    Args:
        lm: the model.
        memory: "fetched", "generic" or "none".
        max_tokens: longest answer.
        sampler: log-probabilities -> token.
        refetch: when the memory is routed anew; default: for each message.
    """

    def __init__(
        self,
        lm: MemoryLM,
        memory: str,
        max_tokens: int,
        sampler: Callable[[mx.array], mx.array] | None,
        refetch: Refetch | str = "turn",
    ) -> None:
        from ..conversation import Conversation

        self.lm = lm
        self.conversation = Conversation(lm, memory, refetch)
        self.max_tokens = max_tokens
        self.sampler = sampler
        self.last: Response | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/memory": self._set_memory,
            "/block": lambda words: self._block(words, self.lm.bank.block),
            "/unblock": lambda words: self._block(words, self.lm.bank.unblock),
            "/refetch": self._set_refetch,
            "/path": self._show_path,
            "/reset": self._reset,
            "/help": lambda words: print(HELP),
        }

    @property
    def greeting(self) -> str:
        if self.conversation.is_kept:
            return "The conversation is kept; /help lists the commands."
        return (
            "This model has no chat template: each line is a prompt of its own, and nothing is "
            "kept between lines. /help lists the commands."
        )

    def turn(self, line: str) -> bool:
        """Answer a line or obey a command; False once it is time to leave."""
        line = line.strip()
        command, _, words = line.partition(" ")
        if command == "/quit":
            return False
        try:
            if command in self._commands:
                self._commands[command](words.strip())
            elif command.startswith("/"):
                raise InputError(f"{command}: no such command; /help lists them")
            elif line:
                self._answer(line)
        except HierMemError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return True

    def _answer(self, text: str) -> None:
        conversation = self.conversation
        try:
            _, last = write(conversation.answer(text, self.max_tokens, self.sampler))
        except InputError as error:
            if not conversation.messages:
                raise
            raise InputError(f"{error}; /reset forgets the conversation so far") from None
        self.last = last
        note = f"memory {last.memory}"
        if last.path is not None:
            note += f", path {show_path(last.path)}"
        if last.fetch.blocks:
            note += f", {last.fetch.bytes:,} bytes in {last.fetch.ms:.2f} ms"
        if last.refetches:
            note += f", changed {show_times(last.refetches)}"
        if last.cached_tokens:
            note += f"; {last.cached_tokens} of {last.prompt_tokens} prompt tokens reused"
        print(f"[{note}; {last.tokens_per_second:.1f} tokens/s]", file=sys.stderr)

    def _set_memory(self, words: str) -> None:
        if words not in ("fetched", "generic", "none"):
            raise InputError(f"/memory: {words!r} is unknown; give fetched, generic or none")
        self.conversation.memory = words
        print(f"memory {words}")

    def _set_refetch(self, words: str) -> None:
        from ..refetch import Refetch

        when, *what = words.split() or [""]
        try:
            if len(what) > 1:
                raise InputError(f"refetch is {words!r}; expected one or two words")
            kv_cache = what[0] if what else self.conversation.refetch.kv_cache
            self.conversation.refetch = Refetch.parse(when, kv_cache)
        except InputError as error:
            raise InputError(f"/refetch: {error}") from None
        print(f"refetch {self.conversation.refetch}, keys and values: {kv_cache}")

    def _block(self, words: str, change: Callable[[int, int], None]) -> None:
        change(*parse_block(words))
        blocked = sorted(self.lm.bank.blocked)
        shown = ", ".join(f"{level}:{cluster}" for level, cluster in blocked)
        print(f"blocked: {shown or 'nothing'}")

    def _show_path(self, words: str) -> None:
        if self.last is None:
            raise InputError("/path: there is no answer yet; ask something first")
        print(f"{show_fetch(self.last)}\n{show_speed(self.last)}")

    def _reset(self, words: str) -> None:
        self.conversation.reset()
        print("the conversation is forgotten")


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 text ({error}); convert it") from None
