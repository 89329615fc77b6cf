"""Answers: requests become streams of a model, with what is kept of each visitor between them.

For the model's thread alone: conversations hold KV caches, which are MLX arrays.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Generator, Hashable
from contextlib import closing
from typing import TYPE_CHECKING

from .facts import Held, found
from .tickets import Ask, Began

if TYPE_CHECKING:
    from mlx_hiermem.conversation import Conversation
    from mlx_hiermem.engine import MemoryLM, Response

#: Conversations whose KV cache is kept; that of the one silent longest is dropped, and made anew
#: when it goes on.
KEPT = 16


class Answers:
    """What the model's thread knows beside the model.

    Attributes:
        conversations: of the visitors who have one, the one silent longest first.
    """

    def __init__(self) -> None:
        self.conversations: OrderedDict[Hashable, Conversation] = OrderedDict()
        self._blocks = self._hits = 0

    def stream(
        self, lm: MemoryLM, ask: Ask, visitor: Hashable
    ) -> Generator[Began | Response, None, None]:
        """Answer a request: :class:`Began`, then the pieces as from ``MemoryLM.stream``.

        Raises:
            HierMemError: as ``MemoryLM.stream``.
        """
        start = time.perf_counter()
        with closing(self._responses(lm, ask, visitor)) as responses:
            for count, response in enumerate(responses):
                if not count:
                    hits, blocks = found(response.fetch)
                    self._hits += hits
                    self._blocks += blocks
                    yield Began(time.perf_counter() - start, self._held(lm))
                yield response

    def _responses(
        self, lm: MemoryLM, ask: Ask, visitor: Hashable
    ) -> Generator[Response, None, None]:
        from mlx_hiermem.conversation import chat_tokens

        if ask.turn:
            talk = self._conversation(lm, visitor)
            talk.memory, talk.blocked = ask.memory, ask.blocked
            yield from talk.answer(ask.prompt, ask.max_tokens)
            return
        prompt: str | list[int] = ask.prompt
        if lm.tokenizer.has_chat_template and ask.prompt.strip():
            prompt = chat_tokens(lm, [{"role": "user", "content": ask.prompt}])
        yield from lm.stream(
            prompt, ask.memory, ask.max_tokens, route_on=ask.prompt, blocked=ask.blocked
        )

    def _conversation(self, lm: MemoryLM, visitor: Hashable) -> Conversation:
        from mlx_hiermem.conversation import Conversation

        talk = self.conversations.setdefault(visitor, Conversation(lm))
        self.conversations.move_to_end(visitor)
        for silent in list(self.conversations.values())[:-KEPT]:
            silent.kept.clear()
        return talk

    def drop(self, visitor: Hashable) -> None:
        """Forget a visitor's conversation, if there is one."""
        self.conversations.pop(visitor, None)

    def _held(self, lm: MemoryLM) -> Held:
        bank = lm.bank
        resident = sum(
            bank.config.clusters(level) * bank.config.block_bytes(level)
            for level in bank.resident_levels
        )
        resident = min(resident, bank.bytes_held)  # a part of a bank holds less
        return Held(resident, bank.bytes_held - resident, self._blocks, self._hits)
