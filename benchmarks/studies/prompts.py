"""Routing and accuracy as a prompt is shortened, misspelt or worded otherwise.

``python -m benchmarks.studies.prompts [--smoke] [--json FILE] [--png FILE]``. A question of the
paper's reviewers, see also ``beams``. Rows for a variant V of the prompts:

- ``prompts.levelL@V``: the variant lands, at level L, where the fact was trained;
- ``prompts.typed@V``: exact answers to the variant, with the memory that it is routed to;
- ``prompts.routed@V``: exact answers to the full prompt, with the variant's memory: what routing
  alone costs;
- ``prompts.given@V``: exact answers to the variant, with the full prompt's memory: what the anchor
  alone costs;
- ``prompts.off@V``: exact answers to the variant, memory off.

Variants: ``full`` (held out of all training); ``left-N``, ``right-N`` (N words dropped),
``from-name`` (all words before the name dropped), ``name`` (the bare name); ``question``,
``request``, ``doubt`` (other wordings); ``training-N`` (the wordings of the training, for the
atlas); ``edits-N`` and ``name-edits-N`` (N random edits, in all of it or in the name), the mean
over three seeds of the edits.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence

from mlx_hiermem.backend import backend_name, keep_freed_memory, preload_blas

preload_blas()

import numpy as np  # noqa: E402  (after the BLAS)

from mlx_hiermem.commands.tables import table  # noqa: E402
from mlx_hiermem.evaluation.routing import lands  # noqa: E402

from ..harness import Row, main  # noqa: E402
from .asking import corpus, figures, variants  # noqa: E402
from .asking.table import (  # noqa: E402
    Study,
    Way,
    ask_all,
    mean,
    open_study,
    options,
    row,
    tuples,
)

NAME = "prompts"
LIMIT = 400
EDITS, SEEDS = (1, 2, 3), 3
ASKED = ("typed", "routed", "given", "off")


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    with open_study(args, LIMIT) as study:
        variants = make_variants(study, args.seed, 1 if args.smoke else SEEDS)
        found = measure_all(study, variants)
        merged = merge(found)
        levels = [f"level{level}" for level in range(1, study.tree.levels + 1)]
        print(f"{study.home.name}: {len(study.questions)} questions; {backend_name()}", end="\n\n")
        columns = [*levels, *ASKED]
        means = {
            name: {what: mean(values[what], args.seed) for what in columns}
            for name, values in merged.items()
        }
        rows = [
            (name, *(one[what].show() for what in columns), one["typed"].count)
            for name, one in means.items()
        ]
        print("Where variants of a prompt land, and exact answers, %")
        print(table(["variant", *columns, "n"], rows), end="\n\n")
        for name, one in means.items():
            example = next(iter(variants[_runs(variants, name)[0]].values()))
            for what in columns:
                shares = [float(found[run][what].mean()) for run in _runs(variants, name)]
                about = f"such as {example!r}"
                if len(shares) > 1:
                    about += f"; seeds {min(shares):.4f} to {max(shares):.4f}"
                yield row(f"prompts.{what}@{name}", one[what], about)
        if args.png is not None:
            series = {what: [one[what] for one in means.values()] for what in columns}
            panel = figures.Panel("variants of a prompt", "", "%", series, list(means))
            figures.draw([panel], args.png)


def make_variants(study: Study, seed: int, seeds: int) -> dict[str, dict[int, str]]:
    """Variant -> question number -> text. Runs with seeds are called "edits-1#0", "edits-1#1"."""
    names = variants.names_of(study.questions, study.every)
    prompts = [prompt for prompt, _ in study.pairs]
    found: dict[str, dict[int, str]] = {"full": dict(enumerate(prompts))}
    for number, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        made = variants.shortened(prompt, name) | variants.reworded(prompt)
        for variant, text in made.items():
            found.setdefault(variant, {})[number] = text
    if corpus.is_atlas(study):
        for number, texts in enumerate(corpus.atlas_wordings(study)):
            for index, text in enumerate(texts):
                found.setdefault(f"training-{index}", {})[number] = text
    for place in ("edits", "name-edits"):
        for edits in EDITS:
            for run in range(seeds):
                rng = random.Random(f"{seed} {place} {edits} {run}")
                found[f"{place}-{edits}#{run}"] = {
                    number: variants.misspelt(
                        prompt, edits, rng, names[number] if place == "name-edits" else None
                    )
                    for number, prompt in enumerate(prompts)
                }
    return found


def measure_all(
    study: Study, variants: Mapping[str, Mapping[int, str]]
) -> dict[str, dict[str, np.ndarray]]:
    """Variant -> "level1" ..., "typed", "routed", "given", "off" -> one value for each question."""
    lm, found, ways = study.lm, {}, {}
    for name, texts in variants.items():
        numbers, typed = list(texts), list(texts.values())
        chosen = [study.questions[i] for i in numbers]
        routed = lm.assign(typed)
        right = lands(routed, [question.leaves for question in chosen], study.tree.branching)
        found[name] = {f"level{level}": one for level, one in enumerate(right.T, 1)}
        full = [study.pairs[i] for i in numbers]
        variant = [
            (text, question.continuation) for text, question in zip(typed, chosen, strict=True)
        ]
        given: dict[str, Way] = {
            "typed": (lm, variant, tuples(routed), None),
            "routed": (lm, full, tuples(routed), None),
            "given": (lm, variant, tuples(study.paths[numbers]), None),
            "off": (lm, variant, ["none"] * len(variant), None),
        }
        ways |= {f"{name}/{what}": way for what, way in given.items()}
    for key, asked in ask_all(ways).items():
        name, what = key.split("/")
        found[name][what] = asked.right
    return found


def merge(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Runs that differ in their seed as one: each question's mean over the seeds."""
    return {
        name: {
            what: np.mean([found[run][what] for run in _runs(found, name)], axis=0)
            for what in found[_runs(found, name)[0]]
        }
        for name in dict.fromkeys(run.split("#")[0] for run in found)
    }


def _runs(found: Mapping[str, object], name: str) -> Sequence[str]:
    return [run for run in found if run.split("#")[0] == name]


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main(NAME, measure, options=options))
