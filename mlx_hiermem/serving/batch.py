"""Batch: the requests that are being answered, each with a memory of its own.

mlx-lm's ``BatchGenerator`` does the batching: a sequence comes when there is room and goes when it
has ended, while the others go on. The memory of each is the last entry of its prompt cache.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch, generation_stream

from ..errors import HierMemError, InputError, PathError
from . import sampling
from .counts import Counts
from .fetching import About, fetch
from .job import Failed, Finished, Handle, Started
from .pieces import Answer
from .prompts import PromptCache

if TYPE_CHECKING:
    from ..engine import MemoryLM

_LOG = logging.getLogger(__name__)

#: Tokens of prompts that are prefilled between two tokens of those that decode.
PREFILL = 512
#: Prompts that are prefilled together, as in mlx-lm.
PREFILL_BATCH = 8


@dataclass
class _Place:
    """One request in the batch."""

    uid: int
    handle: Handle
    memory: About
    answer: Answer
    cached: int
    drawn: int = 0

    def finished(self, reason: str) -> Finished:
        return Finished(reason, len(self.handle.job.tokens), self.drawn, self.cached)


class Batch:
    """For the thread that owns the model.

    Args:
        lm: the model.
        vocabulary: how many tokens there are.
        size: the most requests at once.
        prompt_cache_bytes: of keys and values that are kept of texts that have ended.
        counts: what happens is counted there.
    """

    def __init__(
        self,
        lm: MemoryLM,
        vocabulary: int,
        size: int,
        prompt_cache_bytes: int,
        counts: Counts,
    ) -> None:
        self._counts = counts
        self._prompts = PromptCache(prompt_cache_bytes)
        self._lm = lm
        self._vocabulary = vocabulary
        self._size = size
        self._places: dict[int, _Place] = {}
        self._generator = BatchGenerator(
            lm.model,
            stop_tokens=[(token,) for token in lm.tokenizer.eos_token_ids],
            completion_batch_size=size,
            prefill_batch_size=min(PREFILL_BATCH, size),
            prefill_step_size=PREFILL,
        )

    def __len__(self) -> int:
        return len(self._places)

    @property
    def room(self) -> int:
        """How many requests may come before the next token."""
        return min(self._size - len(self), PREFILL_BATCH)

    @property
    def handles(self) -> list[Handle]:
        """Of the requests in the batch."""
        return [place.handle for place in self._places.values()]

    # ---- coming ------------------------------------------------------------------------

    def admit(self, handle: Handle) -> None:
        """Fetch a request's memory and take it in; if that fails, it alone is told so."""
        try:
            place = self._insert(handle)
        except (PathError, InputError) as error:
            self._tell(handle, Failed(str(error), client_error=True))
        except Exception as error:
            _LOG.error("a request could not be taken in", exc_info=error)
            what = "its memory could not be read" if isinstance(error, HierMemError) else "a fault"
            self._tell(handle, Failed(f"{what}; the server's log says more"))
        else:
            self._places[place.uid] = place
            self._counts.add(
                prompt_tokens=len(handle.job.tokens),
                cached_tokens=place.cached,
                fetched_bytes=place.memory.report.bytes,
                fetched_bytes_read=place.memory.report.bytes_read,
            )
            self._gauge()

    def _insert(self, handle: Handle) -> _Place:
        job, lm = handle.job, self._lm
        entry, memory = fetch(lm, job.memory, job.text)
        entries, cached = self._prompts.take(memory.key, job.tokens)
        if entries is None:
            entries = lm.model.make_cache()[:-1]
        left = job.max_tokens
        if lm.context_length is not None:
            left = min(left, lm.context_length - len(job.tokens))
        answer = Answer(lm.tokenizer, job.stop, job.top_logprobs)
        (uid,) = self._generator.insert(
            [job.tokens[cached:]],
            max_tokens=[left],
            caches=[[*entries, entry]],
            all_tokens=[job.tokens[:cached]],
            samplers=[sampling.sampler(job.sampling, self._vocabulary)],
            logits_processors=[sampling.logits_processors(job.sampling)],
        )
        started = Started(
            memory.path, memory.kind, memory.report.to_dict(), cached, len(job.tokens)
        )
        handle.put(started)
        return _Place(uid, handle, memory, answer, cached)

    # ---- a token -----------------------------------------------------------------------

    def step(self) -> None:
        """One token for each request that decodes, and some of the prompts of the others."""
        _, responses = self._generator.next()
        self._counts.add(steps=1, completion_tokens=len(responses))
        gone = []
        for response in responses:
            place = self._places[response.uid]
            place.drawn += 1
            if place.drawn == 1 and mx.isnan(response.logprobs).any().item():
                self._fail_nan(place)
                gone += [response.uid] if response.finish_reason is None else []
            elif self._say(place, response) and response.finish_reason is None:
                gone.append(response.uid)
        if gone:  # ended by what the generator does not know of
            self._generator.remove(gone)

    def _say(self, place: _Place, response: GenerationBatch.Response) -> bool:
        """Hand on what can be shown; returns whether the answer has ended."""
        reason = response.finish_reason
        piece = place.answer.add(response.token, response.logprobs, reason)
        if piece is not None:
            place.handle.put(piece)
        if place.answer.stopped:
            reason = "stop"
        if reason is None:
            return False
        cache, tokens = response.prompt_cache, response.all_tokens
        with mx.stream(generation_stream):
            if cache is None:
                ((cache, tokens),) = self._generator.extract_cache([place.uid]).values()
            self._prompts.put(place.memory.key, tokens, cache[:-1])
        self._end(place, place.finished(reason))
        return True

    def _fail_nan(self, place: _Place) -> None:
        memory = place.memory
        path = "" if memory.path is None else f" on path {','.join(map(str, memory.path))}"
        message = f"with the {memory.kind} memory{path} the model gives NaN"
        _LOG.error("%s; `mlx_hiermem bank verify` finds a block that holds NaN", message)
        self._end(place, Failed(message))

    # ---- going -------------------------------------------------------------------------

    def drop(self, handles: Iterable[Handle], failed: Failed | None = None) -> None:
        """End requests before their time.

        Args:
            failed: their last event; None is "cancelled".
        """
        going = {id(handle) for handle in handles}
        places = [place for place in self._places.values() if id(place.handle) in going]
        if places:
            self._generator.remove([place.uid for place in places])
        for place in places:
            self._end(place, failed or place.finished("cancelled"))

    def _end(self, place: _Place, event: Finished | Failed) -> None:
        del self._places[place.uid]
        self._tell(place.handle, event)

    def _tell(self, handle: Handle, event: Finished | Failed) -> None:
        """Tell the last event, counted first: who knows of the end may ask for the counts."""
        how = "finished" if isinstance(event, Finished) else "failed"
        self._counts.add(**{f"{how}_{event.reason}": 1})
        self._gauge()
        handle.put(event)

    def _gauge(self) -> None:
        self._counts.set(
            running=len(self),
            prompt_cache_bytes=self._prompts.nbytes,
            prompt_cache_entries=len(self._prompts),
            bank_bytes_held=self._lm.bank.bytes_held,
            slots_made=self._lm.bank.slots_made,
        )

    def close(self) -> None:
        """Let go of what the generator has set for the whole machine."""
        self._generator.close()
