"""Accuracy as more and more of the bank is blocked: the paper's figure 6b.

``python -m benchmarks.studies.blocking``. Blocked are N of the k
subtrees of level 1 (and of what was added to the bank), each with all that is below it: N/k of the
bank. Rows, for N from 0 to k:

- ``blocking.accuracy@nearest-N``: the N subtrees that are nearest to the question; what is blocked
  reads as zeros. At N = 1 the best-matching 1/k of the bank is blocked, as in the paper;
- ``blocking.accuracy@family-N``: the same N for all questions of a family: those that most of its
  questions are routed to;
- ``blocking.accuracy@random-N``: N random ones, the control, the mean of some orders;
- ``blocking.accuracy@rerouted-N``: as nearest, but the question goes to the nearest open subtree;
- ``blocking.accuracy@blockL``: the one block of level L on the path.

With ``--family`` only the questions of one family are asked, as the paper asks for elements.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence

from mlx_hiermem.backend import backend_name, keep_freed_memory, preload_blas

preload_blas()

import numpy as np  # noqa: E402  (after the BLAS)

from mlx_hiermem.commands.tables import table  # noqa: E402
from mlx_hiermem.evaluation.facts import on_path  # noqa: E402
from mlx_hiermem.evaluation.questions import Question  # noqa: E402

from ..harness import Row, main  # noqa: E402
from .asking import figures  # noqa: E402
from .asking.paths import children, complete  # noqa: E402
from .asking.table import Study, Way, ask_all, mean, open_study, row, same, tuples  # noqa: E402
from .asking.table import options as shared_options  # noqa: E402

NAME = "blocking"
LIMIT = 1000
#: Random orders that the control is the mean of.
ORDERS = 20


def options(parser: argparse.ArgumentParser) -> None:
    shared_options(parser)
    parser.add_argument("--family", metavar="NAME", help="ask only questions of this family")


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    with open_study(args, LIMIT, args.family) as study:
        curves, single = measure_all(study, args.seed)
        about = f"{len(study.questions)} questions" + (f" of {args.family}" if args.family else "")
        print(f"{study.home.name}: {about}; {backend_name()}", end="\n\n")
        k = study.tree.roots
        means = {
            name: [mean(values, args.seed) for values in curve] for name, curve in curves.items()
        }
        rows = [(f"{n}/{k}", *(found[n].show() for found in means.values())) for n in range(k + 1)]
        print("Exact answers, %, with a share of the bank blocked")
        print(table(["blocked", *means], rows), end="\n\n")
        for name, found in means.items():
            for n, one in enumerate(found):
                yield row(f"blocking.accuracy@{name}-{n}", one, f"exact answers; {n}/{k} blocked")
        config = study.lm.bank.config
        for name, values in single.items():
            about = "exact answers"
            if name.startswith("block"):
                size = config.block_size(int(name.removeprefix("block")))
                about += f"; {size / config.bank_size():.6f} of the bank blocked"
            yield row(f"blocking.accuracy@{name}", mean(values, args.seed), about)
        if args.png is not None:
            for name in ("none", "generic"):
                means[name] = [mean(single[name], args.seed)] * (k + 1)
            figures.draw(
                [
                    figures.Panel(
                        "blocked memories", "share of the bank that is blocked, %",
                        "exact answers, %", means, [100 * n / k for n in range(k + 1)],
                    )
                ],
                args.png,
            )  # fmt: skip


def measure_all(
    study: Study, seed: int
) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
    """Curves: name -> (N,) shares for each number of blocked subtrees; and single ways.

    A question sees of a blocked subtree only whether its own path runs through it. So it is asked
    twice, with its path open and blocked, and the curves of one memory are put together from that.
    """
    lm, tree, pairs, paths = study.lm, study.tree, study.pairs, study.paths
    k, vectors = tree.roots, lm.encoder.encode([prompt for prompt, _ in pairs])
    near = children(tree, vectors, np.zeros(len(pairs), np.int64), 1).argsort(1, kind="stable")

    def blocked(path: tuple[int, ...]):
        return lm.fetch(path, blocked=on_path(lm, path)).memory

    ways: dict[str, Way] = {
        "none": (lm, pairs, same("none", study), None),
        "generic": (lm, pairs, same("generic", study), None),
        "open": (lm, pairs, tuples(paths), None),
        "blocked": (lm, pairs, tuples(paths), blocked),
    }
    for level in lm.bank.config.memory_levels:

        def one(path: tuple[int, ...], level: int = level):
            return lm.fetch(path, blocked=[(level, path[level - 1])]).memory

        ways[f"block{level}"] = lm, pairs, tuples(paths), one
    for n in range(1, k):
        ways[f"rerouted-{n}"] = lm, pairs, tuples(complete(tree, vectors, 1, near[:, n])), None
    found = {name: asked.right for name, asked in ask_all(ways).items()}
    rng = np.random.default_rng(seed)
    orders = [np.tile(rng.permutation(k), (len(pairs), 1)) for _ in range(ORDERS)]
    curves = {
        "nearest": blocked_curve(near, paths, found["open"], found["blocked"]),
        "family": blocked_curve(
            family_order(study, k), paths, found["open"], found["blocked"]
        ),
        "random": [
            np.mean(one, axis=0)
            for one in zip(
                *(blocked_curve(o, paths, found["open"], found["blocked"]) for o in orders),
                strict=True,
            )
        ],
        "rerouted": [
            found["open"], *(found[f"rerouted-{n}"] for n in range(1, k)), found["blocked"],
        ],
    }  # fmt: skip
    names = ["none", "generic", *(f"block{level}" for level in lm.bank.config.memory_levels)]
    return curves, {name: found[name] for name in names}


def blocked_curve(
    order: np.ndarray, paths: np.ndarray, is_open: np.ndarray, is_blocked: np.ndarray
) -> list[np.ndarray]:
    """What is right with the first n = 0 ... k subtrees of each question's order (N, k) blocked."""
    place = (order == paths[:, :1]).argmax(1)  # when the question's own subtree is blocked
    return [np.where(place < n, is_blocked, is_open) for n in range(order.shape[1] + 1)]


def family_order(study: Study, k: int) -> np.ndarray:
    """(N, k): for each question the level-1 clusters, those of most of its family first."""
    every = study.lm.assign([question.prompt for question in study.every])[:, 0]
    orders = _orders(study.every, every.tolist(), k)
    return np.array([orders[question.family] for question in study.questions])


def _orders(every: Sequence[Question], clusters: Sequence[int], k: int) -> dict[str, list[int]]:
    counts: dict[str, Counter[int]] = {}
    for question, cluster in zip(every, clusters, strict=True):
        counts.setdefault(question.family, Counter())[cluster] += 1
    return {
        family: sorted(range(k), key=lambda cluster: (-count[cluster], cluster))
        for family, count in counts.items()
    }


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main(NAME, measure, options=options))
