"""What a client may choose of an answer: its memory, how tokens are drawn, and what ends it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..sampling import is_greedy
from .errors import invalid, shown
from .fields import Fields, check_integer, check_list, check_number, check_object, check_text
from .job import Sampling
from .memory import MemoryChoice

#: The largest id of anything.
MOST = 2**31 - 1

MOST_STOPS = 16
LONGEST_STOP = 1000  # characters
LONGEST_ROUTE = 20_000  # characters; the model's thread reads them, and others wait meanwhile
MOST_BIASES = 1024
MOST_BLOCKED = 4096
MOST_LEVELS = 64

KINDS = ("fetched", "generic", "none")


@dataclass(frozen=True)
class Limits:
    """What the model and the server allow.

    Attributes:
        model: the name that the model is served under.
        vocabulary: how many tokens there are, or None if nobody knows.
        max_tokens: the most tokens of an answer.
    """

    model: str
    vocabulary: int | None
    max_tokens: int


def read_memory(given: Any) -> MemoryChoice:
    """The ``memory`` field: a word, or an object of path or route_on, and blocked.

    Raises:
        ApiError: 400 naming the field.
    """
    if given is None:
        return MemoryChoice()
    if isinstance(given, str):
        if given not in KINDS:
            raise invalid(
                "memory", f"{shown(given)} given; expected {', '.join(KINDS)}, or an object"
            )
        return MemoryChoice(kind=given)
    if not isinstance(given, dict):
        raise invalid("memory", f"{shown(given)} given; expected a word or an object")
    fields = Fields(given, "memory")
    path, blocked = fields.take("path"), fields.take("blocked")
    route_on = fields.text("route_on", longest=LONGEST_ROUTE)
    fields.end()
    if route_on is not None and not route_on.strip():
        raise invalid("memory.route_on", "empty; give at least one word")
    if path is not None and route_on is not None:
        raise invalid("memory", "path and route_on exclude each other; give one of them")
    banned = frozenset() if blocked is None else _blocked(blocked)
    if path is None:
        return MemoryChoice(route_on=route_on, blocked=banned)
    ids = check_list(path, "memory.path", MOST_LEVELS, "clusters, one per level")
    if not ids:
        raise invalid("memory.path", "empty; give one cluster per level")
    clusters = tuple(check_integer(one, "memory.path", 0, MOST) for one in ids)
    return MemoryChoice(kind="path", path=clusters, blocked=banned)


def _blocked(given: Any) -> frozenset[tuple[int, int]]:
    name, pairs = "memory.blocked", set()
    for pair in check_list(given, name, MOST_BLOCKED, "pairs of level and cluster"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise invalid(name, f"{shown(pair)} given; expected pairs [level, cluster]")
        pairs.add((check_integer(pair[0], name, 1, MOST), check_integer(pair[1], name, 0, MOST)))
    return frozenset(pairs)


def read_sampling(fields: Fields, limits: Limits) -> Sampling:
    """How tokens are drawn.

    Raises:
        ApiError: 400 naming the field.
    """
    temperature = fields.number("temperature", 0, 2, 1.0)
    top_p = fields.number("top_p", 0, 1, 1.0)
    if is_greedy(temperature, top_p):
        temperature, top_p = 0.0, 1.0
    top_k = fields.integer("top_k", 0, MOST, 0) or 0
    if limits.vocabulary is not None and top_k >= limits.vocabulary:
        top_k = 0
    repetition = fields.number("repetition_penalty", 0, 10, 0.0)
    if 0 < repetition < 0.1:  # dividing by it would leave float16
        raise invalid("repetition_penalty", "too small; expected 0 (off), or 0.1 to 10")
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=fields.number("min_p", 0, 1, 0.0),
        seed=None if seed is None else seed % 2**64,
        frequency_penalty=fields.number("frequency_penalty", -2, 2, 0.0),
        presence_penalty=fields.number("presence_penalty", -2, 2, 0.0),
        repetition_penalty=repetition,
        logit_bias=_logit_bias(fields.take("logit_bias"), limits),
    )


def _logit_bias(given: Any, limits: Limits) -> dict[int, float]:
    if given is None:
        return {}
    biases = check_object(given, "logit_bias")
    if len(biases) > MOST_BIASES:
        raise invalid("logit_bias", f"{len(biases)} tokens; expected at most {MOST_BIASES}")
    last = MOST if limits.vocabulary is None else limits.vocabulary - 1
    found = {}
    for key, value in biases.items():
        if not re.fullmatch(r"0|[1-9]\d{0,9}", key, re.ASCII) or int(key) > last:
            raise invalid("logit_bias", f"{shown(key)} is no token; expected 0 to {last}")
        found[int(key)] = check_number(value, "logit_bias", -100, 100)
    return found


def read_stop(given: Any) -> tuple[str, ...]:
    """The ``stop`` field: a text, or a list of texts.

    Raises:
        ApiError: 400 naming the field.
    """
    if given is None:
        return ()
    texts = [given] if isinstance(given, str) else check_list(given, "stop", MOST_STOPS, "texts")
    found = tuple(check_text(one, "stop", LONGEST_STOP) for one in texts)
    if "" in found:
        raise invalid("stop", "an empty text given; leave it out")
    return found
