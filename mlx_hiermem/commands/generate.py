"""``mlx_hiermem generate``: answer one prompt with a fetched memory and report what was fetched.

The answer goes to stdout as it comes and the report to stderr, so that the answer can be piped;
``--json`` prints one object instead. What ``chat`` shares with it stands here too.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..sampling import is_greedy
from .options import add_model_arguments, load_model
from .tables import show_fetch, show_speed, show_tiers

if TYPE_CHECKING:
    from ..engine import MemoryLM, Response
    from ..refetch import Refetch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", "-p", required=True, metavar="TEXT", help="text to answer; - reads stdin"
    )
    parser.add_argument(
        "--path",
        type=parse_path,
        metavar="IDS",
        help="fetch this cluster path, one id per level such as 3,50, whatever --memory says",
    )
    add_answer_arguments(parser)
    add_refetch_arguments(parser, "never")
    parser.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="take the prompt as it is, even if the tokenizer has a chat template",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from ..conversation import chat_tokens

    check_answer_arguments(args)
    refetch = parse_refetch(args)
    text = _read_stdin() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise InputError("--prompt: it is empty; give it at least one word")
    lm = load_model(args)
    sampler = prepare(lm, args)
    prompt: str | list[int] = text
    if lm.tokenizer.has_chat_template and not args.ignore_chat_template:
        prompt = chat_tokens(lm, [{"role": "user", "content": text}])
    memory = args.memory if args.path is None else args.path
    pieces = lm.stream(prompt, memory, args.max_tokens, sampler, text, refetch)
    if args.json:
        *_, last = found = list(pieces)
        given = to_dict("".join(piece.text for piece in found), last)
        if refetch.when == "tokens":
            given["refetches"] = last.refetches
        print(json.dumps(given, ensure_ascii=False))
        return 0
    _, last = write(pieces)
    held = [show_tiers(lm.bank)] if args.tier or args.memory_budget else []
    changed = [f"memory changed {show_times(last.refetches)}"] if refetch.when == "tokens" else []
    print("\n".join([show_fetch(last), *changed, *held, show_speed(last)]), file=sys.stderr)
    return 0


def to_dict(text: str, last: Response) -> dict[str, Any]:
    """What ``--json`` prints: the whole answer and the facts of its last piece.

    ``peak_memory`` is in bytes, ``generation_tps`` in tokens per second; ``run`` adds
    ``refetches`` where the memory may change on the way.
    """
    return {
        "text": text,
        "path": None if last.path is None else list(last.path.ids),
        "memory": last.memory,
        "fetch": last.fetch.to_dict(),
        "prompt_tokens": last.prompt_tokens,
        "generation_tokens": last.generation_tokens,
        "generation_tps": last.tokens_per_second,
        "peak_memory": last.peak_memory,
    }


# ---- shared with chat ------------------------------------------------------------------


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of how an answer is made, named as in mlx-lm where it has them."""
    parser.add_argument(
        "--memory",
        choices=("fetched", "generic", "none"),
        default="fetched",
        help="the memory on the prompt's path, the generic one, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--block",
        type=parse_block,
        action="append",
        default=[],
        metavar="LEVEL:CLUSTER",
        help="block one block, such as 1:3, for this run; may be given more than once",
    )
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=256,
        metavar="N",
        help="longest answer in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--temp",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that make up this share (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the sampling")


def add_refetch_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options of when a memory is fetched anew."""
    parser.add_argument(
        "--refetch",
        default=default,
        metavar="WHEN",
        help="when the memory is routed anew: never, turn (for each message of a chat) or tokens:N "
        "(also after every N tokens of an answer) (default: %(default)s)",
    )
    parser.add_argument(
        "--kv-cache",
        choices=("keep", "recompute"),
        default="keep",
        help="what becomes of the keys and values so far when the memory changes; docs/topics.md "
        "has figures (default: %(default)s)",
    )


def parse_refetch(args: argparse.Namespace) -> Refetch:
    """What ``add_refetch_arguments`` added.

    Raises:
        InputError: naming the option.
    """
    from ..refetch import Refetch

    try:
        return Refetch.parse(args.refetch, args.kv_cache)
    except InputError as error:
        raise InputError(f"--{error}") from None


def show_times(count: int) -> str:
    """How often, in words."""
    return "once" if count == 1 else f"{count} times"


def check_answer_arguments(args: argparse.Namespace) -> None:
    """Refuse values out of range before a model is loaded.

    Raises:
        InputError: naming the option.
    """
    for option, value, fits, expected in (
        ("--max-tokens", args.max_tokens, args.max_tokens >= 1, "a number from 1 on"),
        ("--temp", args.temp, 0 <= args.temp < math.inf, "a number from 0 on"),
        ("--top-p", args.top_p, 0 <= args.top_p <= 1, "a number from 0 to 1"),
        ("--seed", args.seed, 0 <= (args.seed or 0) < 2**64, "a number from 0 to 2^64 - 1"),
    ):
        if not fits:
            raise InputError(f"{option}: {value} is out of range; give {expected}")


def parse_path(text: str) -> tuple[int, ...]:
    """The ids of a cluster path, ``3,50``.

    Raises:
        InputError: the text is no list of ids.
    """
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text, re.ASCII):
        raise InputError(
            f"--path: {text!r} is no cluster path; give one id per level with commas between, "
            "such as 3,50"
        )
    return tuple(_integer("--path", one) for one in text.split(","))


def parse_block(text: str) -> tuple[int, int]:
    """The level and cluster of a block, ``1:3``.

    Raises:
        InputError: the text is no such pair.
    """
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text, re.ASCII)
    if not found:
        raise InputError(f"block {text!r}: expected LEVEL:CLUSTER, such as 1:3")
    return _integer("block", found[1]), _integer("block", found[2])


def _integer(what: str, digits: str) -> int:
    if len(digits) > 20:  # Python refuses to convert thousands of digits
        raise InputError(f"{what}: {digits[:20]}... is too large for a number of a cluster")
    return int(digits)


def prepare(lm: MemoryLM, args: argparse.Namespace) -> Callable[..., Any]:
    """Block what is to be blocked, set the seed, and make the sampler."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    for level, cluster in args.block:
        lm.bank.block(level, cluster)
    if args.seed is not None:
        mx.random.seed(args.seed)
    if is_greedy(args.temp, args.top_p):
        return make_sampler()
    return make_sampler(args.temp, args.top_p)


def write(pieces: Iterator[Response]) -> tuple[str, Response]:
    """Write an answer to stdout as it comes; returns it, and its last piece."""
    answer = ""
    last: Response | None = None
    for last in pieces:
        answer += last.text
        print(last.text, end="", flush=True)
    print(flush=True)
    assert last is not None, "every answer has a last piece, which says why it ended"
    return answer, last


def _read_stdin() -> str:
    try:
        # The newline at the end is the shell's, not the prompt's.
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt -: stdin is not UTF-8 text ({error}); convert it") from None
