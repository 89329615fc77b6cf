"""Log-probabilities of texts under a model with memories, in batches.

One batch may hold a different memory for each sequence. Sequences are padded at the end, where the
causal mask keeps the padding from being seen.

What is held at once is bounded, since logits are large: 2,000 tokens and a vocabulary of 128,256
make 1 GB of them. So sequences of about one length share a batch, a batch has as many as fit, and a
sequence that does not fit alone goes through the prompt cache in pieces. The last hidden states
first and then the head would do as well, but what lies between the two is each anchor's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .anchors.vocabulary import check_tokens
from .errors import InputError
from .refetch import DEFAULT_KV_CACHE, Refetch

if TYPE_CHECKING:
    from .conversation import KeptCache
    from .engine import Fetched, Memory, MemoryLM

#: Bytes that the float32 logits of one step may take.
LOGITS_BYTES = 2**29

#: Bytes that the memories of a batch may take, one copy for each sequence.
MEMORY_BYTES = 2**29

#: Tokens of a sequence that are fed at once, as in mlx-lm: attention takes memory too.
_PREFILL = 2048


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
    """Score continuations after contexts.

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
    # Position t predicts token t + 1.
    return [
        (float(logprobs[start - 1 :].sum()), bool(greedy[start - 1 :].all()))
        for start, (logprobs, greedy) in zip(
            starts, _token_scores(lm, rows, memories, len(rows)), strict=True
        )
    ]


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
    texts = sorted(texts, key=len)  # so that little of a batch is padding
    together = batch_size
    if isinstance(memory, str) and memory == "fetched":  # any other is one memory for all
        together = min(batch_size, _memories_at_once(lm))
    for start in range(0, len(texts), together):
        windows: list[list[int]] = []
        owners: list[Fetched] = []
        batch = texts[start : start + together]
        fetched = lm.fetch_batch(memory, batch)
        for text, found in zip(batch, fetched, strict=True):
            tokens = lm.tokenize(text)
            length = lm.context_length or len(tokens)
            for first in range(0, len(tokens), length):
                if len(window := tokens[first : first + length]) > 1:
                    windows.append(window)
                    owners.append(found)
        scores = _token_scores(lm, windows, [found.memory for found in owners], batch_size)
        for found, (logprobs, _) in zip(owners, scores, strict=True):
            if np.isnan(logprobs).any():
                raise lm.not_a_number(found)
            total -= float(logprobs.sum())
            count += len(logprobs)
        for found in fetched:  # all that they led to are numbers by now
            found.release()
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
        InputError: the answer is empty, longer than the context has room for, or has a token that
            the anchor has not.
    """
    answer = [int(token) for token in answer]
    check_tokens("the answer", answer, lm.vocabulary)
    policy = Refetch.parse(refetch, kv_cache)
    run = lm._begin(prompt, memory, max(1, len(answer)), route_on, policy, kept)
    if not 0 < len(answer) <= run.max_tokens:
        raise InputError(
            f"the answer has {len(answer)} tokens; expected 1 to {run.max_tokens}, where the "
            "context ends"
        )
    scores: list[np.ndarray] = []
    step = min(_PREFILL, _positions_at_once(lm))

    def feed(tokens: list[int], first: int) -> None:
        """Feed tokens whose outputs predict the answer's tokens from ``first`` on."""
        logits = lm.model(mx.array(tokens)[None], cache=run.cache)[0]
        targets = mx.array(answer[first : first + len(tokens)])
        if len(targets):
            scores.append(np.array(_logprobs(logits[: len(targets)], targets)[0]))

    with lm._generating(run):
        *before, last = run.to_prefill
        for start in range(0, len(before), _PREFILL):
            lm.model(mx.array(before[start : start + _PREFILL])[None], cache=run.cache)
            mx.eval([entry.state for entry in run.cache])  # and so no logits
        feed([last], 0)
        done = 0
        while done < len(answer):
            piece = answer[done : done + min(run.until_due(), step)]
            feed(piece, done + 1)
            run.add(piece)
            done += len(piece)
            run.refetch_if_due()
    prefilled = len(run.to_prefill) + run.recomputed
    return Scored(np.concatenate(scores), run.refetches, prefilled)


def _token_scores(
    lm: MemoryLM,
    rows: Sequence[Sequence[int]],
    memories: Sequence[mx.array | None],
    most: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Score each token of each row but the first.

    Args:
        rows: tokens, two or more in each.
        memories: as in :func:`score`.
        most: rows in a batch; there are fewer where more would not fit.

    Returns:
        Per row the log-probabilities, (T - 1,) float32, in nats, and whether each token is the
        likeliest, (T - 1,) bool.
    """
    for row in rows:
        check_tokens("the text", row, lm.vocabulary)
    if len({memory is None for memory in memories}) > 1:
        raise InputError("a batch is scored with memory on or off for all; split it in two")
    if any(memory is not memories[0] for memory in memories):
        most = min(most, _memories_at_once(lm))
    positions = _positions_at_once(lm)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    while len(found) < len(rows):
        first = len(found)
        count = max(1, min(most, positions // len(rows[order[first]])))
        batch = order[first : first + count]
        logprobs, greedy = _batch_scores(
            lm,
            [rows[i] for i in batch],
            [memories[i] for i in batch],
            min(_PREFILL, max(1, positions // len(batch))),
        )
        for i, values, best in zip(batch, logprobs, greedy, strict=True):
            found[i] = values[: len(rows[i]) - 1], best[: len(rows[i]) - 1]
    return [found[i] for i in range(len(rows))]


def _batch_scores(
    lm: MemoryLM, rows: Sequence[Sequence[int]], memories: Sequence[mx.array | None], step: int
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_token_scores`, in one batch, both (B, T - 1) of the longest row's T; what stands
    behind a shorter row means nothing. ``step`` positions of each row are fed at once."""
    length = max(map(len, rows))
    tokens = np.zeros((len(rows), length), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    given = [memory for memory in memories if memory is not None]
    memory = None
    if given:
        # One memory for all needs no copy for each sequence.
        same = all(other is given[0] for other in given)
        memory = given[0] if same else mx.concatenate(given)
    inputs, targets = mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])
    cache = lm.model.make_cache() if length - 1 > step else None
    pieces = []
    for start in range(0, length - 1, step):
        logits = lm.model(inputs[:, start : start + step], cache=cache, memory=memory)
        pieces.append(_logprobs(logits, targets[:, start : start + step]))
        mx.eval(pieces[-1], [entry.state for entry in cache or ()])
    logprobs, greedy = (mx.concatenate(list(one), axis=1) for one in zip(*pieces, strict=True))
    return np.array(logprobs), np.array(greedy)


def _logprobs(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Log-probabilities of targets (..., T) under logits (..., T, V), float32, and whether each is
    the likeliest."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    return chosen - mx.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == targets


def _positions_at_once(lm: MemoryLM) -> int:
    """Positions whose logits may be there at once."""
    return max(1, LOGITS_BYTES // (4 * lm.vocabulary))


def _memories_at_once(lm: MemoryLM) -> int:
    """Different memories that may be there at once."""
    return max(1, MEMORY_BYTES // (lm.bank.config.fetch_size() * lm.dtype.size))
