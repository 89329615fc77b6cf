"""Copying a tokenizer: OpenLM's checkpoints have none, and anchors of Hugging Face bring theirs."""

from __future__ import annotations

from pathlib import Path

from mlx_hiermem.bank.files import find
from mlx_hiermem.errors import InputError
from mlx_hiermem.folders import copy_file
from mlx_hiermem.models import find_model

#: The files that make up a tokenizer, as patterns of their names. None of them is code.
PATTERNS = (
    "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.tiktoken", "spiece.model",
)  # fmt: skip
#: One of these is what a tokenizer is loaded from.
NEEDED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer's files in a folder; none if it has no tokenizer."""
    found = {path.name for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    found = {name for name in found if not name.endswith(".py")}
    return sorted(found) if found & set(NEEDED) else []


def copy_tokenizer(source: str | Path, target: Path) -> list[str]:
    """Copy a tokenizer's files; returns their names.

    Args:
        source: a folder, or a Hub repository.
        target: the model folder.

    Raises:
        ConfigError: there is no such folder or repository.
        InputError: it has no tokenizer.
        FormatError: a file cannot be read or written.
    """
    folder = find_model(source)
    names = tokenizer_files(folder)
    if not names:
        raise InputError(
            f"--tokenizer {source}: no tokenizer in it; expected one of {', '.join(NEEDED)}"
        )
    for name in names:
        copy_file(find(folder, name), target, name)
    return names
