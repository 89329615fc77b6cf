"""The atlas's model card: what it is, how it was made, and what was measured on it.

The figures come from the very functions behind ``mlx_hiermem evaluate``; the card adds none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlx_hiermem import load
from mlx_hiermem.evaluation import facts, routing
from mlx_hiermem.training.trainer import parameter_count

from .corpus import counts
from .facts import facts as all_facts
from .recipe import STAGES, Recipe


def write_card(recipe: Recipe, folder: Path, seconds: Mapping[str, int]) -> None:
    """Measure the model in ``folder`` and write its ``README.md``.

    Args:
        seconds: wall-clock time of each stage of the build.
    """
    lm = load(folder)
    questions, names = facts.read_questions(folder / facts.QUESTIONS_FILE)
    hits = facts.answer(lm, questions, facts.load_control(lm, folder / facts.CONTROL_FILE))
    shares = facts.by_bucket(questions, names, hits)
    landed = routing.summary(routing.landed(lm, questions))["levels"]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shape, anchor = lm.bank.config, recipe.anchor
    anchor_size = parameter_count(lm.model.anchor)

    rows = [
        "| facts | documents per fact | " + " | ".join(hits) + " |",
        "|---" * (len(hits) + 2) + "|",
    ]
    for i, name in enumerate(names):
        documents = [question.count for question in questions if question.bucket == i]
        cells = [f"{100 * shares[condition][i]:.1f}" for condition in hits]
        rows.append(f"| {name} | {min(documents)}–{max(documents)} | {' | '.join(cells)} |")
    levels = ", ".join(f"level {i}: {100 * share:.1f} %" for i, share in enumerate(landed, 1))
    stages = ", ".join(f"{name} {seconds[name] / 60:.1f} min" for name in STAGES)
    (folder / "README.md").write_text(
        f"""---
library_name: mlx
pipeline_tag: text-generation
license: mit
---
# atlas

The small model that ships with mlx-hiermem: an anchor with the architecture of the paper's and a bank of
hierarchical FFN memories, trained on {len(all_facts()):,} true facts about elements, countries, currencies,
scripts, languages and places. It answers in one sentence and knows nothing else.

| | |
|---|---|
| anchor | {anchor.num_hidden_layers} layers, hidden {anchor.hidden_size}, FFN {anchor.intermediate_size}, \
{anchor.num_attention_heads} × {anchor.head_dim} heads, vocabulary {anchor.vocab_size}: {anchor_size:,} parameters |
| memory config | ranks {shape.ranks}, branching {shape.branching} |
| fetched | {shape.fetch_size():,} parameters ({100 * shape.fetch_size() / anchor_size:.1f} % of the anchor) |
| bank | {shape.bank_size():,} parameters |
| corpus | {sum(counts(recipe.corpus)):,} documents of one sentence; popularity follows a Zipf law |
| size | {size / 1e6:.1f} MB |

## How it was made

`python -m apps.atlas build --seed {recipe.seed}`, on MLX's CPU backend with two cores
(wall-clock: {stages}; stages run side by side where they can). The anchor saw {recipe.anchor_steps:,} steps of
{recipe.batch_size * recipe.sequence_length:,} tokens; then anchor, bank and generic memory were trained together for
{recipe.memory_steps:,} steps, the token embeddings frozen, since the encoder is made of them. The controls: the generic
memory went on alone for another {recipe.memory_steps:,} steps; `anchor_same_tokens` is a bare anchor trained for
{recipe.anchor_steps + recipe.memory_steps:,} steps in one run, as many tokens as anchor and memory saw.

## What it knows

Exact answers, in %, to questions in a wording that no training text, nor the tokenizer, the encoder or the tree
has seen (`mlx_hiermem evaluate --model atlas --task facts`):

{chr(10).join(rows)}

The questions were held out of all training, but the recipe (wordings, sizes, rates) was chosen while looking at
these figures: read them as those of a development set. One seed, no spread.

`wrong` fetches a path in another level-1 subtree, `blocked` blocks the blocks on the question's path.

Questions that land where their fact was trained ({levels}):
`mlx_hiermem evaluate --model atlas --task routing`.

## Sources

Element names and numbers: IUPAC, typed in. Everything else: pycountry (ISO 639-3, 3166, 4217, 15924; LGPL-2.1 data
of the Debian iso-codes project). Popularity of names and frequencies of ordinary words: wordfreq
(Robyn Speer, CC BY-SA 4.0). Where the standards change, the model does not.
""",
        encoding="utf-8",
    )
