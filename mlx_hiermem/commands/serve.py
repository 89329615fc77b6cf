"""``mlx_hiermem serve``: OpenAI's API over HTTP, with a memory per request."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .options import (
    add_model_arguments,
    load_model,
    parse_bytes,
    private_folders,
    public_name,
)

if TYPE_CHECKING:
    from ..serving.settings import Settings

KEY_VARIABLE = "MLX_HIERMEM_API_KEY"
LOG_LEVELS = ("debug", "info", "warning", "error")

#: Seconds for which a server whose model has stopped still says so, before it ends.
LAST_WORDS = 1.0

EXIT_STOPPED = 1

_KEEP_ALIVE = 65  # seconds; longer than clients keep idle connections, so that none is cut in use
_CLOSING = 1.0  # seconds for the step that the model is in
_OPEN_BESIDES = 32  # requests that may be read and refused, besides those that run or wait


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("the server")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any but the default lets others in (default: %(default)s)",
    )
    group.add_argument(
        "--port",
        type=int,
        default=8080,
        help="port to listen on; 0 takes a free one (default: %(default)s)",
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"ask for this key; better set {KEY_VARIABLE}, which no list of processes shows",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin ask, such as http://localhost:3000, or * for all; may "
        "be given more than once",
    )
    group.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default="info",
        help="what is written to stderr (default: %(default)s)",
    )
    _add_limits(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    for option, kind, default, metavar, about in (
        ("--max-tokens", int, 2048, "N", "longest answer in tokens"),
        ("--max-concurrent", int, 32, "N", "answers that are generated at once"),
        ("--max-waiting", int, 64, "N", "requests that may wait for that; more are told 503"),
        ("--max-body", parse_bytes, "4MiB", "SIZE", "largest request, such as 4MiB"),
        ("--timeout", float, 600.0, "SECONDS", "from a request to the end of its answer"),
        ("--shutdown-timeout", float, 30.0, "SECONDS", "for what is under way when it is ended"),
        ("--prompt-cache-bytes", _size, "1GiB", "SIZE", "keys and values to keep; 0 keeps none"),
    ):
        group.add_argument(
            option, type=kind, default=default, metavar=metavar,
            help=f"{about} (default: %(default)s)",
        )  # fmt: skip


def _size(text: str) -> int:
    return 0 if text.strip() == "0" else parse_bytes(text)


def run(args: argparse.Namespace) -> int:
    check(args)
    key = find_key(args)
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(levelname)s: %(message)s"
    )
    with listen(args.host, args.port) as listener:  # before the seconds that the model takes
        from ..serving.scheduler import Scheduler

        scheduler = Scheduler(
            partial(load_model, args),
            max_batch=args.max_concurrent,
            max_waiting=args.max_waiting,
            prompt_cache_bytes=args.prompt_cache_bytes,
        )
        try:
            facts = scheduler.start()
            if key is None and not _is_private(args.host):
                _say(f"warning: {args.host} lets others in, and no --api-key is asked for")
            asyncio.run(serve(args, scheduler, facts, settings(args, key), listener))
            failure = scheduler.failure
        finally:
            # All requests have ended, or were cancelled.
            scheduler.close(drain=False, timeout=_CLOSING)
    code = 0
    if failure is not None:
        _say(f"error: the model has stopped: {' '.join(str(failure).split())}")
        code = EXIT_STOPPED
    if scheduler.alive:
        # It is in the midst of a long step. An interpreter that ends beneath it would abort.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    return code


def check(args: argparse.Namespace) -> None:
    """Refuse values out of range before a model is loaded.

    Raises:
        InputError: naming the option.
    """
    for option, low, high in (
        ("--max-tokens", 1, 2**31 - 1),
        ("--max-concurrent", 1, 4096),
        ("--max-waiting", 1, 2**20),
        ("--max-body", 1, 2**31 - 1),
        ("--timeout", 0.1, 1e6),
        ("--shutdown-timeout", 0, 1e6),
    ):
        value = getattr(args, option.strip("-").replace("-", "_"))
        if not low <= value <= high:
            raise InputError(f"{option}: {value} is out of range; give {low} to {high:.0f}")
    for origin in args.allow_origin:
        if origin != "*" and ("://" not in origin or origin.endswith("/")):
            raise InputError(
                f"--allow-origin: {origin[:60]!r} is no origin; give one such as "
                "http://localhost:3000, or *"
            )


def find_key(args: argparse.Namespace) -> str | None:
    """The API key of ``--api-key`` or of the environment.

    Raises:
        InputError: it is empty, or no header could carry it.
    """
    name, key = "--api-key", args.api_key
    if key is None:
        name, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    if key is not None and not (key and all("!" <= letter <= "~" for letter in key)):
        raise InputError(f"{name}: give a key of letters, digits and signs of ASCII, no spaces")
    return key


def settings(args: argparse.Namespace, key: str | None) -> Settings:
    """What the application is told of the options."""
    from ..serving.settings import Settings

    return Settings(
        model=public_name(args),
        max_tokens=args.max_tokens,
        max_body=args.max_body,
        max_open=args.max_concurrent + args.max_waiting + _OPEN_BESIDES,
        timeout=args.timeout,
        api_key=key,
        allow_origins=tuple(args.allow_origin),
        roots=private_folders(args),
    )


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound to an address, and not listened on yet.

    Raises:
        InputError: the address cannot be had.
    """
    name = host.strip("[]")
    if not 0 <= port < 2**16:  # getaddrinfo takes any number, and listens elsewhere
        raise _no_address(host, port, "ports are 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _no_address(host, port, error) from None
    with listener:
        try:
            # A port that a server has just left may be taken again.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise _no_address(host, port, error) from None
        yield listener


def _no_address(host: str, port: int, error: Exception | str) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(
        f"{host or repr(host)}, port {port}: cannot be listened on ({reason}); give another --port "
        "(0 takes a free one) or --host"
    )


async def serve(
    args: argparse.Namespace,
    scheduler: Any,
    facts: Any,
    settings: Settings,
    listener: socket.socket,
) -> None:
    """Answer until a signal comes or the model stops; then finish what is under way."""
    import uvicorn

    from ..serving.app import make_app
    from ..serving.connections import Connection

    server = uvicorn.Server(
        uvicorn.Config(
            make_app(scheduler, facts, settings),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=args.log_level,
            access_log=args.log_level in ("debug", "info"),
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(args.shutdown_timeout),
        )
    )
    with _signals_are_answered():
        watching = asyncio.create_task(_watch(server, scheduler, settings, listener))
        try:
            await server.serve(sockets=[listener])
        finally:
            watching.cancel()


async def _watch(server: Any, scheduler: Any, settings: Settings, listener: socket.socket) -> None:
    """Say where the server is once it is there, and end it when the model has stopped."""
    host, port = listener.getsockname()[:2]
    while not server.started:
        await asyncio.sleep(0.02)
    where = f"[{host}]" if ":" in host else host
    print(f"{settings.model}: http://{where}:{port}/v1", flush=True)
    while scheduler.alive:
        await asyncio.sleep(0.1)
    await asyncio.sleep(LAST_WORDS)
    server.should_exit = True


@contextmanager
def _signals_are_answered() -> Iterator[None]:
    """SIGINT and SIGTERM end the server in order, and that is the end of them.

    uvicorn raises a signal again when it has shut down, for whoever else waits for it; without
    this the process would end by the signal in place of its exit code.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _say(text: str) -> None:
    print(f"mlx_hiermem: {text}", file=sys.stderr, flush=True)
