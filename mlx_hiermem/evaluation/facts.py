"""The facts task: does the model know its facts, and do they come out of the fetched blocks?

Each held-out question is answered under six conditions:

- ``none``: memory off;
- ``generic``: the generic memory, the fair control;
- ``fetched``: the blocks on the path of the prompt, as in ordinary use;
- ``wrong``: the blocks on a path in another level-1 subtree;
- ``blocked``: the path of the prompt, with the blocks on it blocked (section 4 of the
  paper blocks the best-matching 1/16 of its bank: a level-1 cluster and all below it);
- ``anchor_same_tokens``: the second control, a bare anchor that was trained on as many tokens as
  anchor and memory together.

An answer counts only if it is exactly right: greedy decoding after the prompt gives the
continuation, full stop included. That is read off one forward pass over prompt and continuation, in
which each token of the continuation has to be the likeliest one after all that stands before it.
The two are the same, by induction: greedy decoding takes the likeliest token after the prompt; if
that is the continuation's first, it takes its next one after the very text that the pass has seen,
and so on; at the first token that is not the likeliest, decoding leaves the continuation. An answer
in other tokens than the tokenizer makes of it is a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .. import scoring
from ..arrays import load_arrays
from ..errors import FormatError, InputError, one_line
from ..memories import attach
from .questions import Question, read_questions, write_questions

if TYPE_CHECKING:
    from ..engine import Memory, MemoryLM

__all__ = [
    "CONDITIONS",
    "CONTROL_FILE",
    "QUESTIONS_FILE",
    "Answers",
    "Question",
    "answer",
    "ask",
    "by_bucket",
    "by_family",
    "load_control",
    "on_path",
    "read_questions",
    "wrong_paths",
    "write_questions",
]

#: The conditions, in the order of the output; the last one only where a model has the weights.
CONDITIONS = ("none", "generic", "fetched", "wrong", "blocked", "anchor_same_tokens")

#: Where a model folder keeps the questions and the weights of the second control.
QUESTIONS_FILE = "evaluation/facts.jsonl.gz"
CONTROL_FILE = "evaluation/anchor_same_tokens.safetensors"

#: Questions in a batch, and the bytes that their memories may take, one copy for each question.
BATCH = 64
BATCH_BYTES = 2**29


def answer(
    lm: MemoryLM,
    questions: Sequence[Question],
    control: MemoryLM | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Ask every question under every condition.

    Args:
        lm: the model. Its bank's blocked blocks are afterwards what they were before.
        questions: prompt and continuation together have to fit into the context.
        control: the second control, from :func:`load_control`; without it that condition is left
            out.
        seed: of the wrong paths.

    Returns:
        Condition -> (N,) bool, whether the answer is exactly right.

    Raises:
        InputError: there is no question, or one is longer than the context.
    """
    if not questions:
        raise InputError("there are no questions to ask; give at least one")
    paths = lm.assign([question.prompt for question in questions])
    config = lm.bank.config
    leaves = [question.leaves for question in questions]
    wrong = wrong_paths(paths, leaves, config.branching, seed, config.roots)
    plan: dict[str, tuple[MemoryLM, Sequence[Memory], Fetch | None]] = {
        "none": (lm, ["none"] * len(questions), None),
        "generic": (lm, ["generic"] * len(questions), None),
        "fetched": (lm, _tuples(paths), None),
        "wrong": (lm, _tuples(wrong), None),
        "blocked": (lm, _tuples(paths), partial(_fetch_blocked, lm)),
    }
    if control is not None:
        plan["anchor_same_tokens"] = (control, ["none"] * len(questions), None)
    pairs = [(question.prompt, question.continuation) for question in questions]
    hits = {}
    # disable=None: no bar where stderr is no terminal.
    with tqdm(total=len(plan) * len(questions), unit="question", disable=None) as bar:
        for condition, (asked, memories, fetch) in plan.items():
            bar.set_description(condition)
            hits[condition] = ask(asked, pairs, memories, fetch, bar).right
    return hits


@dataclass(frozen=True)
class Answers:
    """What came of asking N questions.

    Attributes:
        right: (N,) bool, whether greedy decoding gives the continuation.
        logprobs: (N,) float64, the log-probability of the whole continuation, in nats.
    """

    right: np.ndarray
    logprobs: np.ndarray


#: From what stands for a memory to the joined memory (1, N); None is memory off.
Fetch = Callable[[Any], "mx.array | None"]


def ask(
    lm: MemoryLM,
    pairs: Sequence[tuple[str, str]],
    memories: Sequence[Any],
    fetch: Fetch | None = None,
    bar: tqdm[Any] | None = None,
) -> Answers:
    """Ask questions in batches, each with its own memory.

    Args:
        pairs: (prompt, continuation).
        memories: per pair what ``fetch`` takes; equal ones are fetched once. They have to be of one
            type that can be sorted; either all of them stand for memory off or none does.
        fetch: default: ``lm.fetch``, so that a memory is "none", "generic" or a path, a tuple.
        bar: told of each batch.

    Raises:
        InputError: there is no pair, or prompt and continuation are longer than the context.
    """
    if not pairs:
        raise InputError("there are no questions to ask; give at least one")
    fetch = fetch or (lambda memory: lm.fetch(memory).memory)
    # Questions of one memory follow each other, so that it is fetched once; among them those of
    # about one length, so that little is padding.
    order = sorted(range(len(pairs)), key=lambda i: (memories[i], len(pairs[i][0])))
    size = BATCH
    if memories[order[0]] != memories[order[-1]]:
        memory_bytes = lm.bank.config.fetch_size() * lm.dtype.size
        size = min(BATCH, max(1, BATCH_BYTES // memory_bytes))
    right, logprobs = np.zeros(len(pairs), bool), np.zeros(len(pairs))
    last, fetched = None, None
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        given = []
        for i in batch:
            if memories[i] != last:
                last, fetched = memories[i], fetch(memories[i])
            given.append(fetched)
        found = scoring.score(lm, [pairs[i] for i in batch], given)
        logprobs[batch], right[batch] = zip(*found, strict=True)
        if bar is not None:
            bar.update(len(batch))
    return Answers(right, logprobs)


def _fetch_blocked(lm: MemoryLM, path: Sequence[int]) -> mx.array | None:
    return lm.fetch(path, blocked=on_path(lm, path)).memory


def on_path(lm: MemoryLM, path: Sequence[int]) -> list[tuple[int, int]]:
    """The blocks (level, cluster) on a path, level 1 first."""
    return [(level, path[level - 1]) for level in lm.bank.config.memory_levels]


def wrong_paths(
    paths: np.ndarray,
    leaves: Sequence[Sequence[int]],
    branching: int,
    seed: int,
    roots: int | None = None,
) -> np.ndarray:
    """A path in another level-1 subtree for each question, drawn evenly.

    Not drawn from either is a subtree in which a document of the fact was trained, since a path
    there might be a right one; only if no subtree is left it is.

    Args:
        paths: (N, p) int, the right ones.
        leaves: per question the leaf clusters under which the fact was trained.
        branching: k.
        seed: of the draw.
        roots: clusters of level 1; by default the branching.

    Returns:
        (N, p) int64.
    """
    levels = paths.shape[1]
    below = branching ** np.arange(levels)[::-1]  # leaves below one cluster of each level
    rng = np.random.default_rng(seed)
    wrong = np.empty((len(paths), levels), np.int64)
    for row, path, trained in zip(wrong, paths, leaves, strict=True):
        others = [cluster for cluster in range(roots or branching) if cluster != path[0]]
        near = {leaf // below[0] for leaf in trained}
        free = [cluster for cluster in others if cluster not in near] or others
        subtree = free[rng.integers(len(free))]
        row[:] = (subtree * below[0] + rng.integers(below[0])) // below
    return wrong


def load_control(lm: MemoryLM, path: str | Path) -> MemoryLM:
    """The second control: other weights in a fresh anchor of the same config.

    Args:
        lm: the model whose anchor's config, tokenizer and routing it takes over.
        path: the weights, a safetensors file.

    Raises:
        FormatError: the file is missing or damaged, or its weights are not those of this anchor.
    """
    from ..engine import MemoryLM

    anchor = type(lm.model.anchor)(lm.model.args)
    try:
        weights = load_arrays(path)
        if hasattr(anchor, "sanitize"):
            weights = anchor.sanitize(weights)
        anchor.load_weights(list(weights.items()))
        mx.eval(weights)  # reads the file
        if wrong := [
            name for name, w in weights.items() if not mx.issubdtype(w.dtype, mx.floating)
        ]:
            raise ValueError(f"{wrong[0]} is stored as {weights[wrong[0]].dtype}")
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        reason = one_line(error)
        raise FormatError(
            f"{path}: not the weights of this model's anchor ({reason}); get the file again"
        ) from None
    anchor.set_dtype(lm.dtype)
    anchor.eval()
    config = {"max_position_embeddings": lm.context_length}
    model = attach(anchor, lm.bank.config)
    return MemoryLM(model, lm.tokenizer, lm.bank, lm.tree, lm.encoder, config)


def by_bucket(
    questions: Sequence[Question], bucket_names: Sequence[str], hits: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Accuracy per bucket, as a mapping for JSON.

    Returns:
        ``{"buckets": names, condition: [share of right answers per bucket], ..., "n": [questions
        per bucket]}``; None is the share of a bucket without questions.
    """
    buckets = np.array([question.bucket for question in questions])
    members = [buckets == bucket for bucket in range(len(bucket_names))]
    shares = {
        condition: [_share(right[chosen]) for chosen in members]
        for condition, right in hits.items()
    }
    return {
        "buckets": list(bucket_names),
        **shares,
        "n": [int(chosen.sum()) for chosen in members],
    }


def by_family(
    questions: Sequence[Question], hits: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Accuracy per family: ``{family: {condition: share, ..., "n": questions}}``."""
    families = np.array([question.family for question in questions])
    return {
        str(family): {
            **{condition: _share(right[families == family]) for condition, right in hits.items()},
            "n": int((families == family).sum()),
        }
        for family in np.unique(families)
    }


def _share(right: np.ndarray) -> float | None:
    return float(right.mean()) if len(right) else None


def _tuples(paths: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(path) for path in paths.tolist()]
