"""Log-probabilities of texts under a model with memories, in batches.

One batch may hold a different memory for each sequence. Sequences are padded at the end, where the
causal mask keeps the padding from being seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .errors import InputError
from .refetch import DEFAULT_KV_CACHE, Refetch

if TYPE_CHECKING:
    from .conversation import KeptCache
    from .engine import Memory, MemoryLM


@dataclass(frozen=True)
class Scored:
    """How likely an answer was, and what it took.

    Attributes:
        logprobs: (n,) float32, the log-probability of each token, in nats.
        refetches: how often another memory was fetched on the way.
        prefilled: tokens that were prefilled, the prompt's among them; the answer's own are not.
    """

    logprobs: np.ndarray
    refetches: int
    prefilled: int


def score(
    lm: MemoryLM, pairs: Sequence[tuple[str, str]], memories: Sequence[mx.array | None]
) -> list[tuple[float, bool]]:
    """Score continuations after contexts, as one batch.

    Args:
        pairs: (context, continuation).
        memories: per pair a joined memory (1, N), or None for memory off; either all of
            them are None or none is.

    Returns:
        Per pair the continuation's log-probability in nats, and whether it is the greedy one.

    Raises:
        InputError: a context or continuation has no token, or the two are longer than the context.
    """
    rows, starts = [], []
    for context, continuation in pairs:
        tokens, start = split_tokens(lm, context, continuation)
        if lm.context_length is not None and len(tokens) > lm.context_length:
            raise InputError(
                f"context and continuation have {len(tokens)} tokens; the context of this model "
                f"ends at {lm.context_length}; shorten them"
            )
        rows.append(tokens)
        starts.append(start)
    logprobs, greedy = _token_scores(lm, rows, memories)
    results = []
    for row, start, values, is_best in zip(rows, starts, logprobs, greedy, strict=True):
        # Position t predicts token t + 1.
        of_continuation = slice(start - 1, len(row) - 1)
        results.append((float(values[of_continuation].sum()), bool(is_best[of_continuation].all())))
    return results


def split_tokens(lm: MemoryLM, context: str, continuation: str) -> tuple[list[int], int]:
    """Tokens of context and continuation together, and where the continuation starts.

    The text is tokenised as a whole, so that the border falls as it does in ordinary text; where
    tokens would span the border the two are tokenised apart.
    """
    head = lm.tokenize(context)
    tokens = lm.tokenize(context + continuation)
    if tokens[: len(head)] != head:
        tokens = head + list(lm.tokenizer.encode(continuation, add_special_tokens=False))
    if not head or len(tokens) == len(head):
        raise InputError(
            f"context {context[:40]!r} and continuation {continuation[:40]!r}: each needs at least "
            "one token"
        )
    return tokens, len(head)


def perplexity(lm: MemoryLM, texts: Sequence[str], memory: Memory, batch_size: int = 16) -> float:
    """Perplexity per token: exp of the mean negative log-probability of all but first tokens."""
    total, count = 0.0, 0
    for start in range(0, len(texts), batch_size):
        windows, memories = [], []
        batch = texts[start : start + batch_size]
        fetched = lm.fetch_batch(memory, batch)
        for text, found in zip(batch, fetched, strict=True):
            tokens = lm.tokenize(text)
            length = lm.context_length or len(tokens)
            for first in range(0, len(tokens), length):
                if len(window := tokens[first : first + length]) > 1:
                    windows.append(window)
                    memories.append(found.memory)
        # A long text has many windows, so what was gathered is scored in batches again.
        for first in range(0, len(windows), batch_size):
            rows = windows[first : first + batch_size]
            logprobs, _ = _token_scores(lm, rows, memories[first : first + batch_size])
            for row, values in zip(rows, logprobs, strict=True):
                total -= float(values[: len(row) - 1].sum())
                count += len(row) - 1
        for found in fetched:  # all that they led to are numbers by now
            found.release()
        if math.isnan(total):
            raise lm.not_a_number(fetched[0])
    if not count:
        raise InputError("the texts hold no two tokens in a row; perplexity needs longer ones")
    return math.exp(total / count)


def score_answer(
    lm: MemoryLM,
    prompt: str | Sequence[int],
    answer: Sequence[int],
    memory: Memory = "fetched",
    route_on: str | None = None,
    refetch: str | Refetch = "never",
    kv_cache: str = DEFAULT_KV_CACHE,
    kept: KeptCache | None = None,
) -> Scored:
    """How likely ``stream`` would have been to give this answer, token by token.

    The answer is fed in place of what the model would say; memory and cache change by the same
    :class:`Answer`, at the same tokens, with the same lag.

    Args:
        answer: tokens.
        prompt, memory, route_on, refetch, kv_cache, kept: as in ``MemoryLM.stream``.

    Raises:
        InputError: the answer is empty, or longer than the context has room for.
    """
    answer = [int(token) for token in answer]
    policy = Refetch.parse(refetch, kv_cache)
    run = lm._begin(prompt, memory, max(1, len(answer)), route_on, policy, kept)
    if not 0 < len(answer) <= run.max_tokens:
        raise InputError(
            f"the answer has {len(answer)} tokens; expected 1 to {run.max_tokens}, where the "
            "context ends"
        )
    scores: list[np.ndarray] = []

    def feed(tokens: list[int], first: int, count: int) -> None:
        """Feed tokens; the last ``count`` outputs predict the answer's tokens from ``first`` on."""
        logits = lm.model(mx.array(tokens)[None], cache=run.cache)[0].astype(mx.float32)
        targets = mx.array(answer[first : first + count])
        if len(targets):
            logits = logits[-count:][: len(targets)]
            chosen = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
            scores.append(np.array(chosen - mx.logsumexp(logits, axis=-1)))

    with lm._generating(run):
        feed(run.to_prefill, 0, 1)
        done = 0
        while done < len(answer):
            count = run.until_due()
            piece = answer[done : done + count]
            feed(piece, done + 1, len(piece))
            run.add(piece)
            done += len(piece)
            run.refetch_if_due()
    prefilled = len(run.to_prefill) + run.recomputed
    return Scored(np.concatenate(scores), run.refetches, prefilled)


def _token_scores(
    lm: MemoryLM, rows: Sequence[Sequence[int]], memories: Sequence[mx.array | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each next token (B, T - 1) float32, and whether it is the likeliest."""
    length = max(map(len, rows))
    tokens = np.zeros((len(rows), length), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    given = [memory for memory in memories if memory is not None]
    if given and len(given) != len(rows):
        raise InputError("a batch is scored with memory on or off for all; split it in two")
    memory = None
    if given:
        # One memory for all needs no copy for each sequence.
        same = all(other is given[0] for other in given)
        memory = given[0] if same else mx.concatenate(given)
    batch = mx.array(tokens)
    logits = lm.model(batch[:, :-1], memory=memory).astype(mx.float32)  # (B, T - 1, V)
    targets = batch[:, 1:]
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    logprobs = chosen - mx.logsumexp(logits, axis=-1)
    greedy = logits.argmax(axis=-1) == targets
    return np.array(logprobs), np.array(greedy)
