"""The perplexity task: how well whole documents are predicted with each memory.

As in the paper each document is routed by its whole text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..corpus.sources import find_units, read_unit
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
    documents = []
    for unit in find_units([path], sys.maxsize):
        for document in read_unit(unit, "text"):
            if not document.text.strip():
                raise InputError(
                    f'{document.where()}: expected an object with a "text" that is not empty'
                )
            documents.append(document.text)
    if not documents:
        raise InputError(f"{path}: holds no document; give at least one")
    return documents


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
