"""Several visitors of the demo at once: their places in the line, and what stays of who leaves."""

from __future__ import annotations

import re
import time
from pathlib import Path

from playwright.sync_api import expect

from mlx_hiermem import load
from tests.browser.held import LEFT
from tests.browser.pages import (
    OTHER_PROMPT,
    PATIENCE,
    PROMPT,
    fill,
    opened,
    send,
    shown,
    tab,
    wait_for,
)  # fmt: skip


def test_ten_visitors_are_answered_in_turn(servers, new_context, gate):
    server = servers[1]
    pages = [new_context().new_page() for _ in range(10)]
    for page in pages:  # all of them load at once
        page.goto(server.url, wait_until="commit")
    pages = list(map(opened, pages))
    prompts = [gate.wait, *(f"Visitor {chr(97 + i) * 5} asks" for i in range(9))]
    for place, page in enumerate(pages):
        send(page, prompts[place], "Fetched", 4)
        status = f"waiting, {place} ahead of you" if place else "fetching"
        expect(page.locator("#answer .hm-status")).to_have_text(status)
    # One who leaves lets those behind move up.
    pages[1].close()
    for place, page in enumerate(pages[2:], 1):
        expect(page.locator("#answer .hm-status")).to_have_text(f"waiting, {place} ahead of you")
    gate.open()
    lm = load(server.model)
    for page, prompt in zip([pages[0], *pages[2:]], [prompts[0], *prompts[2:]], strict=True):
        wait_for(page, "done", None)
        assert shown(page)["text"] == lm.generate(prompt, max_tokens=4)


def test_a_visitor_who_leaves_frees_the_model(servers, open_page, gate):
    first, second = open_page(servers[1]), open_page(servers[1])
    send(first, gate.pause, "Fetched", 4096)
    expect(first.locator("#answer .hm-written")).to_have_text(re.compile(r"^\S{5}$"))
    send(second, OTHER_PROMPT, "Fetched", 8)
    expect(second.locator("#answer .hm-status")).to_have_text("waiting, 1 ahead of you")
    first.close()
    gate.open()  # the answer would go on for minutes
    wait_for(second, "done", None)
    assert shown(second)["prompt"] == OTHER_PROMPT


def test_nothing_is_left_of_visitors_who_leave(servers, open_page, gates):
    server = servers[1]
    left = gates / LEFT
    pages = [open_page(server), open_page(server)]
    for page in pages:
        tab(page, "Hands on")
        page.locator("#hands-picture .hm-tree-node").first.click()
        expect(page.locator("#own [data-off]")).to_have_count(1)
        tab(page, "Conversation")
        fill(page, "Message", PROMPT, "talk-tokens", 2)
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#talk [data-state=done]")).to_have_count(1)
    left.unlink(missing_ok=True)
    # Who loads the page anew is a new visitor, and the old one has left.
    page.reload()
    opened(page)
    expect(page.locator("#own [data-off]")).to_have_count(0)
    expect(page.locator("#talk li")).to_have_count(0)
    for one in pages:
        one.close()
    await_text(left, "0 visitors, 0 conversations")


def await_text(file: Path, text: str) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end:
        if file.exists() and file.read_text(encoding="utf-8") == text:
            return
        time.sleep(0.05)
    raise AssertionError(file.read_text(encoding="utf-8"))
