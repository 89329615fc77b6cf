"""What is left of a topic whose blocks were removed, against a model that never saw it.

Two topics of the atlas are removed: a leaf's block, and a level-1 subtree with all its blocks. What
the rest of the model still knows is measured by ``evaluation.leakage``: by the anchor alone, the
generic memory, the path with removed blocks, sibling blocks and the parent's. Each against a twin
that was trained with the same steps on the corpus without the topics' facts (``leakage_runs``).

    python -m benchmarks.studies.leakage --json leakage.json --png leakage.png
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_hiermem.errors import InputError

from ..harness import Row, main
from .leakage_runs import SMOKE_STEPS, STEPS, Topic, run_all

if TYPE_CHECKING:
    from mlx_hiermem.evaluation.leakage import Known, Leakage

NAME = "leakage"
#: Seeds, questions of a topic, and candidates that an answer is ranked with.
SEEDS, QUESTIONS, CANDIDATES = 3, 100, 8
SMOKE_QUESTIONS = 4


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first of the seeds")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"how many (default: {SEEDS})")
    parser.add_argument(
        "--steps", type=int, metavar="N",
        help=f"of each anchor, and of the memories on it (default: {STEPS})",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, metavar="N", help=f"questions of a topic (default: {QUESTIONS})"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs side by side (default: one for each processor)"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figure here")


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Rows ``leakage.MEASURE@TOPIC-CONDITION``: means over the seeds, the never-model's beside."""
    for name in ("seeds", "steps", "limit", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; expected at least 1")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}; expected at least 0")
    count = args.seeds or (1 if args.smoke else SEEDS)
    seeds = range(args.seed, args.seed + count)
    steps = args.steps or (SMOKE_STEPS if args.smoke else STEPS)
    limit = args.limit or (SMOKE_QUESTIONS if args.smoke else QUESTIONS)
    topics, found = run_all(seeds, steps, limit, CANDIDATES, args.jobs, args.smoke)
    about = f"{steps} + {steps} steps, seeds {seeds[0]} to {seeds[-1]}"
    for topic in topics:
        each = [found[seed][topic.name] for seed in seeds]
        print(f"{_title(topic, each[0], about)}\n")
        print("\n".join(mean_over_seeds(each).sentences()), end="\n\n")
        yield from _rows(topic, each)
    if args.png is not None:
        draw(topics, found, args.png)


def _title(topic: Topic, leakage: Leakage, about: str) -> str:
    blocks = ", ".join(f"{level}:{cluster}" for level, cluster in topic.blocks[:1])
    more = f" and {len(topic.blocks) - 1} blocks below" if len(topic.blocks) > 1 else ""
    return f"{topic.name} ({blocks}{more}): {leakage.questions} questions, {about}"


def mean_over_seeds(each: Sequence[Leakage]) -> Leakage:
    """What the mean over the seeds says of each question, so that questions stay the sample."""
    import numpy as np

    from mlx_hiermem.evaluation.leakage import Known, Leakage

    def mean(found: Sequence[Known]) -> Known:
        ranks = [one.ranks for one in found if one.ranks is not None]
        losses = [one.losses for one in found if one.losses is not None]
        return Known(
            np.mean([one.exact for one in found], axis=0),
            np.mean(ranks, axis=0) if ranks else None,
            np.mean(losses, axis=0) if losses else None,
        )

    def means(found: Sequence[Mapping[str, Known]]) -> dict[str, Known]:
        return {name: mean([one[name] for one in found]) for name in found[0]}

    first = each[0]
    return Leakage(
        first.questions,
        first.elsewhere,
        first.chance,
        means([one.known for one in each]),
        means([one.never or {} for one in each]),
    )


def _rows(topic: Topic, each: Sequence[Leakage]) -> Iterator[Row]:
    whole = mean_over_seeds(each)
    for name in whole.known:
        left = {True: "something is left", False: "nothing is left", None: "too few questions"}
        verdict = "" if name == "before" else f"; {left[whole.verdict(name)]}"
        for measure in ("exact", "rank", "loss"):
            ours = [one.known[name].to_dict()[measure] for one in each]
            theirs = [(one.never or {})[name].to_dict()[measure] for one in each]
            if ours[0] is None:
                continue
            yield Row(
                f"leakage.{measure}@{topic.name}-{name.replace(' ', '-')}",
                sum(ours) / len(ours),
                "",
                f"{_spread(ours)}; never saw: {sum(theirs) / len(theirs):.3f}, "
                f"{_spread(theirs)}{verdict}",
            )


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def draw(topics: Sequence[Topic], found: Mapping[int, Mapping[str, Leakage]], path: Path) -> None:
    """Exact answers under each condition, of the model and of its twin; bars of all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, panels = plt.subplots(1, len(topics), figsize=(12, 4.2), sharey=True)
    for axes, topic in zip(np.atleast_1d(panels), topics, strict=True):
        each = [seed[topic.name] for seed in found.values()]
        names = list(each[0].known)
        places = np.arange(len(names))
        for offset, label, color in ((-0.2, "saw the topic", "#2F6B8F"), (0.2, "never", "#C9CED1")):
            shares = 100 * np.array(
                [
                    [
                        (one.known if offset < 0 else one.never or {})[name].exact.mean()
                        for name in names
                    ]
                    for one in each
                ]
            )
            mean = shares.mean(axis=0)
            # The mean of equal numbers may be off by a bit.
            spread = np.maximum([mean - shares.min(axis=0), shares.max(axis=0) - mean], 0)
            axes.bar(places + offset, mean, 0.38, yerr=spread, capsize=2, label=label, color=color)
        axes.set_xticks(places, names, rotation=30, ha="right")
        axes.set_title(
            f"{topic.name} removed: {len(topic.blocks)} blocks, {each[0].questions} questions"
        )
        axes.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(panels)[0].set_ylabel("exact answers, %")
    np.atleast_1d(panels)[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main(NAME, measure, options=options))
