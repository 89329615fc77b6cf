"""The demo page in a real browser: the server as users start it, clicked by Playwright.

What the page shows is compared with what the same model says in this process. Every request that
the browser makes is recorded: none may leave this machine. The server runs behind proxies that do
not answer, so that it could not ask anybody either.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from playwright.sync_api import expect

from mlx_hiermem.cli import main
from tests.browser.pages import (
    OTHER_PROMPT,
    PROMPT,
    TRUE,
    answered,
    number,
    refused,
    said,
    send,
    shown,
    speed_of,
    wait_for,
    without_times,
)  # fmt: skip


def test_the_examples_are_answered_truly(servers, open_page):
    page = open_page(servers[0])
    examples = page.locator("#examples").get_by_role("button")
    found = {}
    for i in range(examples.count()):
        before = number(page)
        examples.nth(i).click()
        prompt = page.get_by_label("Prompt", exact=True)
        expect(prompt).to_have_value(examples.nth(i).text_content().strip())
        prompt.press("Enter")
        wait_for(page, "done", before)
        found[shown(page)["prompt"]] = shown(page)["text"].strip()
    assert found == TRUE


def test_the_page_shows_what_the_model_says(servers, lm, open_page):
    page = open_page(servers[0])
    choices = [("Fetched", "fetched"), ("Generic", "generic"), ("Off", "none")]
    for prompt in (PROMPT, OTHER_PROMPT):
        for label, memory in choices:
            found = answered(page, prompt, label, 24)
            assert without_times(found) == said(lm, prompt, memory, 24)
            assert speed_of(found) > 0
            for *_, milliseconds, source, _ in found["rows"]:
                assert float(milliseconds) >= 0
                assert source in ("resident", "kept", "disk")
    config = lm.bank.config
    answered(page, PROMPT, "Fetched", 24)
    again = answered(page, PROMPT, "Fetched", 24)
    assert again["bytes"] == sum(config.block_bytes(level) for level in config.memory_levels)
    assert {row[4] for row in again["rows"]} == {"kept"}  # the answer before had it too


def test_errors_are_one_line_and_the_server_lives(servers, lm, open_page):
    page = open_page(servers[0])
    assert refused(page, " ") == "the prompt is empty; give it at least one word"
    assert re.fullmatch(
        r"the prompt has \d+ tokens, but the context of this model ends at \d+.*",
        refused(page, "hafnium " * lm.context_length),
    )
    assert answered(page, PROMPT)["memory"] == "fetched"
    assert refused(page, "x" * 100_001).startswith("the prompt has 100,001 characters")
    assert answered(page, PROMPT)["memory"] == "fetched"


def test_streaming_and_stop(servers, open_page):
    page = open_page(servers[1])
    written = page.locator("#answer .hm-written")
    send(page, PROMPT, "Fetched", 4096)
    lengths = [0]
    while len(lengths) < 4:
        expect(written).to_have_text(re.compile(rf"^.{{{lengths[-1] + 1},}}$", re.S))
        lengths.append(len(written.text_content()))
        expect(page.locator("#answer .hm-answer")).to_have_attribute("data-state", "running")
    # The report is there while the answer is written.
    expect(page.locator("#report tbody tr")).to_have_count(2)
    page.get_by_role("button", name="Stop").click()
    wait_for(page, "done", None)
    found = shown(page)
    assert found["status"] == "stopped"
    assert lengths[-1] <= len(found["text"]) < 4096
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    assert answered(page, PROMPT, "Fetched", 8)["status"] == "length limit reached"


def test_a_visitor_who_leaves_frees_the_model(servers, open_page):
    """That what they had running is dropped at once is tested in test_demo_app.py."""
    first, second = open_page(servers[1]), open_page(servers[1])
    before = number(second)
    send(first, PROMPT, "Fetched", 4096)
    expect(first.locator("#report tbody tr")).to_have_count(2)
    first.context.close()
    send(second, OTHER_PROMPT, "Fetched", 8)
    wait_for(second, "done", before)
    assert shown(second)["prompt"] == OTHER_PROMPT


def test_an_address_that_is_taken(servers, capsys):
    port = urlsplit(servers[0].url).port
    assert main(["demo", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"mlx_hiermem: error: 127\.0\.0\.1, port {port}: .*--port.*\n", error)
    assert main(["demo", "--port", "70000"]) == 2
    assert main(["demo", "--host", "no.such.host.invalid"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
