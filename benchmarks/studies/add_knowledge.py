"""Adding knowledge to the atlas: an added memory against LoRA adapters trained on the same text.

``python -m benchmarks.studies.add_knowledge``. Made-up facts (``private_facts``), three seeds. The
adapters are mlx-lm's own, on all linear layers of the anchor, with as many numbers as one fetch of
the added memory, and as all of its blocks; they see the same documents, for as many steps, in the
model as it is used: with the fetched memory of each document; at several learning rates. Rows, for
W = memory, and lora-fetch-R and lora-bank-R for each peak learning rate R: ``add.new@W``, the share
of the new facts that are answered exactly in a wording that no document has, and ``add.old@W``, the
share of the atlas's own held-out questions; ``add.old@before``; ``add.lands`` and ``add.diverted``,
the share of the new and of the old questions that are routed into the added memory; and the same
``@greedy``: if the nearest of all clusters of level 1 were taken.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_hiermem.backend import keep_freed_memory, preload_blas

preload_blas()
keep_freed_memory()

import mlx.core as mx  # noqa: E402  (after the BLAS)
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from tqdm import tqdm  # noqa: E402

from mlx_hiermem import load  # noqa: E402
from mlx_hiermem.bank import extend  # noqa: E402
from mlx_hiermem.commands.tables import table  # noqa: E402
from mlx_hiermem.corpus.packed import PackedCorpus  # noqa: E402
from mlx_hiermem.engine import MemoryLM  # noqa: E402
from mlx_hiermem.evaluation import facts  # noqa: E402
from mlx_hiermem.evaluation.questions import Question, read_questions  # noqa: E402
from mlx_hiermem.models import find_model  # noqa: E402
from mlx_hiermem.training.adding import (  # noqa: E402
    Addition,
    AddSettings,
    stored_rows,
    train_addition,
)
from mlx_hiermem.training.objective import next_token_loss, predicted_tokens  # noqa: E402
from mlx_hiermem.training.order import SequenceOrder  # noqa: E402

from ..harness import Row, main  # noqa: E402
from . import private_facts  # noqa: E402

NAME = "add_knowledge"

SEEDS, THINGS, STEPS, OLD = 3, 75, 400, 1000
SMOKE_THINGS, SMOKE_STEPS, SMOKE_OLD = 4, 2, 16
#: Peak learning rates of the adapters.
LORA_RATES = (3e-4, 1e-3, 3e-3)
_SIZES = ("fetch", "bank")


@dataclass(frozen=True)
class Outcome:
    """What one way came to with one seed.

    Attributes:
        new, old: shares of questions that are answered exactly.
        entered: shares of the new and of the old questions that are routed into the added memory.
        greedy: the same by the nearest cluster of level 1.
        size: numbers that were trained.
    """

    new: float
    old: float
    size: int
    entered: tuple[float, float] = (0.0, 0.0)
    greedy: tuple[float, float] = (0.0, 0.0)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="first of three")
    parser.add_argument("--steps", type=int, metavar="N", help=f"of each run (default: {STEPS})")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figure here")


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    home = find_model("atlas")
    things = SMOKE_THINGS if args.smoke else THINGS
    steps = args.steps or (SMOKE_STEPS if args.smoke else STEPS)
    limit = SMOKE_OLD if args.smoke else OLD
    questions, _ = read_questions(home / facts.QUESTIONS_FILE)
    old = questions[:: max(1, len(questions) // limit)][:limit]
    before = _ask(load("atlas"), old)[0]
    found: dict[str, list[Outcome]] = {}
    rates = LORA_RATES[-1:] if args.smoke else LORA_RATES
    seeds = range(args.seed, args.seed + (1 if args.smoke else SEEDS))
    for seed in seeds:
        private = private_facts.make(things, seed)
        with tempfile.TemporaryDirectory(prefix="add-knowledge-") as place:
            addition, outcome = _memory(Path(place), home, private, old, steps, seed)
        found.setdefault("memory", []).append(outcome)
        for size, numbers in zip(_SIZES, (addition.config.fetch_size(), outcome.size), strict=True):
            for rate in rates:
                outcomes = found.setdefault(f"lora-{size}-{rate:g}", [])
                outcomes.append(_lora(addition, numbers, private, old, rate, seed))
    print(_table(found, before))
    about = f"{len(seeds)} seeds, {3 * things} facts, {steps} steps"
    for way, outcomes in found.items():
        for which in ("new", "old"):
            values = [getattr(one, which) for one in outcomes]
            yield _row(f"add.{which}@{way}", values, f"{about}, {outcomes[0].size:,} numbers")
    yield Row("add.old@before", before, "", f"{len(old)} questions of the atlas")
    for which, name in enumerate(("lands", "diverted")):
        yield _row(f"add.{name}", [one.entered[which] for one in found["memory"]], about)
        yield _row(f"add.{name}@greedy", [one.greedy[which] for one in found["memory"]], about)
    if args.png:
        _draw(found, before, args.png)


def _row(id: str, values: list[float], about: str) -> Row:
    spread = f"{min(values):.4f} to {max(values):.4f}"
    return Row(id, float(np.mean(values)), "", f"mean, {spread}; {about}")


def _greedy(lm: MemoryLM, questions: list[Question]) -> float:
    """Share of questions whose nearest cluster of level 1 is one that was added."""
    vectors = lm.encoder.encode([one.prompt for one in questions])
    far = np.linalg.norm(vectors[:, None] - lm.tree.centroids[0][None], axis=2)
    return float(np.mean(far.argmin(axis=1) >= lm.bank.config.branching))


def _ask(lm: MemoryLM, questions: list[Question]) -> tuple[float, float]:
    """Share of right answers with fetched memory, and of questions routed into what was added."""
    paths = [tuple(path) for path in lm.assign([one.prompt for one in questions]).tolist()]
    right = facts.ask(lm, [(one.prompt, one.continuation) for one in questions], paths).right
    entered = np.mean([path[0] >= lm.bank.config.branching for path in paths])
    return float(right.mean()), float(entered)


# ---- an added memory -------------------------------------------------------------------


def _memory(
    place: Path, home: Path, private: Any, old: list[Question], steps: int, seed: int
) -> tuple[Addition, Outcome]:
    model = shutil.copytree(home, place / "model")
    corpus = private.write(place / "private.jsonl")
    settings = AddSettings("acme", iters=steps, seed=seed)
    lm = load(model, tiers="disk")
    addition = train_addition(lm, model, [str(corpus)], settings)
    extend.add(
        model / "memory",
        "acme",
        addition.report["roots"],
        lambda level: stored_rows(addition, "acme", level),
        addition.tree,
    )
    addition.trainer.rows.close()
    lm.bank.close()
    lm = load(model)
    new, lands = _ask(lm, private.questions)
    kept, diverted = _ask(lm, old)
    greedy = _greedy(lm, private.questions), _greedy(lm, old)
    lm.bank.close()
    size = extend.added_bytes(addition.config, "acme") // 2  # bfloat16
    return addition, Outcome(new, kept, size, (lands, diverted), greedy)


# ---- an adapter ------------------------------------------------------------------------


def _lora(
    addition: Addition, size: int, private: Any, old: list[Question], rate: float, seed: int
) -> Outcome:
    """Train an adapter of about ``size`` numbers on the documents of an addition."""
    lm = load("atlas")
    corpus = _under_base(lm, addition)
    memories = {
        leaf: np.array(lm.fetch((leaf // lm.bank.config.branching, leaf)).memory[0])
        for leaf in np.unique(corpus.leaves).tolist()
    }
    mx.random.seed(seed)
    lm.model.freeze()
    each = sum(
        sum(module.weight.shape)
        for layer in lm.model.anchor.layers
        for _, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    )
    keys = {
        name
        for name, module in lm.model.anchor.layers[0].named_modules()
        if isinstance(module, nn.Linear)
    }
    settings = {"rank": max(1, round(size / each)), "scale": 2.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(lm.model.anchor, len(lm.model.anchor.layers), settings)
    trained = sum(value.size for _, value in tree_flatten(lm.model.trainable_parameters()))
    config = addition.trainer.config

    def loss(tokens: mx.array, memory: mx.array) -> mx.array:
        total, _ = next_token_loss(lm.model, tokens, memory, 0)
        return total

    step = nn.value_and_grad(lm.model, loss)
    optimizer = optim.AdamW(rate, betas=[0.9, 0.95], weight_decay=config.weight_decay)
    order = SequenceOrder(len(corpus), config.seed)
    for number in tqdm(range(config.iters), desc="LoRA", unit="step", disable=None):
        indices = order.indices(number * config.batch_size, config.batch_size)
        tokens, leaves = corpus.take(indices)
        memory = mx.array(np.stack([memories[leaf] for leaf in leaves.tolist()]))
        _, gradients = step(mx.array(tokens), memory)
        scale = 1 / max(1, predicted_tokens(tokens, 0))
        gradients, _ = optim.clip_grad_norm(_scaled(gradients, scale), config.clip)
        optimizer.learning_rate = rate * config.rate(number) / config.learning_rate
        optimizer.update(lm.model, gradients)
        mx.eval(lm.model.trainable_parameters(), optimizer.state)
    lm.model.eval()
    outcome = Outcome(_ask(lm, private.questions)[0], _ask(lm, old)[0], trained)
    lm.bank.close()
    return outcome


def _scaled(gradients: Any, scale: float) -> Any:
    from mlx.utils import tree_map

    return tree_map(lambda gradient: gradient * scale, gradients)


def _under_base(lm: MemoryLM, addition: Addition) -> PackedCorpus:
    """The documents, each under the leaves of the atlas that its prompts are routed to."""
    return addition.corpus.pack(lm.assign(addition.corpus.texts)[:, -1])


# ---- what people see -------------------------------------------------------------------


def _table(found: Mapping[str, list[Outcome]], before: float) -> str:
    rows = [("before", "0", "", f"{100 * before:.1f}")]
    for way, outcomes in found.items():
        spread = [
            f"{100 * min(values):.1f} to {100 * max(values):.1f}"
            for values in ([one.new for one in outcomes], [one.old for one in outcomes])
        ]
        size = f"{np.mean([one.size for one in outcomes]):,.0f}"
        rows.append((way, size, *spread))
    return table(("way", "numbers", "new facts %", "old facts %"), rows)


def _draw(found: Mapping[str, list[Outcome]], before: float, path: Path) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6.4, 4), layout="constrained")
    axes = fig.subplots()
    axes.axhline(100 * before, color="#9AA5AB", linewidth=1, label="old facts before")
    for way, outcomes in found.items():
        new = [100 * one.new for one in outcomes]
        axes.plot(new, [100 * one.old for one in outcomes], "o", label=way, clip_on=False)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xlabel("new facts answered, %")
    axes.set_ylabel("old facts answered, %")
    axes.legend(loc="center", fontsize="small")
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    main(NAME, measure, options=options)
