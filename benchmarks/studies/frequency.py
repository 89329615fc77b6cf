"""Accuracy by how frequent a fact is in the training corpus: the paper's figure 1.

``python -m benchmarks.studies.frequency [--smoke] [--json FILE] [--png FILE]``. Rows, for bucket B
(0 the most frequent) and condition C: ``frequency.facts@B-C``, the model's held-out questions in
their buckets; ``frequency.atomic@B-C``, the 118 atomic numbers in buckets by how often the elements
are named in the training corpus (``--corpus``; for the atlas it is made anew). Conditions: none,
generic, fetched, and ``anchor_same_tokens``, the bare anchor of the same tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from mlx_hiermem.backend import backend_name, keep_freed_memory, preload_blas

preload_blas()

import numpy as np  # noqa: E402  (after the BLAS)

from mlx_hiermem.commands.tables import table  # noqa: E402
from mlx_hiermem.evaluation import atomic  # noqa: E402
from mlx_hiermem.evaluation.names import corpus_texts  # noqa: E402
from mlx_hiermem.evaluation.questions import Question  # noqa: E402

from ..harness import Row, main  # noqa: E402
from .asking import figures  # noqa: E402
from .asking.corpus import atlas_texts, is_atlas  # noqa: E402
from .asking.table import (  # noqa: E402
    Mean,
    Study,
    ask_all,
    evenly,
    mean,
    open_study,
    row,
    same,
    tuples,
)
from .asking.table import options as shared_options  # noqa: E402

NAME = "frequency"
LIMIT = 4000
#: Of the corpus of the atlas, in a smoke run.
SMOKE_TEXTS = 5000
CONDITIONS = ("none", "generic", "fetched", "anchor_same_tokens")


def options(parser: argparse.ArgumentParser) -> None:
    shared_options(parser)
    parser.add_argument(
        "--corpus", nargs="+", metavar="PATH",
        help="the training corpus of a model other than the atlas, as evaluate --task atomic "
        "takes it; without it no atomic numbers are asked",
    )  # fmt: skip


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    with open_study(args, LIMIT) as study:
        parts = {"facts": (study.questions, study.buckets, ask_facts(study))}
        texts = training_texts(study, args)
        if texts is not None:
            asked, buckets = atomic.questions(atomic.count_elements(texts))
            asked = evenly(asked, args.limit or (10 if args.smoke else len(asked)))
            hits = atomic.answer(study.lm, asked, study.control, CONDITIONS)
            parts["atomic"] = asked, buckets, hits
        print(f"{study.home.name}: {len(study.questions)} questions; {backend_name()}", end="\n\n")
        panels = []
        for name, (asked, buckets, hits) in parts.items():
            means = by_bucket(asked, len(buckets), hits, args.seed)
            print(f"{name}: exact answers, %\n{show(asked, buckets, means)}", end="\n\n")
            for bucket in range(len(buckets)):
                about = f"{name} of bucket {buckets[bucket]!r}, {spread_of(asked, bucket)} times"
                for condition, found in means.items():
                    if found[bucket].count:
                        yield row(f"frequency.{name}@{bucket}-{condition}", found[bucket], about)
            panels.append(figures.Panel(name, "", "exact answers, %", means, buckets, bars=True))
        if args.png is not None:
            figures.draw(panels, args.png)


def ask_facts(study: Study) -> dict[str, np.ndarray]:
    """Condition -> (N,) bool."""
    ways = {
        "none": (study.lm, study.pairs, same("none", study), None),
        "generic": (study.lm, study.pairs, same("generic", study), None),
        "fetched": (study.lm, study.pairs, tuples(study.paths), None),
    }
    if study.control is not None:
        ways[CONDITIONS[-1]] = (study.control, study.pairs, same("none", study), None)
    return {name: asked.right for name, asked in ask_all(ways).items()}


def training_texts(study: Study, args: argparse.Namespace) -> Iterable[str] | None:
    """The texts that the model was trained on; None where nobody says."""
    if args.corpus:
        return corpus_texts(args.corpus)
    if is_atlas(study):
        return islice(atlas_texts(), SMOKE_TEXTS) if args.smoke else atlas_texts()
    print("no atomic numbers: --corpus names the training corpus, in which elements are counted")
    return None


def by_bucket(
    asked: Sequence[Question], buckets: int, hits: Mapping[str, np.ndarray], seed: int
) -> dict[str, list[Mean]]:
    """Condition -> the mean of each bucket."""
    place = np.array([question.bucket for question in asked])
    return {
        condition: [mean(right[place == bucket], seed) for bucket in range(buckets)]
        for condition, right in hits.items()
    }


def spread_of(asked: Sequence[Question], bucket: int) -> str:
    """The smallest and the largest count in a bucket."""
    counts = [question.count for question in asked if question.bucket == bucket]
    return f"{min(counts)}-{max(counts)}" if counts else ""


def show(asked: Sequence[Question], buckets: Sequence[str], means: dict[str, list[Mean]]) -> str:
    """The table: a row for each bucket."""
    rows = [
        (
            name, next(iter(means.values()))[bucket].count, spread_of(asked, bucket),
            *(found[bucket].show() for found in means.values()),
        )
        for bucket, name in enumerate(buckets)
    ]  # fmt: skip
    return table(["bucket", "n", "in the corpus", *means], rows)


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main(NAME, measure, options=options))
