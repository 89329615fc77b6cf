"""TrainConfig: everything that steers the numbers of one training run; Cadence: how often it tells.

Regimes (section 3 and appendix A of the paper):

- ``anchor``: the bare anchor, no memories;
- ``frozen``: only memories learn, on a trained anchor (post-hoc);
- ``cotrain``: anchor and memories learn together, from a trained anchor;
- ``scratch``: both together, from random weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..errors import TrainingError

Regime = Literal["anchor", "frozen", "cotrain", "scratch"]
REGIMES: tuple[str, ...] = get_args(Regime)

#: The paper's numbers: peak and final learning rate, weight decay, warm-up steps.
PAPER: dict[str, dict[str, Any]] = {
    "anchor": {
        "learning_rate": 5e-3,
        "final_learning_rate": 5e-5,
        "weight_decay": 0.05,
        "warmup_steps": 10_000,
    },
    "frozen": {
        "learning_rate": 1e-4,
        "final_learning_rate": 1e-5,
        "weight_decay": 1e-3,
        "warmup_steps": 0,
    },
    "cotrain": {
        "learning_rate": 1e-4,
        "final_learning_rate": 1e-5,
        "weight_decay": 1e-3,
        "warmup_steps": 0,
    },
    "scratch": {
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-5,
        "weight_decay": 0.1,
        "warmup_steps": 0,
    },
}


_OF_REGIME = "the paper's for the regime"
_FILLED_IN = "what was not given is filled in with the paper's when a config is made"


def _help(text: str, default: str | None = None) -> dict[str, Any]:
    return {"help": text} | ({} if default is None else {"default": default})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; what is None here is filled in with the paper's number of the regime.

    A batch is ``batch_size * grad_accumulation_steps`` sequences, over all processes together.

    Raises:
        TrainingError: a value is out of range.
    """

    regime: Regime = field(
        default="cotrain", metadata=_help("what learns: the anchor, memories on it, or both")
    )
    iters: int = field(default=1000, metadata=_help("optimizer steps"))
    batch_size: int = field(
        default=8, metadata=_help("sequences computed at a time, over all processes together")
    )
    grad_accumulation_steps: int = field(
        default=1, metadata=_help("such batches before each optimizer step")
    )
    learning_rate: float | None = field(
        default=None, metadata=_help("peak learning rate", _OF_REGIME)
    )
    final_learning_rate: float | None = field(
        default=None, metadata=_help("where the cosine of the learning rate ends", _OF_REGIME)
    )
    warmup_steps: int | None = field(
        default=None, metadata=_help("steps of linear warm-up", _OF_REGIME)
    )
    weight_decay: float | None = field(
        default=None, metadata=_help("AdamW's decoupled decay", _OF_REGIME)
    )
    clip: float = field(default=1.0, metadata=_help("largest norm of all gradients together"))
    anchor_share: float = field(
        default=1.0,
        metadata=_help("the anchor's learning rate beside memories, as a share of theirs"),
    )
    generic_probability: float | None = field(
        default=None,
        metadata=_help(
            "share of the sequences that use the generic memory; 1 trains it alone",
            "1/(k+1), 0 with --subtree",
        ),
    )
    document_mask: bool = field(
        default=True, metadata=_help("keep attention inside documents (anchors of this package)")
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata=_help(
            "of the computation; weights and optimizer state are kept in float32",
            "bfloat16 on a GPU, else float32",
        ),
    )
    grad_checkpoint: bool = field(
        default=False, metadata=_help("recompute activations in the backward pass: less memory")
    )
    seed: int = field(
        default=0, metadata=_help("of start values, order, and choice of generic sequences")
    )

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise TrainingError(f"regime {self.regime!r}: expected one of {', '.join(REGIMES)}")
        for name, value in PAPER[self.regime].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, low in (
            ("iters", 1),
            ("batch_size", 1),
            ("grad_accumulation_steps", 1),
            ("warmup_steps", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value < low:
                raise TrainingError(f"{name} is {value}: expected at least {low}")
        for name in ("learning_rate", "final_learning_rate", "weight_decay", "anchor_share"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise TrainingError(f"{name} is {value}: expected a number from 0 on")
        if not 0 < self.clip:
            raise TrainingError(f"clip is {self.clip}: expected more than 0 (inf: no clipping)")
        if self.generic_probability is not None and not 0 <= self.generic_probability <= 1:
            raise TrainingError(
                f"generic_probability is {self.generic_probability}: expected 0 to 1"
            )

    @classmethod
    def defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The defaults that depend on the regime."""
        return dict(PAPER.get(given.get("regime", "cotrain"), {}))

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step, over all processes."""
        return self.batch_size * self.grad_accumulation_steps

    @property
    def with_memory(self) -> bool:
        """Whether the regime has memories."""
        return self.regime != "anchor"

    @property
    def trains_anchor(self) -> bool:
        """Whether the anchor's weights learn."""
        return self.regime != "frozen"

    def generic_share(self, branching: int) -> float:
        """Share of the sequences that use the generic memory: 1/(k+1) unless set (the paper)."""
        return 1 / (branching + 1) if self.generic_probability is None else self.generic_probability

    @property
    def decay(self) -> float:
        """``weight_decay``: the one given, or the paper's."""
        assert self.weight_decay is not None, _FILLED_IN
        return self.weight_decay

    def rate(self, step: int) -> float:
        """Learning rate at ``step`` (from 0): linear warm-up, then a cosine to the final rate."""
        peak, final, warmup = self.learning_rate, self.final_learning_rate, self.warmup_steps
        assert peak is not None and final is not None and warmup is not None, _FILLED_IN
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, self.iters - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return final + (peak - final) * cosine


@dataclass(frozen=True)
class Cadence:
    """How often a run reports, validates and saves; none of it changes what is learned."""

    steps_per_report: int = field(
        default=10, metadata={"help": "steps between the lines that are printed"}
    )
    steps_per_eval: int = field(default=200, metadata={"help": "steps between validations"})
    val_batches: int = field(
        default=25, metadata={"help": "held-out batches of each validation; 0: none"}
    )
    save_every: int = field(default=100, metadata={"help": "steps between checkpoints"})

    def __post_init__(self) -> None:
        for name in ("steps_per_report", "steps_per_eval", "save_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.val_batches < 0:
            raise TrainingError(f"val_batches is {self.val_batches}: expected 0 or more")
