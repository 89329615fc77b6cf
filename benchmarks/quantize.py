"""What a bank loses and gains in fewer bits: size, fetch time, perplexity, facts.

``python -m benchmarks.quantize`` quantises the atlas, asks its held-out questions with each bank,
and fetches from banks with the blocks of the paper's 160M anchor (about 0.5 GB). What it writes is
in a folder of its own, which is removed.

Notable: facts are asked as ``evaluate --task facts`` asks them, so the figures are the same.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_hiermem.backend import backend_name, preload_blas
from mlx_hiermem.errors import InputError

preload_blas()

import numpy as np  # noqa: E402  (after the BLAS)
from tqdm import tqdm  # noqa: E402

from mlx_hiermem import load, scoring  # noqa: E402
from mlx_hiermem.commands.tables import table  # noqa: E402
from mlx_hiermem.engine import MemoryLM  # noqa: E402
from mlx_hiermem.evaluation import facts  # noqa: E402
from mlx_hiermem.evaluation.questions import Question, read_questions  # noqa: E402
from mlx_hiermem.models import find_model  # noqa: E402

from . import fetch_bank  # noqa: E402
from .harness import (  # noqa: E402
    Row,
    Times,
    interleave,
    main,
    model_option,
    ratio,
    show_seconds,
)
from .quantize_banks import Bank, Fetches, Reading, make_banks  # noqa: E402

NAME = "quantize"
# Branching of the bank with the paper's blocks: few of them, each as large as the paper's.
_BRANCHING = 3
# Fetches of the small blocks of the atlas that are timed as one.
_AT_ONCE = 32


def options(parser: argparse.ArgumentParser) -> None:
    model_option(parser)
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only N of its questions, evenly drawn"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write the banks (default: the temporary folder)"
    )


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    limit = args.limit if args.limit is not None else (24 if args.smoke else None)
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; expected at least 1")
    try:
        folder = Path(tempfile.mkdtemp(prefix="quantize-", dir=args.folder))
    except OSError as error:
        raise InputError(f"--folder {args.folder}: cannot be written ({error.strerror})") from None
    try:
        yield from worth(folder / "model", find_model(args.model), limit, 3 if args.smoke else 40)
        yield from large_blocks(folder / "large", args.smoke)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- what a bank is worth --------------------------------------------------------------


@dataclass(frozen=True)
class Worth:
    """Perplexity per token of the questions' texts, and of their continuations alone; the share of
    answers that are exactly right."""

    texts: float
    answers: float
    facts: float


def worth(folder: Path, model: Path, limit: int | None, rounds: int) -> Iterator[Row]:
    """Size, fetch time, perplexity and facts of a model's bank for each quantisation."""
    folder.mkdir(parents=True)
    base, banks = make_banks(model / "memory", folder)
    questions, _ = read_questions(model / facts.QUESTIONS_FILE)
    if limit is not None:
        step = max(1, len(questions) // limit)
        questions = questions[::step][:limit]
    times = _fetch_times(banks, rounds)
    found = {}
    with tqdm(total=(len(banks) + 1) * len(questions), unit="question", disable=None) as bar:
        for name, bank in banks.items():
            bar.set_description(name)
            lm = load(model, bank=bank.memory)
            found[name] = ask(lm, questions, "fetched", bar)
            if name == base:
                bar.set_description("no memory")
                without = ask(lm, questions, "none", bar)
            lm.bank.close()
    print(f"{model.name}: {len(questions)} held-out questions; {backend_name()}")
    print(_worth_table(banks, times, found, without, base), end="\n\n")
    for name, one in found.items():
        bank = banks[name]
        about = f"{len(questions)} questions"
        yield Row(
            f"quantize.facts@{name}", one.facts, "",
            f"share of exact answers, {100 * without.facts:.1f} % without memory; {about}",
        )  # fmt: skip
        yield Row(f"quantize.perplexity@{name}", one.texts, "", f"prompt and answer; {about}")
        yield Row(f"quantize.answer_perplexity@{name}", one.answers, "", f"the answer; {about}")
        if name == base:
            continue
        yield Row(
            f"quantize.size@{name}", bank.bank_bytes / banks[base].bank_bytes, "",
            f"{bank.bank_bytes:,} bytes ÷ {banks[base].bank_bytes:,}; so are the bytes of a fetch",
        )  # fmt: skip
        yield ratio(
            f"quantize.fetch@{name}", times, name, base, "",
            f"{_AT_ONCE} fetches, warm, of {bank.fetch_bytes:,} bytes each",
        )  # fmt: skip


def ask(lm: MemoryLM, questions: Sequence[Question], memory: str, bar: tqdm) -> Worth:
    """Ask every question with the memory on the path of its prompt, or with "none"."""
    hits, nats, tokens = 0, 0.0, 0
    for batch, memories in _batches(lm, questions, memory):
        pairs = [(question.prompt, question.continuation) for question in batch]
        for pair, (logprob, greedy) in zip(
            pairs, scoring.score(lm, pairs, memories), strict=True
        ):  # fmt: skip
            all_tokens, start = scoring.split_tokens(lm, *pair)
            nats, tokens, hits = nats - logprob, tokens + len(all_tokens) - start, hits + greedy
        bar.update(len(batch))
    # Texts of about one length follow each other, so that little is padding.
    texts = sorted((one.prompt + one.continuation for one in questions), key=len)
    return Worth(lm.perplexity(texts, memory), math.exp(nats / tokens), hits / len(questions))


def _batches(lm: MemoryLM, questions: Sequence[Question], memory: str) -> Iterator[tuple]:
    """Batches as ``facts.answer`` makes them, with a memory for each question."""
    paths: list = ["none"] * len(questions)
    size = facts.BATCH
    if memory == "fetched":
        found, _ = lm.tree.assign(lm.encoder.encode([question.prompt for question in questions]))
        paths = [tuple(path) for path in found.tolist()]
        if len(set(paths)) > 1:
            one = lm.bank.config.fetch_size() * lm.dtype.size
            size = min(size, max(1, facts.BATCH_BYTES // one))
    order = sorted(range(len(questions)), key=lambda i: (paths[i], len(questions[i].prompt)))
    last, fetched = None, None
    for start in range(0, len(order), size):
        chosen, memories = order[start : start + size], []
        for i in chosen:
            if paths[i] != last:
                last, fetched = paths[i], lm.fetch(paths[i]).memory
            memories.append(fetched)
        yield [questions[i] for i in chosen], memories


def _fetch_times(banks: Mapping[str, Bank], rounds: int) -> dict[str, Times]:
    """Seconds of ``_AT_ONCE`` fetches from the page cache."""
    opened = {name: Fetches(bank) for name, bank in banks.items()}

    def task(fetches: Fetches) -> Callable[[], None]:
        return lambda: fetches.fetch(_AT_ONCE)

    times = interleave({name: task(one) for name, one in opened.items()}, rounds, warmup=3)
    for one in opened.values():
        one.bank.close()
    return times


def _worth_table(
    banks: Mapping[str, Bank],
    times: Mapping[str, Times],
    found: Mapping[str, Worth],
    without: Worth,
    base: str,
) -> str:
    def worth_of(one: Worth) -> list[str]:
        return [f"{one.texts:.3f}", f"{one.answers:.4f}", f"{100 * one.facts:.2f}"]

    header = ["bank", "how", "MB", "fetch bytes", "fetch", f"÷ {base}", "error %"]
    header += ["perplexity", "of answers", "facts %"]
    rows = []
    for name, bank in banks.items():
        packing = bank.config.packing
        ratios = np.array(times[name].seconds) / np.array(times[base].seconds)
        rows.append(
            [
                name, str(packing or bank.config.dtype), f"{bank.bank_bytes / 1e6:.2f}",
                f"{bank.fetch_bytes:,}", show_seconds(times[name].median / _AT_ONCE),
                f"{np.median(ratios):.2f}", f"{100 * bank.error:.2f}", *worth_of(found[name]),
            ]
        )  # fmt: skip
    rows.append(["no memory", "", "0", "0", "", "", "", *worth_of(without)])
    return table(header, rows)


# ---- blocks of the paper's size --------------------------------------------------------


def large_blocks(folder: Path, smoke: bool) -> Iterator[Row]:
    """Fetching blocks of the paper's 160M anchor, warm and cold, and unpacking them."""
    anchor = fetch_bank.SMOKE if smoke else fetch_bank.ANCHOR_160M
    ranks = (8, 4, 2, 0) if smoke else fetch_bank.RANKS
    config = fetch_bank.make_config(anchor, ranks, _BRANCHING)
    folder.mkdir(parents=True)
    fetch_bank.write_random_bank(folder / "whole", config, "bank of large blocks")
    base, banks = make_banks(folder / "whole", folder)
    rounds = 3 if smoke else 25
    opened = {name: Fetches(bank) for name, bank in banks.items()}
    readers = {name: Reading(bank) for name, bank in banks.items()}
    tasks: dict[str, Callable[[], object]] = {}
    for name, reading in readers.items():
        tasks[name] = opened[name].fetch
        tasks[f"{name}, read"] = reading.read
        if name != base:
            tasks[f"{name}, unpack"] = reading.unpack
    warm = interleave(tasks, rounds, warmup=_BRANCHING)

    def drop() -> None:
        for one in opened.values():
            one.drop()

    cold = interleave({name: one.fetch for name, one in opened.items()}, rounds, before=drop)
    print(_large_table(banks, warm, cold, base), end="\n\n")
    for name, bank in banks.items():
        if name == base:
            continue
        about = f"{bank.fetch_bytes / 1e6:.1f} MB against {banks[base].fetch_bytes / 1e6:.1f}"
        yield ratio(f"quantize.160M.warm@{name}", warm, name, base, "", f"warm; {about}")
        yield ratio(f"quantize.160M.cold@{name}", cold, name, base, "", f"cold; {about}")
        yield ratio(
            f"quantize.160M.read@{name}", warm, f"{name}, read", f"{base}, read", "",
            f"warm, without unpacking; {about}",
        )  # fmt: skip
        yield ratio(
            f"quantize.160M.unpack@{name}", warm, f"{name}, unpack", name, "",
            f"share of the warm fetch; {backend_name()}",
        )  # fmt: skip
    for one in opened.values():
        one.bank.close()
    for reading in readers.values():
        reading.close()


def _large_table(
    banks: Mapping[str, Bank], warm: Mapping[str, Times], cold: Mapping[str, Times], base: str
) -> str:
    rows = []
    for name, bank in banks.items():
        unpack = warm.get(f"{name}, unpack")
        cells = [name, f"{bank.bank_bytes / 1e6:.1f}", f"{bank.fetch_bytes / 1e6:.2f}"]
        for times in (warm[name], warm[f"{name}, read"], unpack, cold[name]):
            cells.append("" if times is None else show_seconds(times.median))
        for times in (warm, cold):
            ratios = np.array(times[name].seconds) / np.array(times[base].seconds)
            cells.append(f"{np.median(ratios):.2f}")
        rows.append(cells)
    header = ["bank", "MB", "MB read", "warm", "of that reads", "unpacking", "cold"]
    header += [f"warm ÷ {base}", f"cold ÷ {base}"]
    state = "dropped from the page cache" if hasattr(os, "posix_fadvise") else "not dropped: warm"
    title = f"Blocks of the paper's 160M anchor, one fetch; cold: {state}; {backend_name()}"
    return f"{title}\n{table(header, rows)}"


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=options))
