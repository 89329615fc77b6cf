"""Which settings of a sampler leave the likeliest token alone."""

from __future__ import annotations

# The inverse of a smaller temperature is no float32.
_COLDEST = 1e-6
# A smaller share float32 cannot tell from none, which mlx-lm's samplers take for all of it.
_NARROWEST = 1e-4


def is_greedy(temperature: float, top_p: float) -> bool:
    """Whether a temperature, or a share of the probability that is drawn from, is as good as 0."""
    return temperature < _COLDEST or top_p < _NARROWEST
