"""Request: everything that a conversion is asked for."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mlx_hiermem.config import ENCODER_TYPES
from mlx_hiermem.errors import InputError

DEFAULT_BITS = 4


@dataclass(frozen=True)
class Request:
    """The options of ``mlx_hiermem convert``, under their names (docs/convert.md).

    ``quantize`` is None, "all", "bank" or "anchor"; ``encoder`` the entry of a memory's config.
    """

    model: str
    mlx_path: Path
    revision: str | None = None
    bank: Path | None = None
    memory_config: Path | None = None
    key_map: Path | None = None
    ignore: str | None = None
    zero_generic: bool = False
    tree: Path | None = None
    encoder: Mapping[str, Any] | None = None
    model_config: Path | None = None
    tokenizer: str | None = None
    head_dim: int | None = None
    rope_theta: float | None = None
    rope_bf16: bool = False
    dtype: str | None = None
    quantize: str | None = None
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str | None = None
    overwrite: bool = False
    dry_run: bool = False
    verify: bool = False

    @classmethod
    def of(cls, args: Namespace) -> Request:
        """From the arguments of the command line.

        Raises:
            InputError: ``--encoder`` is no JSON object with a known type.
        """
        values = {field.name: getattr(args, field.name) for field in fields(cls)}
        for name in ("mlx_path", "bank", "memory_config", "key_map", "tree", "model_config"):
            if values[name] is not None:
                values[name] = Path(values[name]).expanduser()
        if values["encoder"] is not None:
            values["encoder"] = _encoder(values["encoder"])
        return cls(**values)

    @property
    def packs_bank(self) -> bool:
        """Whether the blocks are quantised."""
        return self.quantize in ("all", "bank")

    @property
    def packs_anchor(self) -> bool:
        """Whether the anchor is quantised."""
        return self.quantize in ("all", "anchor")

    def decisions(self) -> dict[str, Any]:
        """The options that the result depends on, for JSON: what resumes compares them.

        Files are paths here; what is in them is compared by ``Conversion.fingerprint``.
        """
        left_out = ("overwrite", "dry_run", "verify", "mlx_path")
        values = {k: v for k, v in vars(self).items() if k not in left_out}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def _encoder(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("type") not in ENCODER_TYPES:
        raise InputError(
            f"--encoder {text[:60]!r}: expected a JSON object whose type is one of "
            f"{', '.join(ENCODER_TYPES)}"
        )
    return found
