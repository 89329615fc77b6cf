"""Documents of two topics, made of a model's questions, and an anchor that can read them.

A topic is a leaf of the tree: facts whose questions are routed to the same memory. A document is
some sentences about one topic, then as many about a topic in another level-1 subtree.

Notable: the atlas was trained on single sentences, each of which saw no other, so it cannot read
several in a row: the second already is harder than guessing. So its anchor is trained a little on
documents of one topic, of half of the facts; the documents of two topics are made of the other
half. The bank stays as it is, and so do the embeddings, of which the encoder is made.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.errors import InputError
from mlx_hiermem.evaluation.questions import Question
from mlx_hiermem.training.objective import cross_entropy

#: Sentences of a topic, by the id of its leaf.
Topics = Mapping[int, Sequence[str]]

#: Longest document of the training, in sentences, and its batch.
_SENTENCES, _BATCH = 12, 16
#: Peak learning rate, and one sequence in so many without a memory, so that the anchor does not
#: forget how to do without.
_RATE, _WITHOUT = 1e-3, 8


@dataclass(frozen=True)
class Document:
    """Two texts, and the paths of the two topics that they are about."""

    first: str
    second: str
    paths: tuple[tuple[int, ...], tuple[int, ...]]


def topics(lm: MemoryLM, questions: Sequence[Question]) -> tuple[Topics, Topics]:
    """The facts of each leaf as sentences, in two halves: to train on, and to make documents of."""
    paths, _ = lm.tree.assign(lm.encoder.encode([question.prompt for question in questions]))
    halves: tuple[dict, dict] = defaultdict(list), defaultdict(list)
    order = np.random.default_rng(0).permutation(len(questions))
    for number, index in enumerate(order):
        text = questions[index].prompt + questions[index].continuation
        halves[number % 2][int(paths[index, -1])].append(text)
    return halves


def path_of(lm: MemoryLM, leaf: int) -> tuple[int, ...]:
    """The ids from level 1 to a leaf."""
    levels, k = lm.bank.config.levels, lm.tree.branching
    return tuple(leaf // k ** (levels - level) for level in range(1, levels + 1))


def documents(
    lm: MemoryLM, known: Topics, sentences: int, count: int, seed: int = 0
) -> list[Document]:
    """Documents of two topics.

    Args:
        sentences: about each topic.
        count: of documents.

    Raises:
        InputError: there are no two level-1 subtrees with a topic of so many sentences.
    """
    rng = random.Random(seed)
    paths = {leaf: path_of(lm, leaf) for leaf, texts in known.items() if len(texts) >= sentences}
    if len({path[0] for path in paths.values()}) < 2:
        raise InputError(
            f"no two topics of {sentences} sentences in different subtrees; ask for fewer, or give "
            "a model with more questions"
        )
    found = []
    while len(found) < count:
        first, second = rng.sample(sorted(paths), 2)
        if paths[first][0] != paths[second][0]:
            texts = [" ".join(rng.sample(known[leaf], sentences)) for leaf in (first, second)]
            found.append(Document(*texts, (paths[first], paths[second])))
    return found


def adapt(lm: MemoryLM, known: Topics, steps: int, seed: int = 0) -> float:
    """Train the anchor of ``lm``, in place, to read documents of one topic with their memory.

    Returns:
        The mean loss of the last tenth of the steps, nats per token.
    """
    rng = random.Random(seed)
    lm.model.anchor.set_dtype(mx.float32)
    lm.dtype = mx.float32
    for _, module in lm.model.anchor.named_modules():
        if isinstance(module, nn.Embedding):
            module.freeze()
    leaves = sorted(known)
    memories = {leaf: lm.fetch(path_of(lm, leaf)).memory for leaf in leaves}  # never given back
    length = min(lm.context_length or 256, 16 * _SENTENCES)
    warmup = min(20, steps)
    rises = optim.linear_schedule(0, _RATE, warmup)
    falls = optim.cosine_decay(_RATE, max(1, steps - warmup))
    rate = optim.join_schedules([rises, falls], [warmup])
    optimizer = optim.AdamW(rate, weight_decay=0.01)

    def loss(model: nn.Module, tokens: mx.array, counted: mx.array, memory: mx.array) -> mx.array:
        losses = cross_entropy(model(tokens[:, :-1], memory=memory), tokens[:, 1:])
        return (losses * counted).sum() / counted.sum()

    step, losses = nn.value_and_grad(lm.model, loss), []
    lm.model.train()
    for _ in tqdm(range(steps), desc="adapt", unit="step", disable=None):
        tokens = np.zeros((_BATCH, length), np.int32)
        counted = np.zeros((_BATCH, length - 1), np.float32)
        given = []
        for row in range(_BATCH):
            leaf = rng.choice(leaves)
            text = " ".join(rng.choices(known[leaf], k=rng.randint(1, _SENTENCES)))
            document = lm.tokenize(text)[:length]
            tokens[row, : len(document)] = document
            counted[row, : len(document) - 1] = 1
            # A memory of zeros is memory off.
            given.append(memories[leaf] * (row % _WITHOUT > 0))
        batch = mx.array(tokens), mx.array(counted), mx.concatenate(given)
        value, gradients = step(lm.model, *batch)
        optimizer.update(lm.model, gradients)
        mx.eval(lm.model.parameters(), optimizer.state, value)
        losses.append(value.item())
    lm.model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / max(1, len(last))
