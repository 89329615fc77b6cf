"""Several visitors of the demo at once: their places in the line, and what stays of who leaves."""

from __future__ import annotations

from playwright.sync_api import expect

from mlx_hiermem import load
from tests.browser.held import HOLD
from tests.browser.pages import send, shown, wait_for


def test_ten_visitors_are_answered_in_turn(servers, open_page):
    server = servers[1]
    pages = [open_page(server) for _ in range(10)]
    prompts = [HOLD, *(f"Visitor {chr(97 + i) * 5} asks" for i in range(9))]
    send(pages[0], prompts[0], "Fetched", 4)
    expect(pages[0].locator("#answer .hm-status")).to_have_text("fetching")
    for place, page in enumerate(pages[1:], 1):
        send(page, prompts[place], "Fetched", 4)
        status = page.locator("#answer .hm-status")
        expect(status).to_have_text(f"waiting, {place} ahead of you")
    # One who leaves lets those behind move up.
    pages[1].context.close()
    for place, page in enumerate(pages[2:], 1):
        expect(page.locator("#answer .hm-status")).to_have_text(f"waiting, {place} ahead of you")
    server.gate.touch()
    lm = load(server.model)
    for page, prompt in zip([pages[0], *pages[2:]], [prompts[0], *prompts[2:]], strict=True):
        wait_for(page, "done", None)
        assert shown(page)["text"] == lm.generate(prompt, max_tokens=4)
