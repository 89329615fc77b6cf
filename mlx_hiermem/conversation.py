"""A conversation: its messages, the memory of each turn, and the KV cache from turn to turn.

Notable: a chat template may write the history otherwise than it was generated, so what is reused
of the KV cache is what a turn's tokens begin with, compared token by token, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

from mlx_lm.models.cache import trim_prompt_cache

from .errors import FormatError, one_line
from .owner import owned
from .refetch import Refetch, memory_key

if TYPE_CHECKING:
    import mlx.core as mx

    from .engine import Fetched, MemoryLM, Response
    from .memories import MemoryModel


class HasTokenizer(Protocol):
    """What has a tokenizer of mlx-lm."""

    @property
    def tokenizer(self) -> Any:
        """It."""


class KeptCache:
    """The KV cache of a text that has ended, for the next one that begins alike.

    It belongs to one model, and to one answer at a time: who takes it leaves it empty, until that
    answer has ended. An answer that fails leaves it empty for good.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what is kept."""
        self._entries: list[Any] = []
        self._tokens: list[int] = []
        self._shaped_by: set[Hashable] = set()

    def __len__(self) -> int:
        """Tokens whose keys and values are kept."""
        return len(self._tokens)

    def put(self, entries: list[Any], tokens: Sequence[int], shaped_by: set[Hashable]) -> None:
        """Keep the anchor's entries of a prompt cache, evaluated.

        Args:
            entries: without the one that holds the memory.
            tokens: that they hold.
            shaped_by: keys of the memories with which they were computed.
        """
        self._entries, self._tokens, self._shaped_by = entries, list(tokens), set(shaped_by)

    def take(
        self, model: MemoryModel, tokens: Sequence[int], fetched: Fetched, kv_cache: str
    ) -> tuple[list[Any], int, set[Hashable]]:
        """A prompt cache for ``tokens`` with a memory, that holds as much of them as can be reused.

        Nothing is reused if ``kv_cache`` is "recompute" and another memory has shaped what is kept,
        if the two texts begin differently, or if the anchor's caches cannot be trimmed to what
        they share. One token at least is left to be fed.

        Returns:
            The cache, how many tokens it holds, and the keys of the memories that shaped it once
            the rest is prefilled.
        """
        entries, held, shaped_by = self._entries, self._tokens, self._shaped_by
        self.clear()
        key = memory_key(fetched)
        pairs = zip(held, tokens[:-1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        surplus = len(held) - same
        if not same or (kv_cache == "recompute" and shaped_by != {key}):
            same = 0
        elif surplus and trim_prompt_cache(entries, surplus) != surplus:
            same = 0  # it trims all of them or none
        if not same:
            return model.make_cache(fetched.memory), 0, {key}
        return [*entries, model.memory_entry(fetched.memory)], same, shaped_by | {key}


class Conversation:
    """A chat with a model.

    Without a chat template nothing is kept between turns: each text is a prompt of its own.

    Args:
        lm: the model.
        memory: as in ``MemoryLM.fetch``; may be changed between turns.
        refetch: may be changed between turns. "turn": each message is routed anew. "tokens:N":
            besides, the answer's own text is. "never": the memory that is in use stays, from the
            first message on. Blocks that are blocked meanwhile are left out at the next turn.
        blocked: blocks (level, cluster) that this conversation's memories are fetched without; may
            be changed between turns.

    The KV cache of the turns before is reused, so only new tokens are prefilled, as long as the
    memory is the same one; when it changes, ``refetch.kv_cache`` decides.

    Attributes:
        messages: so far, as a chat template takes them.
        kept: the KV cache of the turns before.
    """

    def __init__(
        self,
        lm: MemoryLM,
        memory: str | Sequence[int] = "fetched",
        refetch: str | Refetch = "turn",
        blocked: Collection[tuple[int, int]] = (),
    ):
        self.lm = lm
        self.memory = memory
        self.blocked = blocked
        self.refetch = refetch
        self.messages: list[dict[str, str]] = []
        self.kept = KeptCache()
        self._path: tuple[int, ...] | None = None  # of the memory that was fetched last

    @property
    def refetch(self) -> Refetch:
        """When another memory is fetched; takes the words of it too."""
        return self._refetch

    @refetch.setter
    def refetch(self, refetch: str | Refetch) -> None:
        self._refetch = Refetch.parse(refetch)

    @property
    def is_kept(self) -> bool:
        """Whether turns know of the turns before."""
        return self.lm.tokenizer.has_chat_template

    def check_thread(self) -> None:
        """Raise ThreadError in another thread than the one that the model belongs to."""
        self.lm.check_thread()

    @owned
    def answer(
        self,
        text: str,
        max_tokens: int = 256,
        sampler: Callable[[mx.array], mx.array] | None = None,
        **options: Any,
    ) -> Generator[Response, None, None]:
        """Say something; the answer comes piece by piece, as from ``MemoryLM.stream``.

        The turn is part of the conversation once its last piece was taken; an answer that is broken
        off, or fails, never was.

        Raises:
            InputError: the conversation is longer than the context.
            FormatError: the chat template cannot be applied.
        """
        if not self.is_kept:
            yield from self.lm.stream(
                text,
                self.memory,
                max_tokens,
                sampler,
                refetch=self.refetch,
                blocked=self.blocked,
                **options,
            )
            return
        messages = [*self.messages, {"role": "user", "content": text}]
        stays = self.refetch.when == "never" and self.memory == "fetched" and bool(self._path)
        memory = (self._path if stays else None) or self.memory
        pieces = self.lm.stream(
            chat_tokens(self.lm, messages),
            memory,
            max_tokens,
            sampler,
            route_on=text,
            refetch=self.refetch,
            kept=self.kept,
            blocked=self.blocked,
            **options,
        )
        answer, ended = "", False
        with closing(pieces):
            for piece in pieces:
                if piece.path is not None:
                    self._path = piece.path.ids
                answer += piece.text
                ended = piece.finish_reason is not None
                if ended:
                    self.messages = [*messages, {"role": "assistant", "content": answer}]
                yield replace(piece, memory="fetched") if stays else piece

    def reset(self) -> None:
        """Forget the conversation, its memory and its KV cache."""
        self.check_thread()
        self.messages = []
        self.kept.clear()
        self._path = None


def chat_tokens(lm: HasTokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """The tokens of a conversation under the tokenizer's chat template.

    Raises:
        FormatError: the template cannot be applied.
    """
    try:
        return list(lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    except Exception as error:  # a template is a program of the model's, which may raise anything
        reason = one_line(error)
        raise FormatError(
            f"the tokenizer's chat template cannot be applied ({reason}); mend chat_template in "
            "the model folder, or use generate with --ignore-chat-template"
        ) from error
