"""MemoryLM: route -> fetch -> decode. The one place where routing, bank and anchor meet.

``load`` finds a model folder (a path, the name of a model that ships, or a Hub repository) and
opens it; ``MemoryLM`` routes a text, fetches the blocks on its path once, and lets mlx-lm's own
loop decode with the fetched memory in the prompt cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate

from . import scoring
from .anchors import load_anchor, load_anchor_tokenizer
from .bank.report import FetchReport
from .bank.store import MemoryBank
from .errors import ConfigError, InputError
from .memories import attach
from .models import find_model
from .routing.encoder import Encoder, load_encoder
from .routing.tree import ClusterPath, ClusterTree

#: What ``memory`` may be: one of these words, or the ids of a cluster path.
MEMORIES = ("fetched", "generic", "none")

Memory = str | Sequence[int]


@dataclass(frozen=True)
class Fetched:
    """A memory that is ready for the model.

    Attributes:
        memory: joined memory (1, L, 3, R, d) in the model's dtype; None is memory off.
        kind: "fetched", "generic", "none" or "path".
        path: the cluster path, when one was fetched.
        report: what was read, from where, in how long.
    """

    memory: mx.array | None
    kind: str
    path: ClusterPath | None
    report: FetchReport


@dataclass(frozen=True)
class Response:
    """One piece of a streamed answer.

    Attributes:
        text: the text since the last piece.
        token: the last token.
        memory: "fetched", "generic", "none" or "path".
        path: the cluster path that was fetched, or None.
        fetch: the fetch report of this answer.
        prompt_tokens, generation_tokens: how many so far.
        prompt_tps, tokens_per_second: speed of prefill and of decoding, tokens per second.
        peak_memory: of MLX, in bytes.
        finish_reason: "stop" (end of text), "length", or None while it goes on.
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


def load(
    path_or_repo: str | Path,
    bank: str | Path | None = None,
    memory_budget: int | None = None,
    revision: str | None = None,
) -> MemoryLM:
    """Load an anchor with its memory bank.

    Args:
        path_or_repo: a model folder, the name of a model that ships ("atlas"), or a Hub repository.
        bank: the memory folder, when it is not ``memory/`` in the model folder.
        memory_budget: bytes that resident and cached blocks may take; see ``MemoryBank.open``.
        revision: of the Hub repository.

    Raises:
        ConfigError, FormatError, BudgetError: something is missing, damaged, or does not fit.
    """
    folder = find_model(path_or_repo, revision)
    memory_folder = folder / "memory" if bank is None else Path(bank)
    if not memory_folder.is_dir():
        raise ConfigError(
            f"{memory_folder}: no such folder; expected a memory bank; name one with bank "
            "(--bank), or use mlx_lm for a model without memories"
        )
    store = MemoryBank.open(memory_folder, memory_budget=memory_budget)
    try:
        anchor, config = load_anchor(folder)
        tokenizer = load_anchor_tokenizer(folder, config)
        tree = ClusterTree.load(memory_folder / "tree.safetensors")
        if (tree.branching, tree.levels) != (store.config.branching, store.config.levels):
            raise ConfigError(
                f"{memory_folder / 'tree.safetensors'}: branching {tree.branching}, levels "
                f"{tree.levels}; config.json says {store.config.branching} and "
                f"{store.config.levels}; they do not belong together, download the bank again"
            )
        encoder = load_encoder(
            store.config.encoder, folder=memory_folder, anchor=anchor, tokenizer=tokenizer
        )
        if encoder.width != tree.width:
            raise ConfigError(
                f"{memory_folder / 'tree.safetensors'}: grown on vectors {tree.width} wide, the "
                f"encoder of config.json gives {encoder.width}; they do not belong together, "
                "download the bank again"
            )
        try:
            model = attach(anchor, store.config)
        except ConfigError as error:
            raise ConfigError(f"{memory_folder}: {error}") from None
        return MemoryLM(model, tokenizer, store, tree, encoder, config)
    except BaseException:
        store.close()
        raise


class MemoryLM:
    """An anchor, its memory bank, and what routes to it.

    Attributes:
        model: the anchor with memories attached; works in all of mlx-lm's loops together with
            ``prompt_cache``.
        tokenizer: mlx-lm's tokenizer wrapper.
        bank: the :class:`MemoryBank`; ``bank.block(level, cluster)`` switches a block off.
        tree, encoder: what routes.
        context_length: the longest context in tokens, prompt and answer together, or None when
            the anchor's config does not say.

    MLX arrays belong to the thread that makes them, so use one ``MemoryLM`` from one thread.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        bank: MemoryBank,
        tree: ClusterTree,
        encoder: Encoder,
        config: dict[str, Any],
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.bank = bank
        self.tree = tree
        self.encoder = encoder
        self.context_length: int | None = config.get("max_position_embeddings")
        self.dtype = _compute_dtype(model)

    # ---- routing and fetching ----------------------------------------------------------

    def route(self, text: str) -> ClusterPath:
        """The cluster path of a text (section 2 of the paper).

        Raises:
            InputError: the text is empty, or not valid Unicode.
        """
        if not text.strip():
            raise InputError("the text to route is empty; give it at least one word")
        _check_unicode(text)
        return self.tree.route(self.encoder.encode([text]))[0]

    def fetch(self, memory: Memory = "fetched", text: str | None = None) -> Fetched:
        """Fetch a memory.

        Args:
            memory: "fetched" (the blocks on the path of ``text``), "generic", "none", or the ids
                of a path.
            text: the context that is routed; only "fetched" needs it.

        Raises:
            InputError: an unknown word, or "fetched" without a text.
            PathError: the path is not one of the tree.
        """
        if not isinstance(memory, str):
            found, kind = self.bank.fetch(memory), "path"
            path = ClusterPath(tuple(map(int, memory)), ())
        elif memory == "none":
            return Fetched(None, "none", None, FetchReport([]))
        elif memory == "generic":
            found, kind, path = self.bank.generic(), "generic", None
        elif memory != "fetched":
            raise InputError(
                f"memory is {memory!r}; expected one of {', '.join(MEMORIES)}, or the ids of a path"
            )
        elif text is None:
            raise InputError("memory is 'fetched', but there is no text to route; pass one")
        else:
            path = self.route(text)
            found, kind = self.bank.fetch(path.ids), "fetched"
        joined = self.model.join(found.blocks)[None].astype(self.dtype)  # (1, L, 3, R, d)
        return Fetched(joined, kind, path, found.report)

    def prompt_cache(self, memory: Memory = "fetched", text: str | None = None) -> list[Any]:
        """A fresh prompt cache that holds a memory, for any of mlx-lm's loops.

        ``mlx_lm.generate(lm.model, lm.tokenizer, text, prompt_cache=lm.prompt_cache("fetched",
        text))`` answers as :meth:`generate` does.
        """
        return self._cache(self.fetch(memory, text))

    def _cache(self, fetched: Fetched) -> list[Any]:
        cache = self.model.make_cache()
        cache[-1][0] = fetched.memory
        return cache

    # ---- generation --------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Sequence[int],
        memory: Memory = "fetched",
        max_tokens: int = 256,
        sampler: Callable[[mx.array], mx.array] | None = None,
        route_on: str | None = None,
        **options: Any,
    ) -> Iterator[Response]:
        """Generate, piece by piece, with one memory that is fetched before the first token.

        Args:
            prompt: text, or its tokens.
            memory: as in :meth:`fetch`.
            max_tokens: the longest answer; the context's end stops it too.
            sampler: log-probabilities -> token; mlx-lm's ``make_sampler``. Default: greedy.
            route_on: the text that is routed; default: the prompt.
            options: handed on to mlx-lm's ``generate_step`` (``logits_processors``, ...).

        Raises:
            InputError: the prompt is empty or longer than the context.
        """
        tokens, text = self._prompt(prompt)
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; expected at least 1")
        if self.context_length is not None:
            max_tokens = min(max_tokens, self.context_length - len(tokens))
        fetched = self.fetch(memory, text if route_on is None else route_on)
        for piece in stream_generate(
            self.model,
            self.tokenizer,
            tokens,
            max_tokens=max_tokens,
            sampler=sampler,
            prompt_cache=self._cache(fetched),
            **options,
        ):
            yield Response(
                text=piece.text,
                token=piece.token,
                memory=fetched.kind,
                path=fetched.path,
                fetch=fetched.report,
                prompt_tokens=piece.prompt_tokens,
                prompt_tps=piece.prompt_tps,
                generation_tokens=piece.generation_tokens,
                tokens_per_second=piece.generation_tps,
                peak_memory=mx.get_peak_memory(),
                finish_reason=piece.finish_reason,
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
        memories = [self.fetch(memory, context if route_on is None else route_on).memory]
        return scoring.score(self, [(context, continuation)], memories)[0]

    def perplexity(self, texts: Sequence[str], memory: Memory = "fetched") -> float:
        """Perplexity per token over ``texts``; "fetched" routes each by its whole text.

        A text longer than the context is scored in windows that do not overlap.
        """
        if not texts:
            raise InputError("there is no text to take the perplexity of; give at least one")
        return scoring.perplexity(self, texts, memory)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text as a prompt, with special tokens that the tokenizer puts first."""
        _check_unicode(text)
        bos = self.tokenizer.bos_token
        return list(
            self.tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos))
        )

    def _prompt(self, prompt: str | Sequence[int]) -> tuple[list[int], str]:
        """Tokens and text of a prompt, checked."""
        if isinstance(prompt, str):
            tokens, text = self.tokenize(prompt) if prompt.strip() else [], prompt
        else:
            tokens = [int(token) for token in prompt]
            text = self.tokenizer.decode(tokens)
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


def _compute_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype of the anchor's activations: that of its norms, which are never quantised."""
    return model.layers[0].input_layernorm.weight.dtype
