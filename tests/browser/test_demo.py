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
    stopped,
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
    answered(page, PROMPT, "Fetched", -5)  # as the field says then: 1
    expect(page.locator("[data-meter=tokens]")).to_contain_text(", 1 written")


def test_a_prompt_of_ten_megabytes(servers, open_page):
    page, other = open_page(servers[0]), open_page(servers[0])
    field = page.get_by_label("Prompt", exact=True)
    # Not shown, because the browser would be busy with it for long.
    field.evaluate(
        """field => {
          field.style.display = 'none';
          field.value = 'x'.repeat(10_000_000);
          field.dispatchEvent(new Event('input', {bubbles: true}));
          document.querySelector('#send').click();
        }"""
    )
    wait_for(page, "error", None)
    assert page.get_by_role("alert").text_content().startswith("the prompt has 10,000,000 char")
    assert answered(other, PROMPT)["memory"] == "fetched"
    # What is pasted ends where it is too long, so that the page stays alive.
    field.evaluate("field => { field.style.display = ''; field.value = ''; field.focus(); }")
    page.evaluate("document.execCommand('insertText', false, 'x'.repeat(1_000_000))")
    assert len(field.input_value()) == 100_001
    assert answered(page, PROMPT)["memory"] == "fetched"


def test_streaming_and_stop(servers, open_page, gate):
    page = open_page(servers[1])
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_disabled()
    send(page, gate.pause, "Fetched", 4096)
    # What has come is there while the answer is written; the model waits after its fifth token.
    expect(page.locator("#answer .hm-written")).to_have_text(re.compile(r"^\S{5}$"))
    expect(page.locator("#answer .hm-answer")).to_have_attribute("data-state", "running")
    expect(page.locator("#report tbody tr")).to_have_count(2)
    expect(page.locator("[data-meter=tokens]")).to_contain_text("5 written")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    written = shown(page)["text"]
    stopped(page, stop.click)
    gate.open()
    wait_for(page, "done", None)
    # Not one token more, though one was on its way.
    assert (shown(page)["text"], shown(page)["status"]) == (written, "stopped")
    expect(page.locator("[data-meter=tokens]")).to_contain_text("5 written")
    expect(stop).to_be_disabled()
    assert answered(page, PROMPT, "Fetched", 8)["status"] == "length limit reached"


def test_an_address_that_is_taken(servers, capsys):
    port = urlsplit(servers[0].url).port
    assert main(["demo", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"mlx_hiermem: error: 127\.0\.0\.1, port {port}: .*--port.*\n", error)
    assert main(["demo", "--port", "70000"]) == 2
    assert main(["demo", "--host", "no.such.host.invalid"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_what_is_no_model_and_what_is_no_run(servers, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no model")
    assert main(["demo", "--model", str(tmp_path), "--port", "0", "--no-browser"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mlx_hiermem: error: ") and error.count("\n") == 1
    assert str(tmp_path) in error
    assert main(["demo", "--run", str(tmp_path / "none"), "--no-browser"]) == 2
    error = capsys.readouterr().err
    assert "--run" in error and error.count("\n") == 1
