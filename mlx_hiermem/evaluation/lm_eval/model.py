"""A model with memories for lm-eval: mlx-lm's own adapter, and a memory for each document.

Notable:
- Without a memory every request goes to mlx-lm's code, so its scores are mlx-lm's, to the bit.
- With one, requests are scored in batches that hold a memory for each sequence, ordered by memory,
  so that each is fetched once; the keys and values of a context are computed once for all its
  continuations. Tokens, truncation and what counts as greedy are mlx-lm's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from mlx_lm import evaluate as mlx_lm_evaluate
from mlx_lm.generate import batch_generate
from tqdm import tqdm

from ...arrays import as_list
from ...engine import Fetched, MemoryLM
from ...errors import InputError
from ...loading import load
from .routes import Routes

#: What ``memory`` may be. "blocked" fetches the path and blocks all blocks on it.
MEMORIES = ("none", "generic", "fetched", "blocked")

#: Bytes that the memories of a batch may take, one copy for each sequence.
BATCH_BYTES = 2**29

#: Tokens of an answer where neither the task nor the caller says; lm-eval's own models have this.
MAX_TOKENS = 256

#: Texts that are routed at once.
ROUTED = 256

_PREFILL = 2048  # tokens of contexts that are prefilled at once, as in mlx-lm


@dataclass
class _Question:
    """A context and all that is to be scored after it, in tokens."""

    context: list[int]
    memory: Any
    continuations: list[list[int]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # of the requests


@register_model("hiermem")
class HierMemLM(mlx_lm_evaluate.MLXLM):
    """lm-eval's model "hiermem".

    Args:
        path_or_hf_repo: what ``mlx_hiermem.load`` takes, or a model that it has given, whose
            weights are then used as they are.
        memory: one of :data:`MEMORIES`, for every document.
        max_tokens: the longest answer; default: what the task says, else :data:`MAX_TOKENS`. As in
            mlx-lm it bounds the context of a scored continuation as well.
        batch_size: the most sequences at once.
        use_chat_template: default: where the tokenizer has one, as in mlx-lm.
        routes: by which text documents are routed.

    Attributes:
        longer: (task, document) of what did not fit into the model's context. It is scored all the
            same, as mlx-lm does.

    Raises:
        InputError: an unknown memory, or one that is routed where the bank has no tree.
    """

    def __init__(
        self,
        path_or_hf_repo: str | MemoryLM,
        memory: str = "fetched",
        max_tokens: int | None = None,
        batch_size: int = 8,
        use_chat_template: bool | None = None,
        routes: Routes | None = None,
    ) -> None:
        LM.__init__(self)  # MLXLM's own would load the weights
        if not isinstance(path_or_hf_repo, MemoryLM):
            path_or_hf_repo = load(path_or_hf_repo)
        self.lm: MemoryLM = path_or_hf_repo
        check_memory(self.lm, memory)
        self.memory = memory
        self.longer: set[tuple[str | None, int | None]] = set()
        self._routes = routes or Routes()
        self._model, self.tokenizer = self.lm.model, self.lm.tokenizer
        self._max_tokens, self._batch_size, self._sampler = max_tokens, int(batch_size), None
        if use_chat_template is None:
            use_chat_template = self.tokenizer.chat_template is not None
        self.use_chat_template = use_chat_template

    # ---- what lm-eval asks for ---------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether it is the greedy one.

        As in mlx-lm it is -inf after an empty context.
        """
        questions = self._questions(requests, self._memories(requests))
        if self.memory == "none":
            return super().loglikelihood(requests)
        results: list[tuple[float, bool]] = [(-math.inf, False)] * len(requests)
        asked = [question for question in questions if question.context]
        asked.sort(key=lambda question: (question.memory, len(question.context)))
        with _bar(len(requests), "scoring") as bar:
            bar.update(sum(len(q.places) for q in questions if not q.context))
            for batch, memories, fetched in self._batches(asked):
                rows = [(i, j) for i, q in enumerate(batch) for j in range(len(q.places))]
                scores = self._score(batch, rows, memories)
                for (i, j), score in zip(rows, scores, strict=True):
                    if math.isnan(score[0]):
                        raise self.lm.not_a_number(fetched[i])
                    results[batch[i].places[j]] = score
                bar.update(len(rows))
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of each document in nats, but for its first token; 0 without a second."""
        rows = [list(row) for row in self._tokenize([request.args[0] for request in requests])]
        for request, row in zip(requests, rows, strict=True):
            self._note_length(request, len(row))
        keep = [i for i, row in enumerate(rows) if len(row) > 1]  # mlx-lm fails on the others
        memories = self._memories(requests)
        results = [0.0] * len(requests)
        if self.memory == "none":
            for i, score in zip(
                keep, super().loglikelihood_rolling([requests[i] for i in keep]), strict=True
            ):
                results[i] = score
            return results
        documents = [_Question(rows[i], memories[i], [rows[i]], [i]) for i in keep]
        documents.sort(key=lambda one: (one.memory, len(one.context)))
        with _bar(len(requests), "scoring") as bar:
            bar.update(len(requests) - len(keep))
            for batch, given, fetched in self._batches(documents):
                cache = self._model.make_cache(_joined(given))
                scores, lengths, _ = self._score_fn([one.context for one in batch], cache)
                real = mx.arange(scores.shape[-1]) < lengths[:, None] - 1
                sums = as_list(mx.where(real, scores, 0).sum(axis=-1))
                for one, score, memory in zip(batch, sums, fetched, strict=True):
                    if math.isnan(score):
                        raise self.lm.not_a_number(memory)
                    results[one.places[0]] = score
                bar.update(len(batch))
        return results

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The greedy answer to each context, up to the first text at which it is to stop."""
        requests = [self._with_limits(request) for request in requests]
        memories = self._memories(requests)
        prompts = [list(row) for row in self._tokenize([request.args[0] for request in requests])]
        for request, prompt in zip(requests, prompts, strict=True):
            if not prompt:
                raise InputError(f"{_where(request)}: the context is empty; expected a question")
            self._note_length(request, len(prompt) + 1)
        if self.memory == "none":
            return super().generate_until(requests)
        asked = [
            _Question(prompt, memory, [[]], [i])
            for i, (prompt, memory) in enumerate(zip(prompts, memories, strict=True))
        ]
        asked.sort(key=lambda question: (question.memory, len(question.context)))
        results = [""] * len(requests)
        with _bar(len(requests), "answering") as bar:
            for batch, given, _ in self._batches(asked):
                of_batch = [requests[one.places[0]] for one in batch]
                texts = batch_generate(
                    self._model,
                    self.tokenizer,
                    [one.context for one in batch],
                    prompt_caches=[self._model.make_cache(memory) for memory in given],
                    max_tokens=[self._max_tokens or r.args[1]["max_gen_toks"] for r in of_batch],
                    sampler=self._sampler,
                    prefill_batch_size=self._batch_size,
                    completion_batch_size=self._batch_size,
                ).texts
                for one, request, text in zip(batch, of_batch, texts, strict=True):
                    results[one.places[0]] = self._cut(text, request.args[1]["until"])
                bar.update(len(batch))
        return results

    # ---- memories ----------------------------------------------------------------------

    def _memories(self, requests: Sequence[Instance]) -> list[Any]:
        """What stands for the memory of each request: its path, or the word for it."""
        if self.memory in ("none", "generic"):
            return [self.memory] * len(requests)
        texts = self._routes.texts(requests)
        different = list(dict.fromkeys(texts))
        paths: dict[str, tuple[int, ...]] = {}
        with _bar(len(different), "routing") as bar:
            for start in range(0, len(different), ROUTED):
                some = different[start : start + ROUTED]
                found = self.lm.assign(some).tolist()
                paths |= dict(zip(some, map(tuple, found), strict=True))
                bar.update(len(some))
        return [paths[text] for text in texts]

    def _fetch(self, memory: Any) -> Fetched:
        if self.memory != "blocked":
            return self.lm.fetch(memory)
        levels = self.lm.bank.config.memory_levels
        return self.lm.fetch(memory, blocked=[(level, memory[level - 1]) for level in levels])

    def _batches(
        self, ordered: Sequence[_Question]
    ) -> Iterator[tuple[list[_Question], list[mx.array], list[Fetched]]]:
        """Questions in their order, as many as a batch may hold, with their memories.

        A memory is given back as soon as the batches that need it are done.
        """
        size = self._batch_size
        if ordered and ordered[0].memory != ordered[-1].memory:
            memory_bytes = self.lm.bank.config.fetch_size() * self.lm.dtype.size
            size = min(size, max(1, BATCH_BYTES // memory_bytes))
        held: dict[Any, Fetched] = {}
        start = 0
        try:
            while start < len(ordered):
                batch, rows = [ordered[start]], len(ordered[start].places)
                for question in ordered[start + 1 :]:
                    rows += len(question.places)
                    if rows > size:
                        break
                    batch.append(question)
                needed = {question.memory for question in batch}
                for memory in [memory for memory in held if memory not in needed]:
                    held.pop(memory).release()  # all that it led to are numbers by now
                for question in batch:
                    if question.memory not in held:
                        held[question.memory] = self._fetch(question.memory)
                fetched = [held[question.memory] for question in batch]
                yield batch, [_memory(one) for one in fetched], fetched
                start += len(batch)
        finally:
            for one in held.values():
                one.release()

    # ---- scoring -----------------------------------------------------------------------

    def _questions(self, requests: Sequence[Instance], memories: Sequence[Any]) -> list[_Question]:
        """Requests of one context and one memory together, in tokens, truncated as mlx-lm does."""
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.args[0], memories[i]), []).append(i)
        questions = []
        for (text, memory), places in groups.items():
            context = list(self._tokenize([text])[0])
            whole = self._tokenize([text + requests[i].args[1] for i in places])
            for i, tokens in zip(places, whole, strict=True):
                if context and len(tokens) <= len(context):
                    raise InputError(
                        f"{_where(requests[i])}: the continuation {requests[i].args[1][:40]!r} has "
                        "no token of its own after its context; expected at least one"
                    )
                self._note_length(requests[i], len(tokens))
            bound = self._max_tokens or mlx_lm_evaluate.DEFAULT_MAX_TOKENS
            surplus = max(0, max(map(len, whole)) - bound - 1)
            continuations = [list(tokens[len(context) :]) for tokens in whole]
            questions.append(_Question(context[surplus:], memory, continuations, places))
        return questions

    def _score(
        self,
        batch: Sequence[_Question],
        rows: Sequence[tuple[int, int]],
        memories: Sequence[mx.array],
    ) -> list[tuple[float, bool]]:
        """Score continuations, each row a question of the batch and one of its continuations."""
        contexts = [question.context[:-1] for question in batch]
        cache = self._prefilled(contexts, memories)
        results: list[tuple[float, bool]] = []
        for start in range(0, len(rows), self._batch_size):
            part = rows[start : start + self._batch_size]
            keep = [i for i, _ in part]
            # The cache is kept for the rows that are still to come.
            anchor = deepcopy(cache) if start + len(part) < len(rows) else cache
            for entry in anchor:
                entry.filter(keep)
            given = self._model.memory_entry(_joined([memories[i] for i in keep]))
            targets = [batch[i].continuations[j] for i, j in part]
            inputs = [
                [batch[i].context[-1], *target[:-1]]
                for (i, _), target in zip(part, targets, strict=True)
            ]
            logits = self._model(mx.array(_padded(inputs)), cache=[*anchor, given])
            logits = logits.astype(mx.float32)
            wanted = mx.array(_padded(targets))
            chosen = mx.take_along_axis(logits, wanted[..., None], axis=-1).squeeze(-1)
            real = mx.arange(wanted.shape[1]) < mx.array([len(t) for t in targets])[:, None]
            logprobs = mx.where(real, chosen - mx.logsumexp(logits, axis=-1), 0).sum(axis=-1)
            greedy = ((logits.argmax(axis=-1) == wanted) | ~real).all(axis=-1)
            results += zip(as_list(logprobs), as_list(greedy), strict=True)
        return results

    def _prefilled(self, rows: Sequence[list[int]], memories: Sequence[mx.array]) -> list[Any]:
        """The anchor's batch caches with the keys and values of each row, evaluated."""
        fresh = [self._model.make_cache()[:-1] for _ in rows]
        cache = [entries[0].merge(list(entries)) for entries in zip(*fresh, strict=True)]
        longest = max(map(len, rows))
        if not longest:
            return cache
        padding = [longest - len(row) for row in rows]
        if any(padding):
            for entry in cache:
                entry.prepare(lengths=[len(row) for row in rows], right_padding=padding)
        memory = self._model.memory_entry(_joined(memories))
        tokens = mx.array(_padded(rows))
        for start in range(0, longest, _PREFILL):
            # Only the keys and values are evaluated, so no logits are computed.
            self._model(tokens[:, start : start + _PREFILL], cache=[*cache, memory])
            mx.eval([entry.state for entry in cache])
        if any(padding):
            for entry in cache:
                entry.finalize()
            mx.eval([entry.state for entry in cache])
        return cache

    # ---- requests ----------------------------------------------------------------------

    def _with_limits(self, request: Instance) -> Instance:
        """A request that says where to stop, and after how many tokens at the latest."""
        context, options = request.args
        until = options.get("until") or []
        # mlx-lm wants at least one text; no answer holds the last of these.
        until = [until] if isinstance(until, str) else list(until) or ["\0"]
        limits = {"until": until, "max_gen_toks": options.get("max_gen_toks", MAX_TOKENS)}
        request = copy(request)
        request.arguments = (context, {**options, **limits})
        return request

    def _cut(self, text: str, until: Sequence[str]) -> str:
        """An answer up to where it is to stop, as mlx-lm cuts it."""
        text = mlx_lm_evaluate._rstrip_until(text, until)
        if self.tokenizer.has_thinking:
            text = mlx_lm_evaluate._lstrip(text, self.tokenizer.think_end)
        return text

    def _note_length(self, request: Instance, tokens: int) -> None:
        if self.lm.context_length is not None and tokens > self.lm.context_length:
            self.longer.add((request.task_name, request.doc_id))


def check_memory(lm: MemoryLM, memory: str) -> None:
    """Raise InputError where a model cannot have a memory."""
    if memory not in MEMORIES:
        raise InputError(f"memory is {memory!r}; expected one of {', '.join(MEMORIES)}")
    if memory in ("fetched", "blocked") and (lm.tree is None or lm.encoder is None):
        raise InputError(
            f"{lm.bank.folder}: this bank has no tree, so no document can be routed; make a corpus "
            "with `mlx_hiermem cluster` and train on it, or ask for --memory none,generic"
        )


def _memory(fetched: Fetched) -> mx.array:
    """What was fetched: numbers, for every memory but "none", which mlx-lm scores itself."""
    assert fetched.memory is not None
    return fetched.memory


def _joined(memories: Sequence[mx.array]) -> mx.array:
    """Memories (1, N) as one array (B, N); one that all share stays (1, N)."""
    if all(memory is memories[0] for memory in memories):
        return memories[0]
    return mx.concatenate(list(memories))


def _padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of one length, with zeros at the end."""
    longest = max(map(len, rows))
    return [[*row, *[0] * (longest - len(row))] for row in rows]


def _where(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _bar(total: int, what: str) -> tqdm[Any]:
    return tqdm(total=total, desc=what, unit="request", disable=None)
