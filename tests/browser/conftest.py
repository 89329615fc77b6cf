"""A server that shows the atlas, one whose model waits when told to, and a browser, for all tests.

Visitors are told apart by the page that they loaded. So the first ones of a module's tests share a
browser context, whose cache saves most of the loading. Others come with their own: a browser has
few connections to one server, and each page keeps two.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from mlx_hiermem import load
from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.routing.names import ClusterNames
from tests.browser.pages import FLAGS, MODEL, PATIENCE, Gate, Server, learn, opened, start
from tests.tiny import make_tiny_model

#: Names of clusters come from outside too.
EVIL_NAMES = ["<img src=x onerror=alert(0)>", "<script>alert(1)</script>", "'\"&<b>"]


@pytest.fixture(scope="session")
def gates(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture
def gate(gates) -> Iterator[Gate]:
    """What the second server's model waits for; open at the end, so that it goes on."""
    gate = Gate(gates, f"g{len(list(gates.iterdir()))}")
    yield gate
    gate.open()


@pytest.fixture(scope="session")
def servers(tmp_path_factory, gates) -> Iterator[tuple[Server, Server]]:
    """One for the answers; one whose model goes on for thousands of tokens, with evil names."""
    folder = make_tiny_model(tmp_path_factory.mktemp("endless"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ClusterNames([EVIL_NAMES]).save(folder / "memory")
    logs, run = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("run")
    learn(run, 1, 40)
    both = (
        start(MODEL, logs / "shown", run=run),
        start(str(folder), logs / "endless", gates, run=run),
    )
    try:
        for server in both:
            server.wait()
        yield both
        for server in both:
            server.interrupt()
        for server in both:
            server.ended()
    finally:
        for server in both:
            server.process.kill()


@pytest.fixture(scope="session")
def lm(servers) -> MemoryLM:
    return load(servers[0].model)


# Not for the whole session: while Playwright runs, its event loop is that of this thread, and
# tests that run a loop of their own fail.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def new_context(browser, asked) -> Iterator[Callable[[], BrowserContext]]:
    """Contexts that tell what they ask for, and whom."""
    contexts = []

    def new() -> BrowserContext:
        contexts.append(asked.watch(browser.new_context()))
        return contexts[-1]

    yield new
    for context in contexts:
        context.close()


class Asked:
    """Whom the pages of a test have asked, and what went wrong in them."""

    def __init__(self) -> None:
        self.hosts: set[str | None] = set()
        self.faults: list[str] = []

    def watch(self, context: BrowserContext) -> BrowserContext:
        context.set_default_timeout(PATIENCE)
        context.on("request", lambda one: self.hosts.add(urlsplit(one.url).hostname))
        context.on("response", lambda one: one.status < 400 or self.faults.append(one.url))
        context.on("weberror", lambda one: self.faults.append(str(one.error)))
        context.on("dialog", lambda one: (self.faults.append(one.message), one.dismiss()))
        return context


@pytest.fixture(scope="module")
def shared(browser) -> Iterator[tuple[BrowserContext, Asked]]:
    asked = Asked()
    context = asked.watch(browser.new_context())
    yield context, asked
    context.close()


@pytest.fixture
def asked(shared) -> Asked:
    shared[1].hosts.clear(), shared[1].faults.clear()
    return shared[1]


@pytest.fixture
def open_page(shared, asked, new_context) -> Iterator[Callable[..., Page]]:
    """Opens a server's page as a new visitor. At the end, nobody else must have been asked."""
    pages = []

    def open_one(server: Server, scheme: str = "light", width: int = 900) -> Page:
        pages.append((new_context() if pages else shared[0]).new_page())
        pages[-1].emulate_media(color_scheme=scheme)
        pages[-1].set_viewport_size({"width": width, "height": 800})
        pages[-1].goto(server.url)
        return opened(pages[-1])

    yield open_one
    for page in pages:
        page.close()
    assert asked.hosts <= {"127.0.0.1", ""}  # "": the page's own data: and blob: addresses
    assert asked.faults == []
