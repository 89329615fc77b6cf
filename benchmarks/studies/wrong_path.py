"""What a wrong path costs, by how far up and by how near it is wrong: a question of the reviewers.

``python -m benchmarks.studies.wrong_path [--smoke] [--json FILE] [--png FILE]``. A path that goes
wrong at level l has the right clusters above it, and from l on others. Never taken is a cluster in
which the fact was trained. Rows ``wrong_path.accuracy@W`` and ``wrong_path.loss@W``, W one of:

- ``right``, ``none``, ``generic``;
- ``levelL-random``: wrong at level L, a random cluster and a random leaf below it;
- ``levelL-N``: wrong at level L, its Nth nearest wrong cluster, and greedily down from there;
- ``blockedL``: the right path with its block of level L alone blocked.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mlx_hiermem.backend import backend_name, keep_freed_memory, preload_blas

preload_blas()

import numpy as np  # noqa: E402  (after the BLAS)

from ..harness import Row, main  # noqa: E402
from .asking import figures  # noqa: E402
from .asking.paths import NO_CLUSTER, complete, random_below, wrong_clusters  # noqa: E402
from .asking.table import (  # noqa: E402
    Study,
    Way,
    ask_all,
    both_rows,
    mean,
    open_study,
    options,
    same,
    show,
    tuples,
)

NAME = "wrong_path"
LIMIT = 1000


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    with open_study(args, LIMIT) as study:
        found = ask_all(ways(study, args.seed))
        print(f"{study.home.name}: {len(study.questions)} questions; {backend_name()}", end="\n\n")
        show("Facts with a wrong path", ["path"], found, args.seed)
        for name, asked in found.items():
            yield from both_rows("wrong_path", name, asked, args.seed, f"path {name}")
        if args.png is not None:
            levels, k = study.tree.levels, study.tree.branching
            panels = []
            for what, label, scale in (
                ("right", "exact answers, %", 100.0), ("nats", "nats per token", 1.0),
            ):  # fmt: skip
                means = {
                    name: mean(getattr(asked, what), args.seed) for name, asked in found.items()
                }
                lines = {
                    f"wrong at level {level}": [means["right"]] + [
                        means.get(f"level{level}-{n}", mean([])) for n in range(1, k)
                    ]
                    for level in range(1, levels + 1)
                }  # fmt: skip
                for name in ("none", "generic"):
                    lines[name] = [means[name]] * k
                panels.append(
                    figures.Panel(
                        "a wrong path", "how near: 0 is the right cluster", label, lines,
                        range(k), scale=scale,
                    )
                )  # fmt: skip
            figures.draw(panels, args.png)


def ways(study: Study, seed: int) -> dict[str, Way]:
    """Every path that is tried; a question that has no such path is left out of that one."""
    lm, tree, pairs = study.lm, study.tree, study.pairs
    vectors = lm.encoder.encode([prompt for prompt, _ in pairs])
    trained = [question.leaves for question in study.questions]
    rng = np.random.default_rng(seed)
    found: dict[str, Way] = {
        "right": (lm, pairs, tuples(study.paths), None),
        "none": (lm, pairs, same("none", study), None),
        "generic": (lm, pairs, same("generic", study), None),
    }
    for level in lm.bank.config.memory_levels:

        def blocked(path: tuple[int, ...], level: int = level):
            return lm.fetch(path, blocked=[(level, path[level - 1])]).memory

        found[f"blocked{level}"] = lm, pairs, tuples(study.paths), blocked
    for level in range(tree.levels, 0, -1):
        wrong = wrong_clusters(tree, vectors, study.paths, level, trained)
        counts = (wrong != NO_CLUSTER).sum(1)
        has = np.flatnonzero(counts)
        if len(has):
            drawn = wrong[has, rng.integers(counts[has])]
            paths = random_below(rng, tree, level, drawn)
            found[f"level{level}-random"] = lm, [pairs[i] for i in has], tuples(paths), None
        for near in range(wrong.shape[1]):
            has = np.flatnonzero(counts > near)
            if len(has):
                paths = complete(tree, vectors[has], level, wrong[has, near])
                found[f"level{level}-{near + 1}"] = lm, [pairs[i] for i in has], tuples(paths), None
    return found


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main(NAME, measure, options=options))
