"""Quantization: how the rows of a bank's matrices are packed into fewer bits.

Modes and layouts are MLX's (``mx.quantize``): a row of w numbers becomes w * bits / 8 bytes of
packed numbers, one scale per group, and, for ``affine``, one bias per group. Groups lie along a
row, so the rows of several blocks still join to one matrix. Nothing in here imports MLX.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import ConfigError

#: For each mode the bits and group sizes that MLX has; scales of all but ``affine`` take one byte.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}


@dataclass(frozen=True)
class Quantization:
    """``mode``, ``bits`` per number and ``group_size``, as in the config of an mlx-lm model.

    Raises:
        ConfigError: MLX has no such quantisation.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise ConfigError(
                f"quantization: mode is {str(self.mode)[:40]!r}; known are {', '.join(MODES)}"
            )
        for name, known in zip(("bits", "group_size"), MODES[self.mode], strict=True):
            value = getattr(self, name)
            if type(value) is not int or value not in known:
                raise ConfigError(
                    f"quantization: {name} is {str(value)[:40]!r}; {self.mode} has "
                    f"{', '.join(map(str, sorted(known)))}"
                )

    @classmethod
    def of(cls, values: Any) -> Quantization:
        """From the mapping of a config; unknown and missing keys are named in a ConfigError."""
        known = {"mode", "bits", "group_size"}
        if not isinstance(values, Mapping) or not {"bits", "group_size"} <= set(values) <= known:
            raise ConfigError(
                f"quantization is {str(values)[:80]!r}; expected null or an object of mode, bits "
                "and group_size"
            )
        return cls(**values)

    @classmethod
    def choose(
        cls,
        widths: Iterable[int],
        bits: int,
        mode: str | None = None,
        group_size: int | None = None,
    ) -> Quantization:
        """The quantisation to ``bits`` that fits rows of ``widths`` numbers.

        Without a mode: ``affine`` with the group size 64, or else 32; where the width divides by
        16 only, ``nvfp4`` for 4 bits.

        Raises:
            ConfigError: none fits, or what was asked for does not.
        """
        common = math.gcd(*widths)
        found: list[Quantization] = []
        failure: ConfigError | None = None
        for name in ("affine", "nvfp4") if mode is None else (mode,):
            # An unknown mode is refused before its size.
            sizes = MODES[name][1] if group_size is None and name in MODES else (group_size or 0,)
            for size in sizes:
                try:
                    found.append(cls(bits, size, name))
                except ConfigError as error:
                    failure = failure or error
        if not found and failure is not None:
            raise failure
        for one in found:
            if common % one.group_size == 0:
                return one
        if group_size is not None:
            found[0].check(common)
        raise ConfigError(
            f"quantization: rows of a multiple of {common} numbers fit no group size of "
            f"{mode or 'any mode'} with {bits} bits; widths have to divide by 32, or by 16 for "
            "nvfp4 (4 bits)"
        )

    def check(self, width: int) -> None:
        """Raise ConfigError if rows of ``width`` numbers cannot be cut into groups."""
        if width % self.group_size:
            raise ConfigError(
                f"quantization: rows of {width} numbers do not divide by group size "
                f"{self.group_size}; choose another, or nvfp4 (groups of 16)"
            )

    def row_bytes(self, width: int, dtype_bytes: int) -> tuple[int, ...]:
        """Bytes of one row of ``width`` numbers: packed numbers, scales and, if affine, biases.

        Args:
            dtype_bytes: of one number in the bank's dtype, in which affine scales are kept.
        """
        groups = width // self.group_size
        packed = width * self.bits // 8
        if self.mode == "affine":
            return packed, groups * dtype_bytes, groups * dtype_bytes
        return packed, groups

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        name = f"{self.bits}-bit affine" if self.mode == "affine" else self.mode
        return f"{name}/{self.group_size}"
