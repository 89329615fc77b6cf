"""The perplexity task: how well whole documents are predicted with each memory.

As in the paper each document is routed by its whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import InputError

if TYPE_CHECKING:
    from ..engine import MemoryLM

#: The memories that are compared, in the order of the output.
MEMORIES = ("none", "generic", "fetched")


def read_documents(path: str | Path) -> list[str]:
    """The documents of a file: ``.jsonl``, one object with a ``text`` a line, or ``.txt``, where
    blank lines stand between them.

    Raises:
        InputError: the file cannot be read, is of another kind, or holds no document; the text
            names the line.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise InputError(
            f"{path}: the name ends in {path.suffix!r}; expected .jsonl (one object with a text a "
            "line) or .txt (blank lines between documents)"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; convert it") from None
    if path.suffix == ".txt":
        documents = [part.strip() for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]
    else:
        # Not splitlines: JSON may hold other line separators within a string.
        lines = enumerate(text.split("\n"), 1)
        documents = [_text(line, f"{path}: line {i}") for i, line in lines if line.strip()]
    if not documents:
        raise InputError(f"{path}: holds no document; give at least one")
    return documents


def _text(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: expected an object with a "text" that is not empty')
    return text


def compare(lm: MemoryLM, documents: Sequence[str]) -> dict[str, Any]:
    """Perplexity per token with each memory.

    Returns:
        ``{"none": ..., "generic": ..., "fetched": ..., "documents": n}``

    Raises:
        InputError: no document has two tokens.
    """
    result: dict[str, Any] = {}
    with tqdm(MEMORIES, disable=None) as bar:
        for memory in bar:
            bar.set_description(memory)
            result[memory] = lm.perplexity(documents, memory)
    return {**result, "documents": len(documents)}
