"""PromptCache: keys and values of prompts and answers that have ended, for those that begin alike.

mlx-lm's ``LRUPromptCache``, under keys that hold the memory: keys and values are shaped by the
memory that they were computed with, so they are reused under the very same one and no other.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache


class PromptCache:
    """For the thread that owns the model.

    Args:
        max_bytes: of the keys and values that are kept; 0 keeps none.
        max_entries: texts that are kept.

    Attributes:
        nbytes: of what is kept.
    """

    def __init__(self, max_bytes: int, max_entries: int = 1024) -> None:
        self._max_bytes = max_bytes
        self._lru = LRUPromptCache(max_size=max_entries, max_bytes=max_bytes)

    def __len__(self) -> int:
        return len(self._lru)

    @property
    def nbytes(self) -> int:
        return self._lru.nbytes

    def take(self, key: Hashable, tokens: Sequence[int]) -> tuple[list[Any] | None, int]:
        """What is kept of the beginning of a text, as a copy.

        Args:
            key: of the memory.
            tokens: of the text; one at least is left to be fed.

        Returns:
            The anchor's entries of a prompt cache and how many tokens they hold; None and 0 if
            nothing can be reused.
        """
        # mlx-lm's own key would leave an empty tree behind for each memory that ever was. As the
        # first token it is removed with the last text that it belongs to.
        entries, rest = self._lru.fetch_nearest_cache(None, [key, *tokens])
        if entries is not None and not rest:  # the very same text was kept
            if not can_trim_prompt_cache(entries):
                return None, 0
            trim_prompt_cache(entries, 1)
            rest = tokens[-1:]
        held = len(tokens) - len(rest)
        return (entries, held) if entries is not None and held > 0 else (None, 0)

    def put(self, key: Hashable, tokens: Sequence[int], entries: list[Any]) -> None:
        """Keep the anchor's entries of a prompt cache; they belong to the cache from now on.

        Args:
            key: of the memory that they were computed with.
            tokens: that they hold.
        """
        if 0 < sum(entry.nbytes for entry in entries) <= self._max_bytes:
            # Evaluated, since what is lazy would hold on to the batch that it was cut out of.
            mx.eval([entry.state for entry in entries])
            self._lru.insert_cache(None, [key, *tokens], entries)
