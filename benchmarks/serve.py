"""Many clients at once, each with a memory of its own.

``python -m benchmarks.serve [--anchor 410M] [--http] [--soak 1000]`` writes a random model into a
folder of its own, measures, and removes it. Rows:

- ``serve.mixed_vs_same``: tokens/s of 8 clients with 8 memories ÷ 8 clients with one;
- ``serve.batch_vs_one``: tokens/s of 8 clients with 8 memories, together, ÷ one client alone;
- ``serve.first_token_p50``, ``serve.first_token_p99``: seconds until the first token ÷ the median
  time of a token after it, of those 8 clients, who all come at the same moment;
- with ``--soak N``, N requests of which 1 % vanish in mid-stream: ``serve.wrong``: those that were
  lost, or answered otherwise than alone (at temperature 0, in float32, on a small model whose
  memories change what is said); ``serve.memory``: the server's resident memory at the end ÷ after
  half of them.

Without ``--http`` the clients ask the scheduler in this process; with it, ``mlx_hiermem serve``.

Notable: a round is all of a request: fetch, prompt and answer. Nothing of earlier rounds is reused.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hiermem import load
from mlx_hiermem.backend import backend_name
from mlx_hiermem.bank.writer import write_bank
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.errors import InputError

from . import decode_models as models
from . import fetch_bank
from .decode_models import Sizes
from .fetch_bank import path_to
from .harness import Row, Times, interleave, main, ratio
from .made_up import make_documents
from .serve_clients import Direct, Http, Question, Server, Told, together
from .serve_soak import soak

NAME = "serve"
#: Tokens of the answers of a soak.
SOAK_TOKENS = 12


def options(parser: argparse.ArgumentParser) -> None:
    models.options(parser)
    parser.add_argument("--http", action="store_true", help="ask `mlx_hiermem serve` over HTTP")
    parser.add_argument(
        "--soak", type=int, default=0, metavar="N", help="make N requests besides (default: none)"
    )


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    if args.soak < 0:
        raise InputError(f"--soak {args.soak}: give a number of requests, or 0 for none")
    sizes = models.sizes(args.anchor, args.smoke)
    try:
        folder = Path(tempfile.mkdtemp(prefix="serve-", dir=args.folder))
    except OSError as error:
        raise InputError(f"--folder {args.folder}: cannot be written ({error.strerror})") from None
    try:
        models.write_model(folder / "model", sizes)
        with closing(start(folder / "model", args.http, prompt_cache_bytes=0)) as server:
            yield from speed(server, sizes, args.http)
        if args.soak:
            yield from endurance(folder / "soak" / "model", args.soak, args.http)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start(
    folder: Path,
    http: bool,
    prompt_cache_bytes: int,
    loaded: Callable[[Path], MemoryLM] = load,
) -> Server:
    """The server of a model folder."""
    if http:
        return Http(folder, prompt_cache_bytes)
    return Direct(lambda: loaded(folder), prompt_cache_bytes)


def about(sizes: Sizes, http: bool) -> str:
    """What is measured."""
    way = "mlx_hiermem serve, over HTTP" if http else "the scheduler"
    return (
        f"{way}, {sizes.batch} clients, prompts of about 16 words, answers of {tokens_of(sizes)} "
        f"tokens, ranks {','.join(map(str, sizes.ranks))} on {backend_name()}"
    )


def tokens_of(sizes: Sizes) -> int:
    """Tokens of an answer: more than of its prompt, which gains nothing from a batch on a CPU."""
    return 16 * sizes.batch_tokens


# ---- speed -----------------------------------------------------------------------------


def speed(server: Server, sizes: Sizes, http: bool) -> Iterator[Row]:
    """Tokens per second, and the first token."""
    told: list[Told] = []
    questions = asked(sizes)

    def mixed() -> None:
        told.extend(together(server, questions["mixed"]))

    tasks = {
        "mixed": mixed,
        "same": lambda: together(server, questions["same"]),
        "one": lambda: together(server, questions["one"]),
    }
    times = interleave(tasks, max(2, sizes.rounds // 3))
    what = about(sizes, http)
    yield ratio("serve.mixed_vs_same", times, "same", "mixed", ">= 0.8", what)
    yield batch_vs_one(times, sizes)
    yield from first_token(told[sizes.batch :])  # the first round is a warm-up


def asked(sizes: Sizes) -> dict[str, list[Question]]:
    """What the clients of each task ask; the prompts are the same ones."""
    config = fetch_bank.make_config(sizes.anchor, sizes.ranks, branching=2)
    below = config.branching ** (config.levels - config.memory_levels[-1])
    paths = [path_to(config, number * below) for number in range(sizes.batch)]
    texts = make_documents(sizes.batch, 16, seed=7)
    mixed = [
        Question(text, path, tokens_of(sizes)) for text, path in zip(texts, paths, strict=True)
    ]
    same = [replace(question, memory=paths[0]) for question in mixed]
    return {"mixed": mixed, "same": same, "one": mixed[:1]}


def batch_vs_one(times: dict[str, Times], sizes: Sizes) -> Row:
    """Tokens/s of all clients ÷ those of one; a batch answers so many requests in its time."""
    row = ratio("serve.batch_vs_one", times, "one", "mixed", ">= 3")
    detail = f"{sizes.batch} × the time of one ÷ that of {sizes.batch} at once; {row.detail}"
    return replace(row, value=sizes.batch * row.value, detail=detail)


def first_token(told: list[Told]) -> Iterator[Row]:
    """How long the first token takes, in tokens."""
    token = statistics.median((one.last - one.first) / max(1, one.tokens - 1) for one in told)
    for name, percent in (("p50", 50), ("p99", 99)):
        value = float(np.percentile([one.first for one in told], percent)) / token
        yield Row(
            f"serve.first_token_{name}",
            value,
            "",
            f"{percent} % of {len(told)} requests have their first token within so many times the "
            "median time of a later one",
        )


# ---- endurance -------------------------------------------------------------------------


def endurance(folder: Path, count: int, http: bool) -> Iterator[Row]:
    """Many requests, some of which vanish."""
    write_soak_model(folder)
    lm = load_exact(folder)
    try:
        expected = alone(lm)
    finally:
        lm.bank.close()
    with closing(start(folder, http, 1 << 24, load_exact)) as server:
        found = soak(server, expected, count)
    different = len({answer for _, answer in expected})
    lost = f" ({'; '.join(found.reasons)})" if any(found.reasons) else ""
    yield Row(
        "serve.wrong",
        found.lost + found.mixed_up,
        "<= 0",
        f"{count} requests by 16 clients, {len(expected)} questions with {different} answers: "
        f"{found.answered} answered, {found.vanished} vanished, {found.lost} lost{lost}, "
        f"{found.mixed_up} mixed up",
    )
    middle, end = found.resident[(len(found.resident) - 1) // 2], found.resident[-1]
    yield Row(
        "serve.memory",
        end / middle,
        "<= 1.05",
        "resident memory of the server after all of them ÷ after half",
    )


def write_soak_model(folder: Path) -> None:
    """A small model whose memories are so large that each changes what is said."""
    sizes = models.sizes("160M", smoke=True)
    models.write_model(folder, sizes)
    memory = folder / "memory"
    config = MemoryConfig.load(memory / "config.json")
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    blocks = {
        level: numbers(config.clusters(level), config.block_size(level))
        for level in config.memory_levels
    }
    write_bank(memory, config, blocks, numbers(config.fetch_size()))


def load_exact(folder: Path) -> MemoryLM:
    """The model in float32: in less, a batch may round otherwise than one sequence does."""
    lm = load(folder)
    lm.model.set_dtype(mx.float32)
    lm.dtype = mx.float32
    return lm


def alone(lm: MemoryLM) -> list[tuple[Question, str]]:
    """Questions, and what the model answers when it does nothing else."""
    leaves = lm.bank.config.clusters(lm.bank.config.levels)
    memories = ["fetched", "generic", "none", *(path_to(lm.bank.config, i) for i in range(leaves))]
    texts = make_documents(5, 12, seed=5)
    questions = [Question(text, memory, SOAK_TOKENS) for memory, text in product(memories, texts)]
    return [(one, lm.generate(one.text, one.memory, one.max_tokens)) for one in questions]


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=options))
