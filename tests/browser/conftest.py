"""A server that shows the atlas, one whose model writes on and on, and a browser, for all tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from mlx_hiermem import load
from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.routing.names import ClusterNames
from tests.browser.pages import FLAGS, MODEL, PATIENCE, Server, start
from tests.tiny import make_tiny_model


@pytest.fixture(scope="session")
def servers(tmp_path_factory) -> Iterator[tuple[Server, Server]]:
    """One for the answers; one whose model goes on for thousands of tokens, with evil names."""
    folder = make_tiny_model(tmp_path_factory.mktemp("endless"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = [["<img src=x onerror=alert(0)>", "<script>alert(1)</script>", "'\"&<b>"]]
    ClusterNames(names).save(folder / "memory")
    logs = tmp_path_factory.mktemp("logs")
    both = start(MODEL, logs / "shown"), start(str(folder), logs / "endless", logs / "gate")
    try:
        for server in both:
            server.wait()
        yield both
        for server in both:
            server.stop()
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
def open_page(browser) -> Iterator:
    """Opens a server's page as a new visitor. At the end, nobody else must have been asked."""
    contexts, hosts, faults = [], set(), []

    def opened(server: Server, **options) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(server.url)
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert hosts <= {"127.0.0.1", None}  # None: the page's own data: and blob: addresses
    assert faults == []
