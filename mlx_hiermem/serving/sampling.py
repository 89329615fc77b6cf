"""How a request's tokens are drawn: mlx-lm's samplers, with random numbers of the request's own.

Notable: mlx-lm's samplers draw from the thread's random state, which all requests of a batch would
share, so that an answer depended on what else is answered. Here that state is set anew before each
draw, from a generator that belongs to the request. So a seed gives the same answer in any company.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ..sampling import is_greedy
from .job import Sampling

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def sampler(sampling: Sampling, vocabulary: int) -> Sampler:
    """What draws tokens (B,) from log-probabilities (B, vocabulary).

    Greedy requests share one function, which lets mlx-lm draw for all of them at once.
    """
    if is_greedy(sampling.temperature, sampling.top_p):
        return make_sampler(temp=0.0)
    draw = make_sampler(
        temp=sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_k=sampling.top_k if sampling.top_k < vocabulary else 0,  # all of them
    )
    seed = sampling.seed  # None: from the system
    numbers = random.Random(None if seed is None else seed % 2**64)  # which drops the sign else

    def own(logprobs: mx.array) -> mx.array:
        mx.random.seed(numbers.getrandbits(64))
        return draw(logprobs)

    return own


def logits_processors(sampling: Sampling) -> list[LogitsProcessor]:
    """Bias and penalties, as mlx-lm applies them.

    The first does nothing: where no request of a batch had any, mlx-lm before 0.32 would keep them
    in their old places as requests come and go.
    """
    return [
        _unchanged,
        *make_logits_processors(
            logit_bias=dict(sampling.logit_bias),
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
        ),
    ]


def _unchanged(tokens: mx.array, logits: mx.array) -> mx.array:
    return logits
