"""Memory against documents in the context (RAG), same encoder, same store: the paper's table 3.

``python -m benchmarks.studies.rag [--smoke] [--json FILE] [--png FILE]``. Before the question stand
documents of the training corpus, the nearest last: ``rag1`` and ``rag3`` the nearest one and three,
``oracle`` the nearest that states the fact, ``misled`` the nearest that states another. They
are asked on three models: ``bare`` (the anchor of the same tokens), ``none`` (the memory's anchor,
memory off) and ``memory`` (fetched by the question). ``-eot`` puts an end-of-text token after each
document, as packing does; else a space. Rows for a way W, such as ``bare+rag1`` or ``memory``:

- ``rag.accuracy@W``, ``rag.loss@W``, and ``rag.bucketB@W``, by how frequent the fact is;
- ``rag.flops@W`` and ``rag.flops_search@W``: operations of a question ÷ those of ``bare``, without
  and with those of finding the memory or the documents, all documents compared (``asking/flops``);
- ``rag.time@W``: measured time ÷ that of ``bare``, with finding and with decoding;
- ``rag.retrieved@1``, ``rag.retrieved@3``: how often the fact is in the documents.

The atlas was trained on sentences that saw no other, so neither anchor has learnt to read a
document in its context: ``oracle`` against ``misled`` shows how much is read all the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence

from mlx_hiermem.backend import backend_name, keep_freed_memory, preload_blas

preload_blas()

import numpy as np  # noqa: E402  (after the BLAS)

from mlx_hiermem import scoring  # noqa: E402
from mlx_hiermem.commands.tables import table  # noqa: E402
from mlx_hiermem.engine import MemoryLM  # noqa: E402
from mlx_hiermem.errors import InputError  # noqa: E402
from mlx_hiermem.evaluation.names import corpus_texts  # noqa: E402

from ..harness import Row, interleave, main, ratio  # noqa: E402
from .asking import corpus, figures, flops  # noqa: E402
from .asking.store import Store  # noqa: E402
from .asking.table import (  # noqa: E402
    Asked,
    Mean,
    Study,
    Way,
    ask_all,
    both_rows,
    mean,
    open_study,
    row,
    same,
    tuples,
)
from .asking.table import options as shared_options  # noqa: E402

NAME = "rag"
LIMIT = 500
#: Questions that are timed as one, and rounds.
_TIMED, _ROUNDS = 12, 7
_SEPARATORS = {"": " ", "-eot": None}  # None: the tokenizer's own


def options(parser: argparse.ArgumentParser) -> None:
    shared_options(parser)
    parser.add_argument(
        "--corpus", nargs="+", metavar="PATH",
        help="the store of a model other than the atlas: files, folders, or a corpus folder; "
        "there is no oracle then",
    )  # fmt: skip


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    with open_study(args, LIMIT) as study:
        store, facts = open_store(study, args)
        vectors = study.lm.encoder.encode([prompt for prompt, _ in study.pairs])
        chosen = choose(store, vectors, facts)
        models = {"none": (study.lm, same("none", study))}
        models["memory"] = (study.lm, tuples(study.paths))
        if study.control is not None:
            models = {"bare": (study.control, same("none", study)), **models}
        ways = make_ways(study, models, store, chosen)
        found = ask_all(ways)
        base = next(iter(models))
        flops = count_flops(study, ways, store, base)
        times = time_all(study, models, store, args.smoke)
        print(
            f"{study.home.name}: {len(study.questions)} questions, {len(store.texts)} documents; "
            f"{backend_name()}"
        )
        print(show(study, found, flops, args.seed), end="\n\n")
        for name, asked in found.items():
            yield from both_rows("rag", name, asked, args.seed, name)
            for bucket, one in enumerate(by_bucket(study, asked, args.seed)):
                if one.count:
                    about = f"exact answers; {name}; {study.buckets[bucket]!r}"
                    yield row(f"rag.bucket{bucket}@{name}", one, about)
            for what, value in zip(("flops", "flops_search"), flops[name], strict=True):
                yield Row(f"rag.{what}@{name}", value, "", f"FLOPs of a question ÷ {base}")
        for name in times:
            if name != base:
                about = f"{_TIMED} questions, one after another; {backend_name()}"
                yield ratio(f"rag.time@{name}", times, name, base, "", about)
        if facts is not None:
            right = store.facts[chosen["rag3"]] == np.asarray(facts)[:, None]
            for count in (1, 3):
                values = mean(right[:, -count:].any(1), args.seed)
                yield row(f"rag.retrieved@{count}", values, "the fact is in the documents")
        if args.png is not None:
            draw(study, found, flops, args)


def open_store(study: Study, args: argparse.Namespace) -> tuple[Store, list[int] | None]:
    """The store, and the fact of each question where documents tell theirs.

    Raises:
        InputError: nobody says what the store is.
    """
    if args.corpus:
        texts = sorted({text for text in corpus_texts(args.corpus) if text.strip()})
        return Store.of(study.lm.encoder, texts), None
    if not corpus.is_atlas(study):
        raise InputError(f"{study.home}: name the documents that it was trained on with --corpus")
    facts = corpus.fact_numbers(study.questions)
    some = [*facts, *range(0, len(study.every), 50)] if args.smoke else None
    texts, stated = corpus.atlas_store(some)
    return Store.of(study.lm.encoder, texts, stated), facts


def choose(store: Store, vectors: np.ndarray, facts: Sequence[int] | None) -> dict[str, np.ndarray]:
    """Name -> (N, count) documents for each question, the nearest last."""
    nearest = store.nearest(vectors, 3)[:, ::-1]
    found = {"rag1": nearest[:, -1:], "rag3": nearest}
    if facts is not None:
        found["oracle"] = store.nearest_of(vectors, facts, True)[:, None]
        found["misled"] = store.nearest_of(vectors, facts, False)[:, None]
    return found


def make_ways(
    study: Study,
    models: Mapping[str, tuple[MemoryLM, Sequence]],
    store: Store,
    chosen: Mapping[str, np.ndarray],
) -> dict[str, Way]:
    """Every model without documents, and with each choice of them."""
    ways: dict[str, Way] = {}
    for model, (lm, memories) in models.items():
        ways[model] = lm, study.pairs, memories, None
        for choice, documents in chosen.items():
            for suffix, separator in _SEPARATORS.items():
                separator = separator or lm.tokenizer.eos_token
                pairs = [
                    (with_documents(store, numbers, prompt, separator), continuation)
                    for numbers, (prompt, continuation) in zip(documents, study.pairs, strict=True)
                ]
                ways[f"{model}+{choice}{suffix}"] = lm, pairs, memories, None
    return ways


def with_documents(store: Store, numbers: Sequence[int], prompt: str, separator: str) -> str:
    """A question after some documents."""
    return "".join(store.texts[number] + separator for number in numbers) + prompt


# ---- what it costs ---------------------------------------------------------------------


def count_flops(
    study: Study, ways: Mapping[str, Way], store: Store, base: str
) -> dict[str, tuple[float, float]]:
    """Way -> operations of all its questions ÷ those of ``base``, without and with finding."""
    config, width = study.lm.bank.config, study.tree.width
    sizes = flops.sizes_of(study.lm.model.anchor, config.fetch_size())
    totals = {}
    for name, (lm, pairs, _, _) in ways.items():
        memory, answering = name.startswith("memory"), 0
        for context, continuation in pairs:
            tokens, start = scoring.split_tokens(lm, context, continuation)
            answering += flops.answering(sizes, start, len(tokens) - start, memory)
        finding = flops.routing(width, config.branching, config.levels) * memory
        finding += flops.searching(width, len(store.texts)) * ("+" in name)
        totals[name] = answering, answering + len(pairs) * finding
    return {name: tuple(total / totals[base][0] for total in pair) for name, pair in totals.items()}


def time_all(
    study: Study, models: Mapping[str, tuple[MemoryLM, Sequence]], store: Store, smoke: bool
) -> dict:
    """Times of answering some questions one by one, from the question's text to the answer's."""
    step = max(1, len(study.pairs) // _TIMED)
    asked = [
        (*pair, len(tokens) - start)
        for pair in study.pairs[::step][:_TIMED]
        for tokens, start in [scoring.split_tokens(study.lm, *pair)]
    ]

    def task(model: str, count: int) -> Callable[[], None]:
        lm = models[model][0]
        memory = "fetched" if model == "memory" else "none"

        def run() -> None:
            for prompt, _, length in asked:
                context = prompt
                if count:
                    numbers = store.nearest(lm.encoder.encode([prompt]), count)[0][::-1]
                    context = with_documents(store, numbers, prompt, " ")
                lm.generate(context, memory, length, route_on=prompt)

        return run

    names = {model: task(model, 0) for model in models}
    names |= {
        f"{model}+rag{count}": task(model, count)
        for model in models
        if model != "none"
        for count in (1, 3)
    }
    return interleave(names, 2 if smoke else _ROUNDS)


# ---- table and figure ------------------------------------------------------------------


def by_bucket(study: Study, asked: Asked, seed: int) -> list[Mean]:
    """Accuracy in each bucket."""
    place = np.array([question.bucket for question in study.questions])
    return [mean(asked.right[place == bucket], seed) for bucket in range(len(study.buckets))]


def show(study: Study, found: Mapping[str, Asked], flops: Mapping[str, tuple], seed: int) -> str:
    """The table: a row for each way."""
    rows = []
    for name, asked in found.items():
        shares = [
            f"{100 * one.value:.1f}" if one.count else "-"
            for one in by_bucket(study, asked, seed)
        ]  # fmt: skip
        rows.append(
            [
                name, mean(asked.right, seed).show(), *shares, f"{asked.nats.mean():.3f}",
                *(f"{value:.2f}" for value in flops[name]),
            ]
        )  # fmt: skip
    return table(["way", "exact, %", *study.buckets, "nats", "FLOPs", "with search"], rows)


def draw(
    study: Study, found: Mapping[str, Asked], flops: Mapping[str, tuple], args: argparse.Namespace
) -> None:
    """Accuracy and operations of every way; documents with a space behind them."""
    ways = [name.split("+") for name in found if not name.endswith("-eot")]
    models = list(dict.fromkeys(way[0] for way in ways))
    choices = list(dict.fromkeys("+".join(way[1:]) for way in ways))
    accuracy, cost = {}, {}
    for model in models:
        names = [f"{model}+{choice}" if choice else model for choice in choices]
        accuracy[model] = [mean(found[name].right, args.seed) for name in names]
        cost[model] = [Mean(*[flops[name][0]] * 3, 1) for name in names]
    places = [choice or "no documents" for choice in choices]
    panels = [
        figures.Panel("accuracy", "", "exact answers, %", accuracy, places, bars=True),
        figures.Panel(
            "operations", "", "FLOPs of a question ÷ bare", cost, places, bars=True, scale=1
        ),
    ]
    figures.draw(panels, args.png)


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main(NAME, measure, options=options))
