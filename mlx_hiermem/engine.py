"""MemoryLM: route -> fetch -> decode. The one place where routing, bank and anchor meet.

It routes a text, fetches the blocks on its path once, and lets mlx-lm's own loop decode with the
fetched memory in the prompt cache. ``loading.load`` makes it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import stream_generate

from . import scoring
from .anchors import compute_dtype, context_length
from .anchors.vocabulary import check_tokens, vocabulary
from .bank.address import check_block
from .bank.report import FetchedMemory, FetchReport
from .bank.store import MemoryBank
from .errors import FormatError, InputError
from .owner import Owner, owned
from .refetch import DEFAULT_KV_CACHE, Answer, Refetch
from .routing.encoder import Encoder
from .routing.tree import ClusterPath, ClusterTree

if TYPE_CHECKING:
    from .conversation import KeptCache

#: What ``memory`` may be: one of these words, or the ids of a cluster path.
MEMORIES = ("fetched", "generic", "none")

Memory = str | Sequence[int]
Blocks = Iterable[tuple[int, int]]


@dataclass(frozen=True)
class Fetched:
    """A memory that is ready for the model.

    Attributes:
        memory: joined memory (1, N) in the model's dtype; None is memory off.
        kind: "fetched", "generic", "none" or "path".
        path: the cluster path, when one was fetched.
        report: what was read, from where, in how long.
        found: what the bank gave, whose buffer ``memory`` may lie in.
    """

    memory: mx.array | None
    kind: str
    path: ClusterPath | None
    report: FetchReport
    found: FetchedMemory | None = None

    def release(self) -> None:
        """Let the next fetch write where ``memory`` is; see ``FetchedMemory.release``."""
        if self.found is not None:
            self.found.release()


@dataclass(frozen=True)
class Response:
    """One piece of a streamed answer.

    Attributes:
        text: the text since the last piece.
        token: the last token.
        memory: "fetched", "generic", "none" or "path": the memory that this token was drawn with.
        path: the cluster path that was fetched, or None.
        fetch: the fetch report of that memory.
        prompt_tokens, generation_tokens: how many so far.
        prompt_tps, tokens_per_second: speed of prefill and of decoding, tokens per second.
        peak_memory: of MLX, in bytes.
        finish_reason: "stop" (end of text), "length", or None while it goes on.
        refetches: how often the memory had changed since the first token.
        cached_tokens: of the prompt's tokens, those that were not prefilled but reused.
    """

    text: str
    token: int
    memory: str
    path: ClusterPath | None
    fetch: FetchReport
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    tokens_per_second: float
    peak_memory: int
    finish_reason: str | None
    refetches: int = 0
    cached_tokens: int = 0


class MemoryLM:
    """An anchor, its memory bank, and what routes to it.

    Attributes:
        model: the anchor with memories attached; works in all of mlx-lm's loops together with
            ``prompt_cache``.
        tokenizer: mlx-lm's tokenizer wrapper.
        bank: the :class:`MemoryBank`; ``bank.block(level, cluster)`` switches a block off.
        tree, encoder: what routes; None where the bank has no tree.
        context_length: the longest context in tokens, prompt and answer together, or None when
            the anchor's config does not say.
        vocabulary: rows of the token embeddings.

    MLX arrays belong to the thread that makes them, so a ``MemoryLM`` is for the thread that made
    it: in any other its methods raise ThreadError. A thread that has loaded a model of its own
    calls ``mlx.core.clear_streams()`` when it has let go of it, as MLX wants it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        bank: MemoryBank,
        tree: ClusterTree | None,
        encoder: Encoder | None,
        config: dict[str, Any],
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.bank = bank
        self.tree = tree
        self.encoder = encoder
        self.context_length = context_length(config)
        self.vocabulary = vocabulary(model)
        self.dtype = compute_dtype(model)
        self._owner = Owner("the model")
        self._running: set[Answer] = set()  # those that are being generated
        self._ahead: ClusterPath | None = None  # to be prefetched when they have ended

    # ---- routing and fetching ----------------------------------------------------------

    def route(self, text: str) -> ClusterPath:
        """The cluster path of a text (section 2 of the paper).

        Raises:
            InputError: the text is empty, or not valid Unicode; the bank has no tree.
        """
        return self._routes([text])[0]

    def assign(self, texts: Sequence[str]) -> np.ndarray:
        """The ids of the cluster paths of many texts, (n, levels) int64.

        Raises:
            InputError: the bank has no tree.
        """
        tree, encoder = self._router()
        return tree.assign(encoder.encode(texts))[0]

    def check_thread(self) -> None:
        """Raise ThreadError in another thread than the one that the model belongs to."""
        self._owner.check()

    def _routes(self, texts: Sequence[str]) -> list[ClusterPath]:
        for text in texts:
            if not text.strip():
                raise InputError("the text to route is empty; give it at least one word")
            _check_unicode(text)
        tree, encoder = self._router()
        return tree.route(encoder.encode(texts))

    def _router(self) -> tuple[ClusterTree, Encoder]:
        self.check_thread()
        if self.tree is None or self.encoder is None:
            raise InputError(
                f"{self.bank.folder}: this bank has no tree, so no text can be routed; make a "
                "corpus with `mlx_hiermem cluster` and train on it, or ask with --memory none, "
                "--memory generic or --path"
            )
        return self.tree, self.encoder

    def fetch(
        self, memory: Memory = "fetched", text: str | None = None, blocked: Blocks = ()
    ) -> Fetched:
        """Fetch a memory.

        Args:
            memory: "fetched" (the blocks on the path of ``text``), "generic", "none", or the ids
                of a path.
            text: the context that is routed; only "fetched" needs it.
            blocked: blocks (level, cluster) that read as zeros in this memory, beside those that
                are blocked in the bank. The generic memory has none.

        Raises:
            InputError: an unknown word, or "fetched" without a text.
            PathError: the path is not one of the tree, or a block to be blocked does not exist.
        """
        return self.fetch_batch(memory, [text], blocked)[0]

    def fetch_batch(
        self, memory: Memory, texts: Sequence[str | None], blocked: Blocks = ()
    ) -> list[Fetched]:
        """Fetch the memories of several contexts, each distinct block once; as :meth:`fetch`."""
        self.check_thread()
        paths: list[ClusterPath | None]
        blocked = [check_block(self.bank.config, pair) for pair in blocked]
        if not texts:
            return []
        if not isinstance(memory, str):
            found, kind = self._fetch_paths([memory] * len(texts), blocked), "path"
            paths = [ClusterPath(tuple(map(int, memory)), ())] * len(texts)
        elif memory == "none":
            return [Fetched(None, "none", None, FetchReport([])) for _ in texts]
        elif memory == "generic":
            first = self.bank.generic()
            found, kind = [first, *(first.share() for _ in texts[1:])], "generic"
            paths = [None] * len(texts)
        elif memory != "fetched":
            raise InputError(
                f"memory is {memory!r}; expected one of {', '.join(MEMORIES)}, or the ids of a path"
            )
        else:
            given = [text for text in texts if text is not None]
            if len(given) < len(texts):
                raise InputError("memory is 'fetched', but there is no text to route; pass one")
            routed = [self.route(*given)] if len(given) == 1 else self._routes(given)
            found, kind = self._fetch_paths([path.ids for path in routed], blocked), "fetched"
            paths = list(routed)
        ready: dict[int, mx.array] = {}  # memories that are shared are made ready once
        for one in found:
            if id(one.joined) not in ready:
                ready[id(one.joined)] = self._ready(one)
        return [
            Fetched(ready[id(one.joined)], kind, path, one.report, one)
            for one, path in zip(found, paths, strict=True)
        ]

    def _fetch_paths(self, paths: Sequence[Sequence[int]], blocked: Blocks) -> list[FetchedMemory]:
        if len(paths) == 1:
            return [self.bank.fetch(paths[0], blocked)]
        return self.bank.fetch_many(paths, blocked)

    def _ready(self, found: FetchedMemory) -> mx.array:
        """A memory (1, N) in the model's dtype; the bank's own buffer where that fits."""
        memory = found.joined[None]
        if memory.dtype != self.dtype:
            memory = memory.astype(self.dtype)
            mx.eval(memory)
            found.release()  # nothing reads the buffer any more
        return memory

    def prefetch(self, text: str) -> ClusterPath | None:
        """Read the likely path of a text in the background, while its author still types.

        The fetch of that path then finds it in memory. While an answer is being generated nothing
        is read: it waits until that has ended, and only the newest text counts.

        Returns:
            The path; None for a text without a word.

        Raises:
            InputError: the text is not valid Unicode.
        """
        self.check_thread()
        if not text.strip():
            return None
        path = self.route(text)
        if self._running:
            self._ahead = path
        else:
            self.bank.prefetch(path.ids)
        return path

    def prompt_cache(self, memory: Memory = "fetched", text: str | None = None) -> list[Any]:
        """A fresh prompt cache that holds a memory, for any of mlx-lm's loops.

        ``mlx_lm.generate(lm.model, lm.tokenizer, text, prompt_cache=lm.prompt_cache("fetched",
        text))`` answers as :meth:`generate` does.
        """
        return self._cache(self.fetch(memory, text))

    def _cache(self, fetched: Fetched) -> list[Any]:
        return self.model.make_cache(fetched.memory)

    # ---- generation --------------------------------------------------------------------

    @owned
    def stream(
        self,
        prompt: str | Sequence[int],
        memory: Memory = "fetched",
        max_tokens: int = 256,
        sampler: Callable[[mx.array], mx.array] | None = None,
        route_on: str | None = None,
        refetch: str | Refetch = "never",
        kv_cache: str = DEFAULT_KV_CACHE,
        kept: KeptCache | None = None,
        blocked: Blocks = (),
        **options: Any,
    ) -> Generator[Response, None, None]:
        """Generate, piece by piece, with a memory that is fetched before the first token.

        Args:
            prompt: text, or its tokens.
            memory: as in :meth:`fetch`.
            max_tokens: the longest answer; the context's end stops it too.
            sampler: log-probabilities -> token; mlx-lm's ``make_sampler``. Default: greedy.
            route_on: the text that is routed; default: the prompt.
            refetch: "tokens:N" routes the newest text again after every N tokens, and changes
                the memory where the path differs ("fetched" only); "never" and "turn" are the
                same here, where there is one turn. See ``refetch.Refetch``.
            kv_cache: what becomes of the keys and values so far, once the memory has changed:
                "keep" or "recompute". A :class:`Refetch` brings its own.
            kept: the KV cache of an earlier text (``conversation.KeptCache``), from which what
                this prompt begins with is reused; holds this text afterwards.
            blocked: as in :meth:`fetch`, for this answer alone.
            options: handed on to mlx-lm's ``generate_step`` (``logits_processors``, ...), which
                sees the tokens that are prefilled, not those that are reused.

        Raises:
            InputError: the prompt is empty, longer than the context, or has a token that the anchor
                has not.
        """
        policy = Refetch.parse(refetch, kv_cache)
        answer = self._begin(prompt, memory, max_tokens, route_on, policy, kept, tuple(blocked))
        used, refetches, checked = answer.fetched, 0, None
        with self._generating(answer):
            pieces = stream_generate(
                self.model,
                self.tokenizer,
                answer.to_prefill,
                max_tokens=answer.max_tokens,
                sampler=sampler,
                prompt_cache=answer.cache,
                **options,
            )
            with closing(pieces):
                for piece in pieces:
                    answer.add([piece.token])
                    if used is not checked and mx.isnan(piece.logprobs).any().item():
                        raise self.not_a_number(used)
                    checked = used
                    yield Response(
                        text=piece.text,
                        token=piece.token,
                        memory=used.kind,
                        path=used.path,
                        fetch=used.report,
                        prompt_tokens=answer.cached + piece.prompt_tokens,
                        prompt_tps=piece.prompt_tps,
                        generation_tokens=piece.generation_tokens,
                        tokens_per_second=piece.generation_tps,
                        peak_memory=mx.get_peak_memory(),
                        finish_reason=piece.finish_reason,
                        refetches=refetches,
                        cached_tokens=answer.cached,
                    )
                    # The next token is drawn already; a memory fetched now draws those after it.
                    used, refetches = answer.fetched, answer.refetches
                    answer.refetch_if_due()

    def _begin(
        self,
        prompt: str | Sequence[int],
        memory: Memory,
        max_tokens: int,
        route_on: str | None,
        policy: Refetch,
        kept: KeptCache | None,
        blocked: tuple[tuple[int, int], ...] = (),
    ) -> Answer:
        """Check a prompt, fetch its memory and make its cache; see :meth:`stream`."""
        tokens, text = self._prompt(prompt)
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; expected at least 1")
        if self.context_length is not None:
            max_tokens = min(max_tokens, self.context_length - len(tokens))
        fetched = self.fetch(memory, text if route_on is None else route_on, blocked)
        return Answer(self, tokens, route_on, fetched, policy, max_tokens, kept, blocked)

    @contextmanager
    def _generating(self, answer: Answer) -> Iterator[None]:
        """While an answer is generated; gives its memory back when it has ended.

        Every step that was begun is evaluated, and waited for, before that. Where that cannot be
        known (an error in the midst of a step, another thread that closes the generator) the memory
        is not given back: its buffer is then freed by itself, when nothing refers to it.
        """
        thread = threading.get_ident()
        self._running.add(answer)
        clean = False
        try:
            try:
                yield
                clean = True
            except GeneratorExit:
                clean = threading.get_ident() == thread
                raise
        finally:
            self._running.discard(answer)
            answer.end(clean)
            if self._ahead is not None and not self._running and thread == threading.get_ident():
                ahead, self._ahead = self._ahead, None
                self.bank.prefetch(ahead.ids)

    def not_a_number(self, fetched: Fetched) -> FormatError:
        """The error for an answer that is not made of numbers."""
        if fetched.memory is None:
            return FormatError("the anchor gives NaN in place of probabilities; load it again")
        path = "" if fetched.path is None else f" on path {','.join(map(str, fetched.path.ids))}"
        return FormatError(
            f"{self.bank.folder}: with the {fetched.kind} memory{path} the model gives NaN in "
            "place of probabilities; `mlx_hiermem bank verify` finds a block that holds NaN"
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        memory: Memory = "fetched",
        max_tokens: int = 256,
        sampler: Callable[[mx.array], mx.array] | None = None,
        **options: Any,
    ) -> str:
        """The whole answer of :meth:`stream`, as text."""
        return "".join(
            piece.text for piece in self.stream(prompt, memory, max_tokens, sampler, **options)
        )

    # ---- scoring -----------------------------------------------------------------------

    def score(
        self,
        context: str,
        continuation: str,
        memory: Memory = "fetched",
        route_on: str | None = None,
    ) -> tuple[float, bool]:
        """How likely a continuation is after a context.

        Args:
            context, continuation: texts; the context must not be empty.
            memory: as in :meth:`fetch`; "fetched" routes ``route_on``, or else the context.

        Returns:
            The sum of the continuation's log-probabilities in nats, and whether greedy decoding
            would give exactly it.
        """
        fetched = self.fetch(memory, context if route_on is None else route_on)
        logprob, greedy = scoring.score(self, [(context, continuation)], [fetched.memory])[0]
        fetched.release()  # the score is a number, so all that led to it is evaluated
        if math.isnan(logprob):
            raise self.not_a_number(fetched)
        return logprob, greedy

    def perplexity(self, texts: Sequence[str], memory: Memory = "fetched") -> float:
        """Perplexity per token over ``texts``; "fetched" routes each by its whole text.

        A text longer than the context is scored in windows that do not overlap.
        """
        if not texts:
            raise InputError("there is no text to take the perplexity of; give at least one")
        return scoring.perplexity(self, texts, memory)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text as a prompt, with special tokens that the tokenizer puts first."""
        self.check_thread()
        _check_unicode(text)
        bos = self.tokenizer.bos_token
        return list(
            self.tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos))
        )

    def _prompt(self, prompt: str | Sequence[int]) -> tuple[list[int], str]:
        """Tokens and text of a prompt, checked."""
        if isinstance(prompt, str):
            tokens = self.tokenize(prompt) if prompt.strip() else []
        else:
            tokens = [int(token) for token in prompt]
        check_tokens("the prompt", tokens, self.vocabulary)
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(tokens)
        if not tokens:
            raise InputError("the prompt is empty; give it at least one word")
        if self.context_length is not None and len(tokens) >= self.context_length:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, but the context of this model ends at "
                f"{self.context_length}, answer included; shorten the prompt"
            )
        return tokens, text


def _check_unicode(text: str) -> None:
    """Raise InputError if a text holds a lone surrogate, as argv does for what is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode (character {error.start + 1}); give it as UTF-8"
        ) from None
