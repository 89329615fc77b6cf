"""The rotary embedding of an OpenLM checkpoint: its base, and whether it was rounded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_hiermem.anchors.rotary import FREQUENCY_DTYPES
from mlx_hiermem.bank.dtypes import from_storage
from mlx_hiermem.errors import ConfigError, FormatError, InputError
from mlx_hiermem.shapes import shown

from ..sources.tensor import SourceTensor
from .base import PRECISION, base_of, estimate, fits
from .fields import Fields

#: OpenLM's base, which its source does not let one change.
DEFAULT = 10_000.0
_BUFFER = re.compile(r"layers\.\d+\.attention\.pos_embed\.inv_freq")
_AUTOCAST = ("amp_bf16", "amp_bfloat16")


@dataclass
class Rotary:
    """Base of the frequencies, whether they are rounded to bfloat16, and what was assumed."""

    theta: float
    rounded: bool
    notices: list[str] = field(default_factory=list)


def rotary_of(
    fields: Fields,
    tensors: Mapping[str, SourceTensor],
    kind: str,
    head_dim: int,
    key_norm: str | None,
    *,
    theta: float | None,
    rounded: bool,
) -> Rotary:
    """Find the base and the rounding.

    Args:
        kind: of the rotary embedding.
        head_dim: numbers of a head.
        key_norm: the kind of the norm of queries and keys; None: there is none.
        theta, rounded: what the user asks for.

    Raises:
        ConfigError, InputError, FormatError: as ``config.read_openlm_config``.
    """
    if theta is not None and (
        type(theta) not in (int, float) or not 1 < theta < float("inf")  # nan is refused too
    ):
        raise InputError(f"--rope-theta {shown(theta)}: expected a finite number above 1")
    if rounded and kind != "rotary":
        raise InputError(
            f"--rope-bf16: the checkpoint's positional_embedding_type is {kind}; OpenLM rounds the "
            "frequencies of rotary only"
        )
    said_dtype = fields.one_of("rope_inv_freq_dtype", FREQUENCY_DTYPES)
    said = fields.positive("rope_theta")
    if said is not None and said <= 1:
        fields.said["rope_theta"].refuse("expected a number above 1")
    if kind == "none":
        return Rotary(theta or said or DEFAULT, False)
    if head_dim % 2:
        raise ConfigError(
            f"{fields.known_files()}: heads of {head_dim} numbers; a rotary embedding needs an "
            "even number; give the size of a head with --head-dim"
        )
    found = Rotary(DEFAULT, rounded or said_dtype == "bfloat16")
    buffers = _buffers(tensors, head_dim)
    base = _base(fields, buffers, found, theta, said)
    if kind == "rotary" and not found.rounded:
        _tell_of_rounding(fields, key_norm, base, found)
    return found


def _buffers(tensors: Mapping[str, SourceTensor], head_dim: int) -> dict[str, Any]:
    """Name, numbers and dtype of the first ``inv_freq``, which all others have to equal."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not _BUFFER.fullmatch(name):
            continue
        if tensor.dtype not in PRECISION:
            raise FormatError(
                f"{tensor.where} is stored as {tensor.dtype}; expected {', '.join(PRECISION)}"
            )
        if tensor.shape != (head_dim // 2,):
            raise ConfigError(
                f"{tensor.where} has the shape {tensor.shape}; expected ({head_dim // 2},), half "
                f"of a head of {head_dim} numbers; give the size of a head with --head-dim"
            )
        numbers = from_storage(tensor.read(), tensor.dtype)
        if not found:
            found = {"where": tensor.where, "numbers": numbers, "dtype": tensor.dtype}
        elif numbers.tobytes() != found["numbers"].tobytes():
            raise FormatError(
                f"{tensor.where} is not {found['where']}; expected the same frequencies in all "
                "layers"
            )
    return found


def _base(
    fields: Fields,
    buffer: Mapping[str, Any],
    found: Rotary,
    given: float | None,
    said: float | None,
) -> bool:
    """Set the base; returns whether the buffer holds rounded frequencies."""
    if not buffer or len(buffer["numbers"]) < 2:
        found.theta = float(given or said or DEFAULT)
        if given is None and said is None:
            found.notices.append(
                "Neither a config nor the checkpoint says the base of the rotary embedding; "
                "OpenLM's 10,000 is taken. The paper's anchors have 100,000: give --rope-theta "
                "100000 for one."
            )
        return False
    numbers, where, dtype = buffer["numbers"], buffer["where"], buffer["dtype"]
    base = base_of(numbers, dtype)
    told = given or said
    if base is None and told is None:
        about = estimate(numbers)
        raise ConfigError(
            f"{where}: its frequencies are not the powers of one base"
            + (f" (the last one alone says {about:.6g})" if np.isfinite(about) else "")
            + "; give the base with --rope-theta"
        )
    if told is None:
        assert base is not None
        found.theta = base.value
    else:
        precision = PRECISION["bfloat16" if base is not None and base.rounded else dtype]
        if not fits(numbers.astype(np.float64), told, precision):
            says = "those of no base" if base is None else f"those of {base.value:,.6g}"
            if given is None:
                fields.said["rope_theta"].refuse(
                    f"but the frequencies in {where} are {says}; give --rope-theta"
                )
            found.notices.append(
                f"--rope-theta {told:,.6g} is taken, although the frequencies in {where} are "
                f"{says}."
            )
        found.theta = float(told)
    return base is not None and base.rounded


def _tell_of_rounding(
    fields: Fields, key_norm: str | None, rounded_buffer: bool, found: Rotary
) -> None:
    """A notice where the original has rounded its frequencies and the result would not.

    They are rounded to the dtype of the keys. Under autocast a linear layer gives bfloat16; so do
    the ``lp`` norms, while PyTorch's own LayerNorm, and a gain in float32, give float32. FSDP's
    mixed precision rounds the buffer itself.
    """
    said = fields.said.get("precision")
    precision = None if said is None else said.value
    keys = precision == "bf16" or (
        precision in _AUTOCAST and (key_norm is None or "lp_layer_norm" in key_norm)
    )
    fsdp = [name for name in ("fsdp_amp", "fsdp_pure_bf16") if _true(fields, name)]
    if rounded_buffer:
        reason = "the frequencies in the checkpoint are numbers of bfloat16"
    elif fsdp:
        reason = f"{fields.said[fsdp[0]].where} is True"
    elif keys and said is not None:
        reason = f"{said.where} is {precision}"
    else:
        return
    found.notices.append(
        f"The original rounded the frequencies of its rotary embedding to bfloat16 ({reason}); far "
        "into a context that is another angle. --rope-bf16 does the same."
    )


def _true(fields: Fields, name: str) -> bool:
    said = fields.said.get(name)
    return said is not None and said.value is True
