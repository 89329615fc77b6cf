"""The HTTP application: OpenAI's endpoints over one scheduler, on starlette.

    app = make_app(scheduler, facts, Settings(model="atlas"))

Notable: nothing here touches MLX. Texts become tokens in a few worker threads, and everything
else is a job for the scheduler's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .. import errors as package_errors
from . import protocol
from .bodies import read_body
from .choices import Limits
from .errors import ApiError, busy, invalid, public, shown, stopped
from .fields import not_found, read_json
from .gate import Gate
from .job import Dead, Full, Job
from .metrics import CONTENT_TYPE, Metrics, Seen
from .objects import Writer, model_object
from .responses import HANDLERS, JSONResponse
from .settings import Settings
from .streaming import EventStream, Following

#: The endpoints that a request may be counted under.
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")

_TOKENIZERS = 2  # texts that are made tokens at once
_LONGEST_TOKEN = 64  # characters: no text is made tokens that could fit with longer ones only


def make_app(
    scheduler: Any, facts: Any, settings: Settings, metrics: Metrics | None = None
) -> Starlette:
    """The application.

    Args:
        scheduler: a started ``scheduler.Scheduler``.
        facts: what its ``start`` returned.
        settings: what the server allows.
        metrics: where it counts; its own by default.
    """
    metrics = metrics or Metrics()
    api = Api(scheduler, facts, settings, metrics)
    middleware = [Middleware(Gate, settings=settings, metrics=metrics, paths=PATHS)]
    if settings.allow_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completion, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{name:path}", api.model, methods=["GET"]),
            Route("/health", api.health, methods=["GET"]),
            Route("/metrics", api.metrics_page, methods=["GET"]),
        ],
        middleware=middleware,
        exception_handlers=HANDLERS,
    )
    app.router.redirect_slashes = False
    return app


class Api:
    """The endpoints; the arguments are those of :func:`make_app`."""

    def __init__(self, scheduler: Any, facts: Any, settings: Settings, metrics: Metrics) -> None:
        self.scheduler, self.facts, self.settings = scheduler, facts, settings
        self.metrics = metrics
        self.created = int(time.time())
        self.limits = Limits(settings.model, facts.vocabulary, settings.max_tokens)
        self.tokenizing = anyio.CapacityLimiter(_TOKENIZERS)

    # ---- small ones --------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        data = [model_object(self.settings.model, self.created)]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{name}``."""
        name = request.path_params["name"]
        if name != self.settings.model:
            raise not_found(f"the model {shown(name)} is not served here", "model_not_found")
        return JSONResponse(model_object(name, self.created))

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 while the generation thread lives, else 503."""
        if not self.scheduler.alive:
            raise stopped()
        return JSONResponse({"status": "ok", "model": self.settings.model})

    async def metrics_page(self, request: Request) -> Response:
        """``GET /metrics``."""
        page = self.metrics.page(self.scheduler.stats(), self.scheduler.alive)
        return Response(page, headers={"content-type": CONTENT_TYPE})

    # ---- completions -------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        return await self._answer(request, protocol.read_chat)

    async def completion(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await self._answer(request, protocol.read_completion)

    async def _answer(
        self, request: Request, read: Callable[[dict[str, Any], Limits], protocol.Request]
    ) -> Response:
        begun = time.monotonic()
        body = await read_body(request, self.settings.max_body, min(60.0, self.settings.timeout))
        asked = read(read_json(body), self.limits)
        jobs = await self._jobs(asked)
        left = self.settings.timeout - (time.monotonic() - begun)
        handles = self._submit(jobs)
        following = Following(
            handles, left, self.settings.timeout, lambda: self.scheduler.alive, self.settings.roots
        )
        streams = False
        try:
            following.watch(request.receive)
            writer = Writer(
                asked.chat, self.settings.model, len(jobs), asked.several, asked.top_logprobs,
                asked.include_usage,
            )  # fmt: skip
            seen = Seen(self.metrics, begun, len(jobs))
            events = following.events()
            if asked.stream:
                first = await anext(events)
                streams = True
                return EventStream(first, events, writer, following, seen)
            async for index, event in events:
                seen(index, event)
                writer.take(index, event)
        finally:
            if not streams:
                following.close()
        if following.vanished:
            raise ClientDisconnect()
        return JSONResponse(writer.whole())

    async def _jobs(self, asked: protocol.Request) -> list[Job]:
        """The jobs of a request, one per choice; texts become tokens in a worker thread."""

        def make() -> list[Job]:
            if asked.chat:
                return [self._job(asked, self._chat_tokens(asked), asked.question)]
            return [self._prompt_job(asked, prompt) for prompt in asked.prompts]

        try:
            return await anyio.to_thread.run_sync(make, limiter=self.tokenizing)
        except package_errors.HierMemError as error:
            message = public(str(error), self.settings.roots)
            raise invalid("messages" if asked.chat else "prompt", message) from error

    def _chat_tokens(self, asked: protocol.Request) -> list[int]:
        """A conversation as tokens; without a chat template it is the question alone, as in the
        ``chat`` command."""
        if self.facts.has_chat_template:
            self._check_length("messages", sum(len(one["content"]) for one in asked.messages))
            return self.scheduler.tokenize_chat(list(asked.messages))
        self._check_length("messages", len(asked.question))
        return self.scheduler.tokenize(asked.question)

    def _prompt_job(self, asked: protocol.Request, prompt: str | list[int]) -> Job:
        if isinstance(prompt, str):
            self._check_length("prompt", len(prompt))
            return self._job(asked, self.scheduler.tokenize(prompt), prompt)
        text = self.scheduler.decode(prompt) if self._fits(prompt) else ""
        return self._job(asked, prompt, text)

    def _fits(self, tokens: list[int]) -> bool:
        context = self.facts.context_length
        return context is None or len(tokens) < context

    def _check_length(self, name: str, characters: int) -> None:
        """Refuse a text that would keep others from the tokenizer for seconds, for nothing."""
        context = self.facts.context_length
        if context is not None and characters > context * _LONGEST_TOKEN:
            raise self._too_long(name, f"{characters} characters")

    def _too_long(self, name: str, what: str) -> ApiError:
        message = (
            f"{what}, but the context of this model ends at {self.facts.context_length} tokens, "
            "answer included; shorten it"
        )
        return invalid(name, message, "context_length_exceeded")

    def _job(self, asked: protocol.Request, tokens: list[int], text: str) -> Job:
        name = "messages" if asked.chat else "prompt"
        if not tokens:
            raise invalid(name, "empty; give at least one word")
        if not self._fits(tokens):
            raise self._too_long(name, f"{len(tokens)} tokens")
        return Job(
            tokens=list(tokens),
            text=text,
            memory=asked.memory,
            max_tokens=asked.max_tokens,
            sampling=asked.sampling,
            stop=asked.stop,
            top_logprobs=asked.top_logprobs,
            time_limit=self.settings.timeout,
        )

    def _submit(self, jobs: list[Job]) -> list[Any]:
        handles: list[Any] = []
        try:
            for job in jobs:
                handles.append(self.scheduler.submit(job))
        except Exception as error:
            for handle in handles:
                handle.cancel()
            if isinstance(error, Full):
                raise busy("too many requests wait; come again later", 2, "server_busy") from None
            if isinstance(error, Dead):
                raise stopped() from None
            if isinstance(error, package_errors.HierMemError):
                raise invalid(None, public(str(error), self.settings.roots)) from error
            raise
        return handles
