"""What the paper claims, as conditions on our figures: what agrees, and what does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Values = Mapping[str, float]


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        text: of it.
        holds: whether it does, by the values of a study's rows; KeyError where one is missing.
    """

    text: str
    holds: Callable[[Values], bool]


def rising(values: Sequence[float]) -> bool:
    """Whether each is larger than the one before."""
    return all(a < b for a, b in pairwise(values))


def _facts(values: Values, study: str, labels: Sequence[str]) -> list[float]:
    return [values[f"{study}.facts@{label}"] for label in labels]


def _labels(values: Values, prefix: str) -> list[str]:
    return [id.partition("@")[2] for id in values if id.startswith(f"{prefix}@")]


def _ffn_is_best(values: Values) -> bool:
    by_size: dict[str, dict[str, float]] = {}
    for label in _labels(values, "kinds.facts"):
        kind, size = label.rsplit("-", 1)
        by_size.setdefault(size, {})[kind] = values[f"kinds.facts@{label}"]
    return all(max(kinds, key=kinds.__getitem__) == "ffn" for kinds in by_size.values())


def _attention_is_behind(values: Values) -> bool:
    by_size: dict[str, dict[str, float]] = {}
    for label in _labels(values, "kinds.facts"):
        kind, size = label.rsplit("-", 1)
        by_size.setdefault(size, {})[kind] = values[f"kinds.facts@{label}"]
    return all(
        min(kinds["ffn"], kinds["lora_ffn"]) > max(kinds[k] for k in ("lora_qk", "lora_vo", "kv"))
        for kinds in by_size.values()
    )


def _grid(values: Values) -> dict[int, dict[int, float]]:
    """Facts by rank and level."""
    found: dict[int, dict[int, float]] = {}
    for label in _labels(values, "bank_sizes.facts"):
        rank, level = map(int, label.split("-"))
        found.setdefault(rank, {})[level] = values[f"bank_sizes.facts@{label}"]
    return found


def _larger_fetches(values: Values) -> bool:
    grid = _grid(values)
    levels = next(iter(grid.values()))
    return all(rising([grid[rank][level] for rank in sorted(grid)]) for level in levels)


def _larger_banks(values: Values) -> bool:
    return all(rising([row[level] for level in sorted(row)]) for row in _grid(values).values())


def _best_share(values: Values) -> bool:
    labels = _labels(values, "shares.facts")
    best = max(labels, key=lambda label: values[f"shares.facts@{label}"])
    return 5 <= float(best.rstrip("%")) <= 20


def _rarer_gains_more(values: Values) -> bool:
    buckets = sorted({int(one.split("-")[0]) for one in _labels(values, "frequency.facts")})
    return rising(
        [
            values[f"frequency.facts@{bucket}-fetched"]
            - values[f"frequency.facts@{bucket}-generic"]
            for bucket in buckets
        ]
    )


def _rarest_elements_gain(values: Values) -> bool:
    rarest = max(int(one.split("-")[0]) for one in _labels(values, "frequency.atomic"))
    found = {one: values[f"frequency.atomic@{rarest}-{one}"] for one in ("fetched", "generic")}
    return found["fetched"] > found["generic"]


def _blocking_takes_most(values: Values) -> bool:
    whole, blocked, none = (
        values[f"blocking.accuracy@{one}"] for one in ("nearest-0", "nearest-1", "none")
    )
    return whole > none and blocked - none < (whole - none) / 2


def _sk(values: Values, label: str) -> float:
    return values[f"regimes.SK@{label}"]


#: Study -> claims of the paper.
CLAIMS: dict[str, tuple[Claim, ...]] = {
    "train_step": (
        Claim(
            "a step with memories takes less than 1.7 times the anchor's own",
            lambda v: max(v["train.frozen_vs_anchor"], v["train.cotrain_vs_anchor"]) < 1.7,
        ),
    ),
    "frequency": (
        Claim(
            "the rarer a fact, the more fetched memory adds to what generic memory gives",
            _rarer_gains_more,
        ),
        Claim(
            "the atomic numbers of the rarest elements: fetched memory is ahead of generic",
            _rarest_elements_gain,
        ),
    ),
    "kinds": (
        Claim("FFN memories are the best kind at every size", _ffn_is_best),
        Claim("memories in the FFN are ahead of those in the attention", _attention_is_behind),
    ),
    "levels": (
        Claim(
            "at one fetch size, the deeper the level the better",
            lambda v: rising(_facts(v, "levels", [f"level-{i}" for i in range(1, 5)])),
        ),
    ),
    "sizes": (
        Claim(
            "a bigger fetch is better",
            lambda v: rising(_facts(v, "sizes", _labels(v, "sizes.facts"))),
        ),
    ),
    "bank_sizes": (
        Claim("a bigger fetch is better, at each level", _larger_fetches),
        Claim("a bigger bank is better, at each fetch size", _larger_banks),
    ),
    "shares": (Claim("a memory of about a tenth of the size at run time is best", _best_share),),
    "learning": (
        Claim(
            "co-training ends ahead of memories on a frozen anchor",
            lambda v: v["learning.facts@co-trained"] > v["learning.facts@frozen"],
        ),
    ),
    "blocking": (
        Claim(
            "blocking the best-matching 1/16 of the bank takes most of what memory adds",
            _blocking_takes_most,
        ),
    ),
    "regimes": (
        Claim(
            "co-training is the best regime on specific knowledge",
            lambda v: (
                _sk(v, "A2-co-trained")
                > max(_sk(v, "A3-frozen"), _sk(v, "A4-from-scratch"), _sk(v, "A1-none"))
            ),
        ),
        Claim(
            "each regime is ahead of no memory on specific knowledge",
            lambda v: (
                min(_sk(v, label) for label in ("A2-co-trained", "A3-frozen", "A4-from-scratch"))
                > _sk(v, "A1-none")
            ),
        ),
    ),
    "rag": (
        Claim(
            "memory scores higher than documents in the context",
            lambda v: (
                v["rag.accuracy@memory"]
                > max(v["rag.accuracy@bare+rag1"], v["rag.accuracy@bare+rag3"])
            ),
        ),
        Claim(
            "memory costs about 1.1 times the operations",
            lambda v: 1.05 <= v["rag.flops@memory"] <= 1.15,
        ),
        Claim(
            "one document costs 1.7 to 2.3 times the operations",
            lambda v: 1.7 <= v["rag.flops@bare+rag1"] <= 2.3,
        ),
    ),
    "placement": (
        Claim(
            "late is best on facts",
            lambda v: (
                max(_labels(v, "placement.facts"), key=lambda one: v[f"placement.facts@{one}"])
                == "late"
            ),
        ),
        Claim(
            "early is worst",
            lambda v: (
                min(_labels(v, "placement.facts"), key=lambda one: v[f"placement.facts@{one}"])
                == "early"
            ),
        ),
    ),
}


def verdicts(study: str, values: Values) -> list[tuple[str, bool | None]]:
    """Each claim about a study, and whether it holds; None where rows are missing."""
    found: list[tuple[str, bool | None]] = []
    for claim in CLAIMS.get(study, ()):
        try:
            found.append((claim.text, claim.holds(values)))
        except (KeyError, StopIteration, ValueError):
            found.append((claim.text, None))
    return found
