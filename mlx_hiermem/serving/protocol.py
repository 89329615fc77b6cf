"""OpenAI's two requests, chat completions and completions, read from a client's JSON.

``read_chat`` and ``read_completion`` give one :class:`Request`, whatever the client has written:
checked, with defaults filled in, and nothing left that was not understood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .choices import MOST, Limits, read_memory, read_sampling, read_stop
from .errors import invalid, shown
from .fields import (
    Fields,
    check_integer,
    check_list,
    check_object,
    check_text,
    not_found,
)
from .job import Sampling
from .memory import MemoryChoice

MOST_PROMPTS = 16  # of one completion request
MOST_MESSAGES = 4096
MOST_TOP_LOGPROBS = 20

ROLES = ("system", "developer", "user", "assistant")

#: Fields of OpenAI's API that this server does not have, for a better message.
KNOWN = frozenset(
    "audio best_of echo function_call functions metadata modalities n parallel_tool_calls "
    "prediction prompt_cache_key prompt_cache_retention reasoning_effort response_format "
    "service_tier store suffix tool_choice tools verbosity web_search_options".split()
)


@dataclass(frozen=True)
class Request:
    """A request that was understood.

    Attributes:
        chat: whether it is a chat completion.
        messages: of a chat: role and content, as a chat template takes them.
        prompts: of a completion: texts, or lists of tokens.
        several: whether the prompts came as a list of prompts.
        memory: which memory the answer is made with.
        max_tokens: of each answer; the server's limit if the client names none.
        sampling: how tokens are drawn.
        stop: texts that end an answer.
        stream, include_usage: whether it is sent as it comes, and the usage at its end.
        top_logprobs: how many alternatives of each token to tell; 0 is the token's own
            log-probability alone, None nothing.
    """

    chat: bool
    messages: tuple[dict[str, str], ...]
    prompts: tuple[str | list[int], ...]
    several: bool
    memory: MemoryChoice
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    top_logprobs: int | None

    @property
    def question(self) -> str:
        """What is routed for a chat: the newest message of the user's, or else the newest."""
        asked = [one["content"] for one in self.messages if one["role"] == "user"]
        return asked[-1] if asked else self.messages[-1]["content"]


def read_chat(body: dict[str, Any], limits: Limits) -> Request:
    """A request to ``/v1/chat/completions``.

    Raises:
        ApiError: 400 naming the field, or 404 for another model.
    """
    fields = Fields(body)
    messages = _messages(fields.take("messages"))
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MOST_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise invalid("top_logprobs", "given without logprobs; set logprobs to true")
    fields.neutral("response_format", {"type": "text"})
    fields.neutral("modalities", ["text"])
    for key in ("tools", "functions"):
        fields.neutral(key, [])
    for key in ("tool_choice", "function_call"):
        fields.neutral(key, "none", "auto")
    fields.neutral("parallel_tool_calls", True, False)
    return _request(
        fields, limits, chat=True, messages=messages, top_logprobs=(top or 0) if wanted else None
    )


def read_completion(body: dict[str, Any], limits: Limits) -> Request:
    """A request to ``/v1/completions``.

    Raises:
        ApiError: 400 naming the field, or 404 for another model.
    """
    fields = Fields(body)
    prompts, several = _prompts(fields.take("prompt"), limits)
    top = fields.integer("logprobs", 0, MOST_TOP_LOGPROBS)
    fields.neutral("echo", False)
    fields.neutral("suffix", "")
    fields.neutral("best_of", 1)
    return _request(fields, limits, prompts=prompts, several=several, top_logprobs=top)


def _request(fields: Fields, limits: Limits, **own: Any) -> Request:
    """What both requests share."""
    model = fields.text("model", limits.model)
    if model != limits.model:
        raise not_found(f"model: {shown(model)} is not served here", "model_not_found", "model")
    stream = fields.flag("stream")
    include_usage = _include_usage(fields.take("stream_options"), stream)
    max_tokens = _max_tokens(fields, limits)
    request = {
        "chat": False,
        "messages": (),
        "prompts": (),
        "several": False,
        "memory": read_memory(fields.take("memory")),
        "max_tokens": max_tokens,
        "sampling": read_sampling(fields, limits),
        "stop": read_stop(fields.take("stop")),
        "stream": stream,
        "include_usage": include_usage,
    }
    fields.neutral("n", 1)
    fields.neutral("store", False)
    for key in ("user", "safety_identifier"):
        fields.text(key, longest=512)  # there is nobody to tell them to
    fields.end(KNOWN)
    return Request(**{**request, **own})


# ---- what is asked ---------------------------------------------------------------------


def _messages(given: Any) -> tuple[dict[str, str], ...]:
    if given is None:
        raise invalid("messages", "missing; give a list of messages")
    check_list(given, "messages", MOST_MESSAGES, "messages")
    if not given:
        raise invalid("messages", "empty; give one message at least")
    messages = tuple(_message(one, f"messages[{i}]") for i, one in enumerate(given))
    if not any(one["content"].strip() for one in messages):
        raise invalid("messages", "all of them are empty; give at least one word")
    return messages


def _message(given: Any, where: str) -> dict[str, str]:
    fields = Fields(check_object(given, where), where)
    role = fields.text("role")
    if role not in ROLES:
        name = fields.name("role")
        raise invalid(name, f"{shown(role)} given; expected one of {', '.join(ROLES)}")
    content = _content(fields.take("content"), fields.name("content"))
    fields.text("name", longest=64)
    # What the official client sends back of an answer that it was given.
    for key in ("refusal", "audio", "function_call", "annotations", "tool_calls"):
        fields.neutral(key, [])
    fields.end()
    return {"role": "system" if role == "developer" else role, "content": content}


def _content(given: Any, name: str) -> str:
    if not isinstance(given, list):
        return check_text(given, name)
    texts = []
    for i, part in enumerate(check_list(given, name, MOST_MESSAGES, "parts")):
        fields = Fields(check_object(part, f"{name}[{i}]"), f"{name}[{i}]")
        kind = fields.text("type")
        if kind != "text":
            raise invalid(fields.name("type"), f"{shown(kind)} given; this server reads text only")
        text = fields.text("text")
        if text is None:
            raise invalid(fields.name("text"), "missing; give a string")
        fields.end()
        texts.append(text)
    return "".join(texts)


def _prompts(given: Any, limits: Limits) -> tuple[tuple[str | list[int], ...], bool]:
    if given is None:
        raise invalid("prompt", "missing; give a text, a list of texts, or lists of tokens")
    if isinstance(given, list) and given and isinstance(given[0], (str, list)):
        check_list(given, "prompt", MOST_PROMPTS, "prompts")
        each = tuple(_prompt(one, f"prompt[{i}]", limits) for i, one in enumerate(given))
        return each, True
    return (_prompt(given, "prompt", limits),), False


def _prompt(given: Any, name: str, limits: Limits) -> str | list[int]:
    if isinstance(given, list):
        last = MOST if limits.vocabulary is None else limits.vocabulary - 1
        found: str | list[int] = [check_integer(one, name, 0, last) for one in given]
    else:
        found = check_text(given, name)
    if not found or (isinstance(found, str) and not found.strip()):
        raise invalid(name, "empty; give at least one word")
    return found


# ---- how it is answered ----------------------------------------------------------------


def _include_usage(given: Any, stream: bool) -> bool:
    if given is None:
        return False
    fields = Fields(check_object(given, "stream_options"), "stream_options")
    if not stream:
        raise invalid("stream_options", "given without stream; set stream to true")
    wanted = fields.flag("include_usage")
    fields.flag("include_obfuscation")  # a protection that only matters between networks
    fields.end()
    return wanted


def _max_tokens(fields: Fields, limits: Limits) -> int:
    named = [
        value
        for key in ("max_tokens", "max_completion_tokens")
        if (value := fields.integer(key, 1, limits.max_tokens)) is not None
    ]
    if len(set(named)) > 1:
        raise invalid("max_tokens", "it contradicts max_completion_tokens; give one of them")
    return named[0] if named else limits.max_tokens
