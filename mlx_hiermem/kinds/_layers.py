"""Finding the parts of an anchor's layer by how it is built, not by the architecture's name."""

from __future__ import annotations

import mlx.nn as nn

from ._kind import NoPlace

GATED_FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def part_of(layer: nn.Module, what: str, names: tuple[str, ...]) -> nn.Module:
    """The one child of a layer that has the linear layers ``names``.

    Raises:
        NoPlace: there is none, or more than one, or one of them is not a plain linear layer.
    """
    children = {
        name: child for name, child in layer.children().items() if isinstance(child, nn.Module)
    }
    found = [child for child in children.values() if all(name in child for name in names)]
    if len(found) != 1:
        has = ", ".join(
            f"{name} ({', '.join(child.children()) or type(child).__name__})"
            for name, child in children.items()
        )
        raise NoPlace(
            f"has {'no' if not found else 'more than one'} {what} with {', '.join(names)}; "
            f"it has {has[:300] or 'no parts'}"
        )
    for name in names:
        sizes(found[0], name)
    return found[0]


def sizes(part: nn.Module, name: str) -> tuple[int, int]:
    """Width of what a linear layer takes, and of what it gives.

    Raises:
        NoPlace: it is none of MLX's own, quantised or not.
    """
    linear = part[name]
    if hasattr(linear, "linear"):  # with an adapter of mlx-lm around it
        linear = linear.linear
    if isinstance(linear, nn.QuantizedLinear):
        return linear.weight.shape[-1] * 32 // linear.bits, linear.weight.shape[0]
    if isinstance(linear, nn.Linear):
        return linear.weight.shape[1], linear.weight.shape[0]
    raise NoPlace(f"has a {name} that is a {type(part[name]).__name__}, not a linear layer")


def check_sizes(part: nn.Module, name: str, expected: tuple[int, int]) -> None:
    """Raise NoPlace where a linear layer is not from and to widths that config.json tells."""
    if (found := sizes(part, name)) != expected:
        raise NoPlace(
            f"has a {name} from {found[0]} to {found[1]} numbers, where the anchor's config says "
            f"{expected[0]} to {expected[1]}"
        )
