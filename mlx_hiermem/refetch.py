"""Topic changes: when a memory is routed and fetched anew, and what becomes of the KV cache then.

The paper fetches once per context. A conversation, or a long answer, may go from one topic to
another; :class:`Refetch` says when the memory follows, and :class:`Answer` does it. docs/topics.md
explains both, with figures.

Notable:
- mlx-lm's ``generate_step`` is left to run: it hands the same list to the model at each step, so
  the memory (its last entry) is changed in that list between two tokens. Nothing is restarted, so
  random numbers, logits processors and the detokenizer go on as if nothing had happened.
- The price is a lag of one token: when token n comes out, the step that feeds it and draws token
  n + 1 has begun already, with the old memory.
- What is routed is a window of the newest text, not all of it: what has been said before would
  outweigh the new topic the longer, the more there is of it, and an encoder with a longest text
  would see nothing but the beginning.
- The old memory's buffer is given back before the new memory is fetched, when everything that
  reads it is evaluated. So the new one comes into the same buffer, and only the levels that differ
  are read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.generate import generation_stream

from .errors import InputError

if TYPE_CHECKING:
    from .conversation import KeptCache
    from .engine import Fetched, MemoryLM
    from .routing.tree import ClusterPath

#: What may become of the keys and values that an earlier memory has shaped.
KV_CACHES = ("keep", "recompute")
#: See docs/topics.md for what was measured.
DEFAULT_KV_CACHE = "keep"
#: Tokens of text that are routed in the midst of an answer.
WINDOW = 32

#: Tokens that are prefilled at once, as in mlx-lm.
_PREFILL = 2048


@dataclass(frozen=True)
class Refetch:
    """When a memory is fetched anew.

    Attributes:
        when: "never" (the first memory stays), "turn" (routed anew for each turn of a
            conversation), or "tokens" (besides, after every so many tokens of an answer).
        every: the N of "tokens:N", from 1 on; 0 for the others.
        kv_cache: what becomes, when the memory changes, of the keys and values so far: "keep"
            (they stay as the earlier memory has shaped them) or "recompute" (the text so far is
            prefilled again with the new memory).
        window: how many of the newest tokens of prompt and answer are routed in the midst of an
            answer. A turn is routed by its message.

    Raises:
        InputError: a value is none of these.
    """

    when: str = "never"
    every: int = 0
    kv_cache: str = DEFAULT_KV_CACHE
    window: int = WINDOW

    def __post_init__(self) -> None:
        if self.when not in ("never", "turn", "tokens") or (self.every < 1) == (
            self.when == "tokens"
        ):
            raise _not_a_policy(str(self))
        if self.kv_cache not in KV_CACHES:
            raise InputError(f"kv_cache is {self.kv_cache!r}; expected {' or '.join(KV_CACHES)}")
        if self.window < 1:
            raise InputError(f"window is {self.window}; expected at least 1 token to route")

    @classmethod
    def parse(
        cls, text: str | Refetch, kv_cache: str = DEFAULT_KV_CACHE, window: int = WINDOW
    ) -> Refetch:
        """Read "never", "turn" or "tokens:N"; what is a :class:`Refetch` already stays as it is.

        Raises:
            InputError: it is none of these.
        """
        if isinstance(text, Refetch):
            return text
        if text in ("never", "turn"):
            return cls(text, 0, kv_cache, window)
        found = isinstance(text, str) and re.fullmatch(r"tokens:0*([1-9]\d{,8})", text, re.ASCII)
        if not found:
            raise _not_a_policy(text)
        return cls("tokens", int(found[1]), kv_cache, window)

    def __str__(self) -> str:
        return f"tokens:{self.every}" if self.when == "tokens" else self.when


def _not_a_policy(found: Any) -> InputError:
    return InputError(
        f"refetch is {str(found)[:40]!r}; expected never, turn, or tokens:N with N from 1 on, such "
        "as tokens:32"
    )


def memory_key(fetched: Fetched) -> Hashable:
    """What tells one memory from another: the blocks it is made of, and which are blocked."""
    return tuple((block.level, block.cluster, block.blocked) for block in fetched.report.blocks)


class Answer:
    """One answer while it grows: its text, its memory and its prompt cache.

    Args:
        lm: the model.
        tokens: of the prompt, all of them.
        routed: the text that ``fetched`` was routed by; None if that is the prompt.
        fetched: the memory to begin with.
        policy: when to fetch anew. Only a memory of kind "fetched" is ever routed again.
        max_tokens: the longest answer.
        kept: the KV cache of an earlier text, whose beginning this one may share.
        blocked: blocks that every memory of this answer is fetched without.

    Attributes:
        fetched: the memory in use.
        cache: the prompt cache; the list stays the same, what is in it changes.
        cached: tokens of the prompt whose keys and values were there already.
        tokens: of prompt and answer so far.
        refetches: how often another memory was fetched.
        recomputed: tokens that were prefilled again for that.
    """

    def __init__(
        self,
        lm: MemoryLM,
        tokens: Sequence[int],
        routed: str | None,
        fetched: Fetched,
        policy: Refetch,
        max_tokens: int,
        kept: KeptCache | None = None,
        blocked: Collection[tuple[int, int]] = (),
    ) -> None:
        self.fetched = fetched
        self.tokens = list(tokens)
        self.refetches = self.recomputed = 0
        self.max_tokens = max_tokens
        self._lm = lm
        self._policy = policy
        self._kept = kept
        self._blocked = blocked
        self._prompt = len(self.tokens)
        self._every = policy.every if fetched.kind == "fetched" else 0
        self._routed = self.tokens[: self._prompt]
        if routed is not None and self._every:
            self._routed = list(lm.tokenizer.encode(routed, add_special_tokens=False))
        if kept is None:
            self.cache, self.cached = lm.model.make_cache(fetched.memory), 0
            self._shaped_by = {memory_key(fetched)}
        else:
            self.cache, self.cached, self._shaped_by = kept.take(
                lm.model, self.tokens, fetched, policy.kv_cache
            )

    @property
    def to_prefill(self) -> list[int]:
        """The tokens of the prompt that are not in the cache."""
        return self.tokens[self.cached : self._prompt]

    def until_due(self) -> int:
        """How many tokens are to be added until the memory is routed again, or the answer ends."""
        done = len(self.tokens) - self._prompt
        left = self.max_tokens - done
        return min(left, self._every - done % self._every) if self._every else left

    def add(self, tokens: Sequence[int]) -> None:
        """Tokens of the answer that have come out; the step that feeds them has begun."""
        self.tokens += tokens

    def refetch_if_due(self) -> bool:
        """Route the newest text again if it is time, and change the memory if the path differs.

        To be called between two tokens, on the thread that generates. With "keep" the memory in the
        cache is replaced; with "recompute" so are the keys and values of everything so far, by
        those that the new memory gives. Either way the next step is the first to use it.

        Returns:
            Whether the memory was changed.
        """
        done = len(self.tokens) - self._prompt
        # The last token is drawn already when the one before it comes out.
        if not self._every or not done or done % self._every or done >= self.max_tokens - 1:
            return False
        path = self._route()
        if path is None:
            return False
        bank, lm = self._lm.bank, self._lm
        ids = {level: path.ids[level - 1] for level in bank.config.memory_levels}
        off = bank.blocked | set(self._blocked)
        key = tuple((level, i, (level, i) in off) for level, i in ids.items())
        if key == memory_key(self.fetched):
            return False
        self._settle()
        self.fetched.release()
        fetched = lm.fetch(path.ids, blocked=self._blocked)
        self.fetched = replace(fetched, kind="fetched", path=path)
        if self._policy.kv_cache == "keep":
            self.cache[-1] = lm.model.memory_entry(self.fetched.memory)
            self._shaped_by.add(key)
        else:
            self._recompute()
            self._shaped_by = {key}
        self.refetches += 1
        return True

    def _route(self) -> ClusterPath | None:
        """The path of the newest text; None where there is no word in it."""
        text = (self._routed + self.tokens[self._prompt :])[-self._policy.window :]
        # A window may begin in the midst of a character, which decode shows as a replacement mark.
        words = self._lm.tokenizer.decode(text, skip_special_tokens=True)
        return self._lm.route(words) if words.strip() else None

    def _recompute(self) -> None:
        """Fill fresh caches with all tokens so far; the old ones are let go first."""
        self.cache[:] = self._lm.model.make_cache(self.fetched.memory)
        with mx.stream(generation_stream):
            for start in range(0, len(self.tokens), _PREFILL):
                piece = mx.array(self.tokens[start : start + _PREFILL])
                self._lm.model(piece[None], cache=self.cache)
                mx.eval([entry.state for entry in self.cache])
        self.recomputed += len(self.tokens)

    def _settle(self) -> None:
        """Evaluate, and wait for, everything that may read the memory in use."""
        mx.eval([entry.state for entry in self.cache])
        mx.synchronize(generation_stream)

    def end(self, clean: bool) -> None:
        """The answer has ended, or was broken off.

        Args:
            clean: every step that was begun is known, on this thread. Otherwise nothing is given
                back or kept: buffers are freed by themselves, when nothing refers to them.
        """
        if not clean:
            return
        self._settle()
        if self._kept is not None:
            self._kept.put(self.cache[:-1], self.tokens, self._shaped_by)
        self.fetched.release()
