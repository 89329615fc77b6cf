"""What all threads may know about the model that is served: its facts, and its tokenizer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..anchors.vocabulary import check_tokens
from ..conversation import chat_tokens
from ..errors import InputError

if TYPE_CHECKING:
    from ..engine import MemoryLM
    from .job import Job


@dataclass(frozen=True)
class Facts:
    """What requests are checked against; no array, and no path of the machine.

    Attributes:
        context_length: in tokens, prompt and answer together; None if the config does not say.
        vocabulary: rows of the token embeddings.
        has_chat_template: whether the tokenizer has one.
        has_tree: whether texts can be routed.
    """

    context_length: int | None
    vocabulary: int
    has_chat_template: bool
    has_tree: bool

    @classmethod
    def of(cls, lm: MemoryLM) -> Facts:
        """The facts of a model."""
        return cls(
            context_length=lm.context_length,
            vocabulary=lm.vocabulary,
            has_chat_template=bool(lm.tokenizer.has_chat_template),
            has_tree=lm.tree is not None and lm.encoder is not None,
        )

    def check(self, job: Job) -> None:
        """Whether a request can be answered by this model at all.

        Raises:
            InputError: it would break the model, or could only fail.
        """
        if not job.tokens:
            raise InputError("the prompt is empty; give it at least one word")
        length = self.context_length
        if length is not None and len(job.tokens) >= length:
            raise InputError(
                f"the prompt has {len(job.tokens)} tokens, but the context of this model ends at "
                f"{length}, answer included; shorten the prompt"
            )
        check_tokens("prompt", job.tokens, self.vocabulary)
        check_tokens("logit_bias", job.sampling.logit_bias, self.vocabulary)
        if job.max_tokens < 1:
            raise InputError(f"max_tokens is {job.max_tokens}; expected at least 1")
        if "" in job.stop:
            raise InputError("stop has an empty text; leave it out")
        if job.top_logprobs is not None and job.top_logprobs < 0:
            raise InputError(f"top_logprobs is {job.top_logprobs}; expected 0 or more")
        if job.memory.kind == "fetched":
            if not self.has_tree:
                raise InputError(
                    "this bank has no tree, so no text can be routed; ask for memory none, "
                    "generic, or a path"
                )
            if job.text is None and job.memory.route_on is None:
                raise InputError(
                    "memory is 'fetched', but there is no text to route; give route_on"
                )


class Words:
    """A model's tokenizer for any thread: a copy of it, which one thread uses at a time.

    Tokenizers are not safe otherwise: transformers' set their truncation while they are called.

    Attributes:
        tokenizer: mlx-lm's tokenizer wrapper.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text as a prompt, as ``MemoryLM.tokenize``.

        Raises:
            InputError: the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not valid Unicode (character {error.start + 1}); give it as UTF-8"
            ) from None
        bos = self.tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=special))

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation under the chat template.

        Raises:
            FormatError: there is none, or it cannot be applied.
        """
        with self._lock:
            return chat_tokens(self, [dict(message) for message in messages])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        with self._lock:
            return self.tokenizer.decode(list(tokens))
