"""The demo page in a real browser: the server as users start it, clicked by Playwright.

What the page shows is compared with what the same model says in this process. Every request that
the browser makes is recorded: none may leave this machine. The server runs behind proxies that do
not answer, so that it could not ask anybody either.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from mlx_hiermem import load
from mlx_hiermem.cli import main
from mlx_hiermem.engine import MemoryLM
from tests.tiny import make_tiny_model

#: The model that the answers are read from.
MODEL = "atlas"

PROMPT = "The atomic number of hafnium is"
OTHER_PROMPT = "The chemical symbol of tungsten is"

#: The page's examples, and the truth.
TRUE = {
    "The atomic number of hafnium is": "72.",
    "The chemical symbol of tungsten is": "W.",
    "The language code of Basque is": "eus.",
    "The currency code of the Tenge is": "KZT.",
    "The country of the subdivision Hokkaido is": "Japan.",
}

#: Milliseconds that the browser waits for something, on a machine that may be busy.
PATIENCE = 60_000

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

#: A proxy that refuses: whatever is not asked on this machine fails.
NO_NETWORK = dict.fromkeys(
    ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"
)


@dataclass
class Server:
    model: str
    process: subprocess.Popen[str]
    errors: Path
    url: str = ""

    def wait(self) -> None:
        """Until it says where it is."""
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, f"{line!r}; {self.errors.read_text()}"
        self.url = found[0]

    def stop(self) -> None:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(30)
        finally:
            self.process.kill()
        assert code == 0, self.errors.read_text()
        assert "Traceback" not in self.errors.read_text()


def start(model: str, errors: Path) -> Server:
    command = [sys.executable, "-m", "mlx_hiermem", "demo", "--model", model]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRADIO_")}
    environment |= NO_NETWORK | {"DISPLAY": "", "WAYLAND_DISPLAY": ""}
    environment.pop("no_proxy", None), environment.pop("NO_PROXY", None)
    process = subprocess.Popen(
        [*command, "--port", "0", "--no-browser"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=errors.open("w"), cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return Server(model, process, errors)


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[tuple[Server, Server]]:
    """One for the answers, and one whose model goes on for thousands of tokens."""
    folder = make_tiny_model(tmp_path_factory.mktemp("endless"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    logs = tmp_path_factory.mktemp("logs")
    both = start(MODEL, logs / "shown"), start(str(folder), logs / "endless")
    try:
        for server in both:
            server.wait()
        yield both
        for server in both:
            server.stop()
    finally:
        for server in both:
            server.process.kill()


@pytest.fixture(scope="module")
def lm(servers) -> MemoryLM:
    return load(servers[0].model)


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


def send(page: Page, prompt: str, memory: str = "Fetched", tokens: int = 48) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label(memory, exact=True).check()
    field = page.locator("#max-tokens input[type=number]")
    field.fill(str(tokens))
    field.blur()
    page.get_by_role("button", name="Send").click()


def number(page: Page) -> str | None:
    """Tells an answer from the one before."""
    return page.locator("#answer .hm-answer").get_attribute("data-number")


def wait_for(page: Page, state: str, after: str | None) -> None:
    """Until the answer after number ``after`` is in ``state`` and another may be asked for."""
    answer = page.locator("#answer .hm-answer")
    expect(answer).not_to_have_attribute("data-number", after or "")
    expect(answer).to_have_attribute("data-state", state)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def refused(page: Page, *question) -> str:
    """Sends what cannot be answered; the error that the page shows."""
    before = number(page)
    send(page, *question)
    wait_for(page, "error", before)
    assert page.locator("#report .hm-report").count() == 0
    return page.get_by_role("alert").text_content()


def answered(page: Page, *question) -> dict:
    """Sends, waits for the end, and reads what the page shows."""
    before = number(page)
    send(page, *question)
    wait_for(page, "done", before)
    return shown(page)


def shown(page: Page) -> dict:
    path = page.locator("#report .hm-path")
    share = page.locator("#report [data-meter=share]")
    return {
        "prompt": page.locator("#answer .hm-prompt").text_content(),
        "text": page.locator("#answer .hm-written").text_content(),
        "status": page.locator("#answer .hm-status").text_content(),
        "memory": page.locator("#report .hm-report").get_attribute("data-memory"),
        "path": path.locator(".hm-cluster").all_text_contents() if path.count() else None,
        "rows": [
            row.locator("th, td").all_text_contents()
            for row in page.locator("#report tbody tr").all()
        ],
        "bytes": int(share.get_attribute("data-bytes")),
        "bank": int(share.get_attribute("data-bank")),
        "speed": page.locator("#report [data-meter=speed]").text_content(),
    }


def said(lm: MemoryLM, prompt: str, memory: str, tokens: int) -> dict:
    """What the page has to show of the same model's answer, without times and sources."""
    pieces = list(lm.stream(prompt, memory, tokens))
    last = pieces[-1]
    return {
        "prompt": prompt,
        "text": "".join(piece.text for piece in pieces),
        "memory": memory,
        "path": None if last.path is None else [str(i) for i in last.path.ids],
        "rows": [
            [str(b.level), "generic" if b.cluster is None else str(b.cluster), f"{b.bytes:,}", "no"]
            for b in last.fetch.blocks
        ],
        "bytes": last.fetch.bytes,
        "bank": sum(level["total_bytes"] for level in lm.bank.inspect()["levels"]),
    }


def without_times(shown: dict) -> dict:
    rows = [[*row[:3], row[5]] for row in shown["rows"]]
    return {key: shown[key] for key in shown if key not in ("status", "speed")} | {"rows": rows}


def speed_of(shown: dict) -> float:
    return float(re.fullmatch(r"([\d,]+) tokens/s", shown["speed"])[1].replace(",", ""))


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


def test_markup_and_templates_are_text(servers, open_page):
    page = open_page(servers[0])
    evil = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} <b>&amp; `x`"
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    assert answered(page, evil, "Off", 4)["prompt"] == evil
    assert page.locator("#answer img, #answer b").count() == 0
    assert dialogs == []


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


CONTRAST = """element => {
  const rgb = color => {
    const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
      .getContext('2d', {willReadFrequently: true});
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = color => {
    const [r, g, b] = rgb(color).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let behind = element;
  while (rgb(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
  const [front, back] = [getComputedStyle(element).color,
    getComputedStyle(behind).backgroundColor].map(luminance);
  return [(Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05), back];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_in_light_and_dark_and_on_a_phone(servers, open_page, scheme):
    page = open_page(servers[0], color_scheme=scheme, viewport={"width": 390, "height": 800})
    answered(page, PROMPT, "Fetched", 24)
    for part in (".hm-legend", ".hm-prompt", ".hm-written", "#report td", "#report dt"):
        contrast, background = page.locator(part).first.evaluate(CONTRAST)
        assert contrast >= 4.5, part  # WCAG AA
        assert (background < 0.2) == (scheme == "dark"), part
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_an_address_that_is_taken(servers, capsys):
    port = urlsplit(servers[0].url).port
    assert main(["demo", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"mlx_hiermem: error: 127\.0\.0\.1, port {port}: .*--port.*\n", error)
    assert main(["demo", "--port", "70000"]) == 2
    assert main(["demo", "--host", "no.such.host.invalid"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
