"""Two paths in place of one, where routing may err: half the rank each, their mean, the likelier.

``python -m benchmarks.studies.beams [--smoke] [--json FILE] [--png FILE]``. The second path is the
nearest other leaf that a beam of two finds. Rows ``beams.accuracy@V-B`` for the ways V to route
(``full`` prompt; ``name`` alone; ``name-edits-N``, misspelt; the full prompt is asked always) and
the beams B:

- ``first``, ``second``: the routed path alone, the other alone;
- ``halves``: of each block half of its rows, those of the largest norms; the fetch size stays;
- ``mean``: the mean of both memories, number by number;
- ``likelier``: both are asked, the answer with the larger log-probability counts;
- ``either``: one of the two is right: no beam of these two can be better.

``beams.fetched@two``: numbers fetched for two paths ÷ one (a block that both share counts once).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence

from mlx_hiermem.backend import backend_name, keep_freed_memory, preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402  (after the BLAS)
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from mlx_hiermem.commands.tables import table  # noqa: E402
from mlx_hiermem.engine import MemoryLM  # noqa: E402

from ..harness import Row, main  # noqa: E402
from .asking import figures, variants  # noqa: E402
from .asking.paths import second_paths  # noqa: E402
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

NAME = "beams"
LIMIT = 400
BEAMS = ("first", "second", "halves", "mean", "likelier", "either")
_BATCH = 64

Path = tuple[int, ...]


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    with open_study(args, LIMIT) as study:
        print(f"{study.home.name}: {len(study.questions)} questions; {backend_name()}", end="\n\n")
        means, fetched = {}, []
        for name, texts in routed_by(study, args.seed).items():
            vectors = study.lm.encoder.encode(texts)
            first = study.tree.assign(vectors)[0]
            second = second_paths(study.tree, vectors, first)
            right = ask_beams(study, tuples(first), tuples(second))
            means[name] = {beam: mean(values, args.seed) for beam, values in right.items()}
            fetched.append(fetched_ratio(study.lm, first, second))
            for beam, one in means[name].items():
                yield row(f"beams.accuracy@{name}-{beam}", one, "exact answers")
        rows = [(name, *(one.show() for one in found.values())) for name, found in means.items()]
        print("Exact answers, %, by what is routed")
        print(table(["routed", *BEAMS], rows), end="\n\n")
        yield row("beams.fetched@two", mean(np.concatenate(fetched), args.seed), "÷ one path")
        if args.png is not None:
            series = {beam: [found[beam] for found in means.values()] for beam in BEAMS}
            panel = figures.Panel(
                "two paths", "what is routed", "exact answers, %", series, list(means), bars=True
            )
            figures.draw([panel], args.png)


def routed_by(study: Study, seed: int) -> dict[str, list[str]]:
    """What is routed in place of each prompt."""
    names = variants.names_of(study.questions, study.every)
    prompts = [prompt for prompt, _ in study.pairs]
    found = {
        "full": prompts,
        "name": [text[begin:end] for text, (begin, end) in zip(prompts, names, strict=True)],
    }
    for edits in (1, 2, 3):
        rng = random.Random(f"{seed} beams {edits}")
        found[f"name-edits-{edits}"] = [
            variants.misspelt(text, edits, rng, name)
            for text, name in zip(prompts, names, strict=True)
        ]
    return found


def ask_beams(study: Study, first: Sequence[Path], second: Sequence[Path]) -> dict[str, np.ndarray]:
    """Beam -> (N,) bool."""
    lm, pairs = study.lm, study.pairs

    def both(pair: tuple[Path, Path]) -> tuple[mx.array, mx.array]:
        return tuple(lm.fetch(path).memory for path in pair)

    keys = list(zip(first, second, strict=True))
    ways: dict[str, Way] = {
        "first": (lm, pairs, first, None),
        "second": (lm, pairs, second, None),
        "halves": (lm, pairs, keys, lambda key: halves(lm, key, *both(key))),
        "mean": (lm, pairs, keys, lambda key: sum(both(key)) / 2),
    }
    found = {name: asked for name, asked in ask_all(ways).items()}
    right = {name: asked.right for name, asked in found.items()}
    # Where both or neither is right there is nothing to choose.
    differ = np.flatnonzero(right["first"] != right["second"])
    choose_second = np.zeros(len(pairs), bool)
    if len(differ):
        likely = [
            written_logprobs(lm, [pairs[i] for i in differ], [paths[i] for i in differ])
            for paths in (first, second)
        ]
        choose_second[differ] = likely[1] > likely[0]
    right["likelier"] = np.where(choose_second, right["second"], right["first"])
    right["either"] = right["first"] | right["second"]
    return {beam: right[beam] for beam in BEAMS}


def halves(lm: MemoryLM, paths: tuple[Path, Path], one: mx.array, other: mx.array) -> mx.array:
    """A memory (1, N) of half the rows of each of two: in each layer and level those of the largest
    norms, all matrices' multiplied. A level whose block both share stays as it is; of an odd rank
    the first has one row more."""
    config = lm.bank.config
    ranks = [config.ranks[level - 1] for level in config.memory_levels]
    total, made = sum(ranks), []
    for layer, layer_other in zip(lm.model.matrices(one), lm.model.matrices(other), strict=True):
        # (1, count * R, width) -> (count, R, width)
        rows = [
            [array.reshape(-1, total, array.shape[-1]) for array in arrays]
            for arrays in (layer, layer_other)
        ]
        norms = [
            np.prod(
                [
                    np.array(mx.linalg.norm(array.astype(mx.float32), axis=-1)).prod(0)
                    for array in arrays
                ],
                axis=0,
            )
            for arrays in rows
        ]  # (R,) for each of the two
        taken, start = [], 0
        for level, rank in zip(config.memory_levels, ranks, strict=True):
            strongest = [start + np.argsort(-n[start : start + rank], kind="stable") for n in norms]
            if paths[0][level - 1] == paths[1][level - 1]:
                taken.append((np.arange(start, start + rank), np.arange(0)))
            else:
                taken.append((strongest[0][: rank - rank // 2], strongest[1][: rank // 2]))
            start += rank
        for mine, theirs in zip(*rows, strict=True):
            parts = [
                source[:, mx.array(chosen.astype(np.int32))]
                for level in taken
                for source, chosen in zip((mine, theirs), level, strict=True)
                if len(chosen)
            ]
            made.append(mx.concatenate(parts, axis=1).reshape(1, -1))
    memory = mx.concatenate(made, axis=1)
    mx.eval(memory)
    return memory


def written_logprobs(
    lm: MemoryLM, pairs: Sequence[tuple[str, str]], paths: Sequence[Path]
) -> np.ndarray:
    """How likely what a model writes greedily after each prompt is, (N,) float64 nats.

    It ends with what all continuations end with (such as the full stop), with the end-of-text
    token, or when it is as long as the longest continuation.
    """
    tokens = [lm.tokenize(prompt) for prompt, _ in pairs]
    longest = max(len(lm.tokenize(text)) for _, text in pairs)
    ends = {text[-1] for _, text in pairs}
    end = ends.pop() if len(ends) == 1 else None
    found = np.zeros(len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: (paths[i], len(tokens[i])))
    for start in tqdm(range(0, len(order), _BATCH), desc="likelier", unit="batch", disable=None):
        batch = order[start : start + _BATCH]
        memory = mx.concatenate([lm.fetch(paths[i]).memory for i in batch])
        rows = [list(tokens[i]) for i in batch]
        going = np.ones(len(batch), bool)
        for _ in range(longest):
            width = max(map(len, rows))
            padded = np.zeros((len(rows), width), np.int32)
            for line, known in zip(padded, rows, strict=True):
                line[: len(known)] = known
            logits = lm.model(mx.array(padded), memory=memory)
            last = mx.array([len(known) - 1 for known in rows])
            logits = logits[mx.arange(len(rows)), last].astype(mx.float32)
            best = np.array(logits.argmax(-1))
            logprobs = np.array(logits.max(-1) - mx.logsumexp(logits, axis=-1))
            for i in np.flatnonzero(going):
                token = int(best[i])
                found[batch[i]] += float(logprobs[i])
                rows[i].append(token)
                text = lm.tokenizer.decode([token])
                if token in lm.tokenizer.eos_token_ids or (end and text.endswith(end)):
                    going[i] = False
            if not going.any() or (lm.context_length or width + 2) <= width + 1:
                break
    return found


def fetched_ratio(lm: MemoryLM, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Numbers of the distinct blocks of two paths ÷ those of one, (N,)."""
    config = lm.bank.config
    both = sum(
        config.block_size(level) * (1 + (first[:, level - 1] != second[:, level - 1]))
        for level in config.memory_levels
    )
    return both / config.fetch_size()


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main(NAME, measure, options=options))
