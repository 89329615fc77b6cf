"""The README.md of a converted model: what it was, what it is, and what --verify found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_hiermem.config import MemoryConfig

if TYPE_CHECKING:
    from .verify import Verification


def model_card(
    source: str,
    anchor: dict[str, Any],
    config: MemoryConfig | None,
    notices: Sequence[str],
    verification: Verification | None,
) -> str:
    """The text of the card.

    Args:
        source: name of the checkpoint, without its folders.
        anchor: the anchor's config.json.
        config: of the memory bank, if there is one.
        notices: what was assumed.
        verification: what ``--verify`` found, if it was asked for.
    """
    head = [
        "---",
        "library_name: mlx",
        "pipeline_tag: text-generation",
        "tags:",
        "- mlx",
        "---",
        "",
    ]
    lines = [f"Converted from PyTorch (`{_plain(source)}`) with mlx-hiermem.", ""]
    about = [f"Anchor: `{_plain(str(anchor.get('model_type')))}`"]
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        if key in anchor:
            about.append(f"{key} {anchor[key]}")
    lines += [", ".join(about) + ".", ""]
    if config is not None:
        lines += [
            f"Memory bank: kind {config.kind}, ranks {list(config.ranks)}, branching "
            f"{config.branching}, {config.dtype}"
            + ("" if config.quantization is None else f", quantised ({config.packing})")
            + f"; one fetched memory has {config.fetch_size():,} parameters, the bank "
            f"{config.bank_size():,}.",
            "",
        ]
    if notices:
        lines += [
            "Notes of the conversion:",
            "",
            *(f"- {_plain(notice)}" for notice in notices),
            "",
        ]
    if verification is not None:
        lines += [*verification_table(verification), ""]
    return "\n".join([*head, *lines])


def verification_table(found: Verification) -> list[str]:
    """The differences as a Markdown table."""
    lines = [
        f"Logits against the original in PyTorch (float32), computed in {found.dtype} on MLX's "
        f"{found.backend} backend (`mlx_hiermem convert --verify`):",
        "",
        "| memory | largest difference | mean difference | largest logit | same top token |",
        "|---|---|---|---|---|",
    ]
    for one in found.differences:
        lines.append(
            f"| {one.memory} | {one.largest:.2g} | {one.mean:.2g} | {one.scale:.3g} | "
            f"{100 * one.same:.1f} % of {one.positions} |"
        )
    return lines


def _plain(text: str) -> str:
    """Text that stays text in Markdown: on one line, without what begins code or HTML."""
    return " ".join(text.split()).replace("`", "'").replace("<", "(").replace("|", "/")[:300]
