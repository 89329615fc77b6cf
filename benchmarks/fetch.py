"""Fetching from a bank: against the bare read, against a flat bank, and what it holds in memory.

``python -m benchmarks.fetch`` writes banks of the paper's 160M anchor (9.2 GB, and 2.3 GB of a flat
one) into a folder of its own, measures, and removes them.

Notable: "cold" reads are of blocks whose pages were dropped from the page cache (Linux), and no
block is read cold twice. The paper's figure 5 is measured with ``benchmarks/fetch_media.py``.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_hiermem.backend import backend_name, preload_blas
from mlx_hiermem.commands.options import parse_bytes
from mlx_hiermem.errors import HierMemError, InputError

preload_blas()

import mlx.core as mx  # noqa: E402  (after the BLAS)

from mlx_hiermem import load  # noqa: E402
from mlx_hiermem.bank.reader import BlockReader  # noqa: E402
from mlx_hiermem.bank.store import MemoryBank  # noqa: E402
from mlx_hiermem.config import MemoryConfig  # noqa: E402

from . import fetch_bank, fetch_figure  # noqa: E402
from .fetch_media import Medium  # noqa: E402
from .harness import (  # noqa: E402
    Row,
    in_fresh_process,
    interleave,
    main,
    ratio,
    resident_memory,
)
from .made_up import make_documents  # noqa: E402

NAME = "fetch"
#: A phone's flash and an external disk, in GB/s; --media gives others.
MEDIA = ("flash=1.5", "external=0.4")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=Path, help="where to write the banks (default: the temporary folder)"
    )
    parser.add_argument(
        "--media",
        type=Medium.parse,
        action="append",
        metavar="NAME=GB/S",
        help=f"a medium to throttle to, in GB/s (default: {' and '.join(MEDIA)})",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figure of the media")
    parser.add_argument(
        "--memory-budget",
        type=parse_bytes,
        default=10**9,
        metavar="SIZE",
        help="budget of the measurement of resident memory (default: 1GB)",
    )


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    smoke = args.smoke
    anchor = fetch_bank.SMOKE if smoke else fetch_bank.ANCHOR_160M
    ranks = (8, 4, 2, 0) if smoke else fetch_bank.RANKS
    branching = 4 if smoke else fetch_bank.BRANCHING
    media = args.media or [Medium.parse(text) for text in MEDIA]
    encoder = {"type": "bert", "model": "encoder", "max_length": 256, "width": 384, "layers": 6}
    if smoke:
        encoder |= {"width": 32, "layers": 1}
    try:
        folder = Path(tempfile.mkdtemp(prefix="fetch-", dir=args.folder))
    except OSError as error:
        raise InputError(f"--folder {args.folder}: cannot be written ({error.strerror})") from None
    try:
        model, flat = folder / "model", folder / "flat"
        known = {key: encoder[key] for key in ("type", "model", "max_length")}
        config = fetch_bank.make_config(anchor, ranks, branching, encoder=known)
        blocks = 8 if smoke else 64
        need = 2 * (config.bank_size() + blocks * config.fetch_size())
        if (free := shutil.disk_usage(folder).free) < 1.1 * need:
            raise InputError(
                f"{folder}: {free:,} bytes are free, the banks take {need:,}; give another --folder"
            )
        fetch_bank.write_model(model, anchor, encoder, len(ranks), branching)
        fetch_bank.write_random_bank(model / "memory", config, "hierarchical bank")
        flat_config = fetch_bank.flat_config(config, anchor, blocks)
        fetch_bank.write_random_bank(flat, flat_config, "flat bank")
        os.sync()
        time.sleep(0 if smoke else 10)  # the disk goes on with what was written
        rounds = 3 if smoke else 15
        yield from against_pread(model / "memory", config, rounds)
        yield from fetch_figure.rows(model / "memory", flat, media, rounds, args.png)
        yield first_token(model, config, 3 if smoke else 9)
        yield resident(model, config, args.memory_budget, 3 if smoke else 60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- against the bare read -------------------------------------------------------------


def against_pread(memory: Path, config: MemoryConfig, rounds: int) -> Iterator[Row]:
    """A fetch against reading the same bytes into a buffer that is ready."""
    leaves = list(range(config.clusters(config.levels)))
    random.Random(0).shuffle(leaves)
    # Leaves under distinct blocks of every level but the first are far more than are needed.
    paths = iter(fetch_bank.path_to(config, leaf) for leaf in leaves)
    about = f"{config.fetch_size():,} numbers, {2 * config.fetch_size() / 1e6:.1f} MB in bfloat16"
    with MemoryBank.open(memory, tiers="disk") as bank:
        floor = Pread(memory, config)
        warm = [next(paths) for _ in range(4)]
        for path in warm:
            floor.read(path)
            bank.fetch(path).release()
        turn = {"fetch": 0, "pread": 0}

        def fetch() -> None:
            # Two paths that share no block, so that all of it is read each time.
            turn["fetch"] += 1
            bank.fetch(apart[turn["fetch"] % 2]).release()

        def pread() -> None:
            turn["pread"] += 1
            floor.read(apart[turn["pread"] % 2])

        apart = _apart(config, warm[0])
        tasks = {"fetch": fetch, "pread": pread}
        times = interleave(tasks, 10 * rounds, warmup=4)
        yield ratio("fetch.warm_vs_pread", times, "fetch", "pread", "<= 1.1", f"warm; {about}")
        yield _cold(bank, floor, config, paths, rounds, about)

        memory_of = bank.fetch(apart[0])
        widened = lambda: mx.eval(memory_of.joined.astype(mx.float32))  # noqa: E731
        times = interleave({"widening": widened, "fetch": fetch}, 3 * rounds)
        yield ratio(
            "fetch.widen_vs_fetch", times, "widening", "fetch", "",
            f"to float32 on {backend_name()}, which only the CPU backend needs",
        )  # fmt: skip
        memory_of.release()
        floor.close()
    with MemoryBank.open(memory, tiers="cached", memory_budget=10**9) as cached:
        for path in apart:
            cached.fetch(path).release()
        turn["cached"] = 0

        def from_cache() -> None:
            turn["cached"] += 1
            cached.fetch(apart[turn["cached"] % 2]).release()

        with MemoryBank.open(memory, tiers="disk") as bank:
            times = interleave({"cached": from_cache, "page cache": fetch}, 3 * rounds, warmup=4)
    yield ratio(
        "fetch.cached_vs_page_cache", times, "cached", "page cache", "",
        "the tier cached against reading again what the system still holds",
    )  # fmt: skip


def _apart(config: MemoryConfig, path: Sequence[int]) -> list[tuple[int, ...]]:
    """Two paths that share no block."""
    last = config.clusters(config.levels) - 1
    other = last if path[0] == 0 else 0
    return [tuple(path), fetch_bank.path_to(config, other)]


def _cold(
    bank: MemoryBank,
    floor: Pread,
    config: MemoryConfig,
    paths: Iterator[tuple[int, ...]],
    rounds: int,
    about: str,
) -> Row:
    """The same for blocks that are not in memory; each path is read once."""
    cold = _cold_paths(config, paths)
    waiting: dict[str, tuple[int, ...]] = {}

    def prepare() -> None:
        for name in ("fetch", "pread"):
            waiting[name] = next(cold)
            floor.drop(waiting[name])

    tasks: dict[str, Callable[[], object]] = {
        "fetch": lambda: bank.fetch(waiting["fetch"]).release(),
        "pread": lambda: floor.read(waiting["pread"]),
    }
    times = interleave(tasks, 2 * rounds, before=prepare)
    state = "dropped from the page cache" if hasattr(os, "posix_fadvise") else "not read before"
    return ratio("fetch.cold_vs_pread", times, "fetch", "pread", "<= 1.1", f"{state}; {about}")


def _cold_paths(
    config: MemoryConfig, paths: Iterator[tuple[int, ...]]
) -> Iterator[tuple[int, ...]]:
    """Paths of which each shares no block with the one before: all of it is read."""
    last: tuple[int, ...] = (-1,) * config.levels
    for path in paths:
        if path[0] != last[0]:
            yield path
            last = path


class Pread:
    """The floor: one ``pread`` per level into a buffer that is ready and was used before."""

    def __init__(self, memory: Path, config: MemoryConfig) -> None:
        self._config = config
        self._reader = BlockReader(memory)
        self._buffer = memoryview(bytearray(2 * config.fetch_size()))

    def places(self, path: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """For each block (file descriptor, offset, bytes)."""
        for level in self._config.memory_levels:
            file, start = self._reader.find(level, path[level - 1])
            yield file.fd, file.offset + start, self._config.block_bytes(level)

    def read(self, path: Sequence[int]) -> None:
        """Read the blocks on a path."""
        at = 0
        for fd, offset, size in self.places(path):
            if os.preadv(fd, [self._buffer[at : at + size]], offset) != size:
                raise HierMemError("the bare read was short; measure again")
            at += size

    def drop(self, path: Sequence[int]) -> None:
        """Drop the blocks on a path from the page cache, where the system lets us."""
        if hasattr(os, "posix_fadvise"):
            for fd, offset, size in self.places(path):
                os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


# ---- a whole answer, and memory --------------------------------------------------------


def first_token(model: Path, config: MemoryConfig, rounds: int) -> Row:
    """Route, fetch and the first token against the first token of the bare anchor."""
    lm = load(model)
    texts = make_documents(2 * rounds + 4, 30, seed=2)
    tokens = round(statistics.mean(len(lm.tokenize(text)) for text in texts))
    paths = len({lm.route(text).ids for text in texts})
    prompts = {memory: iter(texts * 2) for memory in ("fetched", "none")}

    def answer(memory: str) -> Callable[[], None]:
        return lambda: list(lm.stream(next(prompts[memory]), memory, max_tokens=1))

    times = interleave({"memory": answer("fetched"), "anchor": answer("none")}, rounds, warmup=2)
    lm.bank.close()
    return ratio(
        "fetch.first_token_vs_anchor", times, "memory", "anchor", "",
        f"route, fetch and first token; {len(texts)} prompts of about {tokens} tokens, {paths} "
        f"paths, in the page cache; {backend_name()}",
    )  # fmt: skip


def resident(model: Path, config: MemoryConfig, budget: int, answers: int) -> Row:
    """Resident memory of a process that has the whole bank open."""
    floor = in_fresh_process(answer_many, model=str(model), budget=None, answers=answers)
    bank = in_fresh_process(answer_many, model=str(model), budget=budget, answers=answers)
    fetched = bank.result["fetched"]
    held = bank.result["held"]
    bound = floor.result["resident"] + fetched + budget
    detail = (
        f"{bank.result['resident'] / 1e6:,.0f} MB with a bank of "
        f"{2 * config.bank_size() / 1e9:.1f} GB open and {answers} answers ÷ (anchor, encoder "
        f"and tree alone {floor.result['resident'] / 1e6:,.0f} + fetched {fetched / 1e6:,.0f} + "
        f"budget {budget / 1e6:,.0f} MB, of which {held / 1e6:,.0f} in use); peaks "
        f"{bank.peak / 1e6:,.0f} and {floor.peak / 1e6:,.0f} MB"
    )
    return Row("fetch.rss_vs_floor", bank.result["resident"] / bound, "<= 1.1", detail)


def answer_many(model: str, budget: int | None, answers: int) -> dict[str, Any]:
    """Answer prompts, with memories under a budget or without any; what is resident then."""
    lm = load(model, memory_budget=budget, tiers=None if budget else "disk")
    for text in make_documents(answers, 30, seed=3):
        list(lm.stream(text, "fetched" if budget else "none", max_tokens=2))
    result = {
        "resident": resident_memory(),
        "fetched": lm.bank.config.fetch_size() * lm.dtype.size,
        "held": lm.bank.bytes_held,
    }
    lm.bank.close()
    return result


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=options))
