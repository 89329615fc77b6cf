"""Server and page of the browser tests: started as users do, read and clicked."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from playwright.sync_api import Page, expect

from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.training.curves import Curves

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
    run: Path | None = None
    url: str = ""

    def wait(self) -> None:
        """Until it says where it is."""
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, f"{line!r}; {self.errors.read_text()}"
        self.url = found[0]

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def ended(self) -> None:
        """Waits for the end, which must be a clean one."""
        try:
            code = self.process.wait(30)
        finally:
            self.process.kill()
        assert code == 0, self.errors.read_text()
        assert "Traceback" not in self.errors.read_text()


def start(model: str, errors: Path, gates: Path | None = None, run: Path | None = None) -> Server:
    """``gates``: see tests/browser/held.py; ``run``: of a training."""
    program = ["mlx_hiermem"] if gates is None else ["tests.browser.held", str(gates)]
    command = [sys.executable, "-m", *program, "demo", "--model", model]
    command += [] if run is None else ["--run", str(run)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRADIO_")}
    environment |= NO_NETWORK | {"DISPLAY": "", "WAYLAND_DISPLAY": ""}
    environment.pop("no_proxy", None), environment.pop("NO_PROXY", None)
    process = subprocess.Popen(
        [*command, "--port", "0", "--no-browser"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=errors.open("w"), cwd=Path(__file__).parents[2],
        # Shells have what runs in their background ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    return Server(model, process, errors, run)


@dataclass(frozen=True)
class Gate:
    """A gate of the server's model (tests/browser/held.py), shut until it is opened.

    Attributes:
        name: another one for each test.
    """

    folder: Path
    name: str

    @property
    def wait(self) -> str:
        """A prompt that is not answered while the gate is shut."""
        return f"wait for gate {self.name}"

    @property
    def pause(self) -> str:
        """A prompt whose answer stands still after its first tokens."""
        return f"pause at gate {self.name}"

    @property
    def light(self) -> str:
        """A prompt whose path lights up when it may."""
        return f"light at gate {self.name}"

    def open(self, number: object = "") -> None:
        """``number``: of the level that may be lit up."""
        (self.folder / f"{self.name}{number}").touch()

    def shut(self) -> None:
        """As it was in the beginning."""
        (self.folder / self.name).unlink()


def learn(run: Path, first: int, last: int) -> None:
    """Write a part of a training's log."""
    with Curves(run) as curves:
        for step in range(first, last + 1):
            curves.step({"step": step, "loss": 8 / step, "learning_rate": 1e-3})
        curves.validation(last, {"none": 5 - last / 100, "fetched": 4 - last / 100})


def opened(page: Page) -> Page:
    """Waits until the page can be used."""
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    return page


def send(page: Page, prompt: str, memory: str = "Fetched", tokens: int = 48) -> None:
    prepare(page, prompt, memory, tokens)
    page.get_by_role("button", name="Send").click()


def prepare(page: Page, prompt: str, memory: str, tokens: int) -> None:
    """Fill in what is asked, and do not send it yet."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label(memory, exact=True).check()
    field = page.locator("#max-tokens input[type=number]")
    field.fill(str(tokens))
    field.blur()


def number(page: Page) -> str | None:
    """Tells an answer from the one before."""
    return page.locator("#answer .hm-answer").get_attribute("data-number")


def wait_for(page: Page, state: str, after: str | None) -> None:
    """Until the answer after number ``after`` is in ``state`` and another may be asked for."""
    answer = page.locator("#answer .hm-answer")
    expect(answer).not_to_have_attribute("data-number", after or "")
    expect(answer).to_have_attribute("data-state", state)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def stopped(page: Page, act: Callable[[], None]) -> None:
    """``act`` is to stop an answer; waits until the server knows."""
    with page.expect_response(lambda one: one.request.method == "POST"):
        act()


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
    share = page.locator("#meters [data-meter=share]")
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
        "speed": page.locator("#meters [data-meter=speed]").text_content(),
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


def tab(page: Page, name: str) -> None:
    """Open a tab; where there is no room for all, out of the menu of the others."""
    found = page.get_by_role("tab", name=name)
    if not found.count():
        page.get_by_role("button", name="More tabs").click()
        page.locator(".overflow-dropdown").get_by_text(name).click()
        found = page.get_by_role("tab", name=name)
    found.click()
    expect(found).to_have_attribute("aria-selected", "true")


def fill(page: Page, label: str, text: str, tokens_of: str, tokens: int) -> None:
    """Fill a tab's prompt and its number of tokens."""
    page.get_by_label(label, exact=True).fill(text)
    field = page.locator(f"#{tokens_of} input[type=number]")
    field.fill(str(tokens))
    field.blur()


def compared(page: Page, prompt: str, tokens: int = 24) -> dict[str, str]:
    """Sends a prompt side by side; the answers by lane."""
    before = page.locator("#lanes [data-number]")
    number = before.first.get_attribute("data-number") if before.count() else ""
    fill(page, "Prompt for all three", prompt, "compare-tokens", tokens)
    page.get_by_role("button", name="Compare").click()
    lanes = page.locator("#lanes .hm-lanes")
    expect(lanes).not_to_have_attribute("data-number", number or "")
    expect(lanes).to_have_attribute("data-state", "done")
    return {
        lane.get_attribute("data-lane"): lane.locator(".hm-written").text_content()
        for lane in page.locator("#lanes [data-lane]").all()
    }


def tried(page: Page, prompt: str, expected: str, tokens: int = 24) -> None:
    """Asks in Hands on."""
    fill(page, "Prompt to try", prompt, "hands-tokens", tokens)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#hands-answer .hm-prompt")).to_have_text(prompt)
    shows(page, expected)


def shows(page: Page, expected: str) -> None:
    """Waits until Hands on shows an answer."""
    card = page.locator("#hands-answer .hm-answer[data-number]")
    expect(card.locator(".hm-written")).to_have_text(expected.strip())
    expect(card).to_have_attribute("data-state", "done")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def says(page: Page, message: str, turn: int, tokens: int = 4) -> list[tuple[str, str]]:
    """Says something in Conversation; (what became of it, source) of each level."""
    fill(page, "Message", message, "talk-tokens", tokens)
    page.get_by_role("button", name="Send").click()
    card = page.locator("#talk ol > li").nth(turn)
    expect(card).to_have_attribute("data-state", "done")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    return [
        (level.get_attribute("data-change"), level.get_attribute("data-source"))
        for level in card.locator("[data-change]").all()
    ]


def words(path: Sequence[int]) -> str:
    return ",".join(map(str, path))


#: Seen on its ground: (contrast, luminance of the ground).
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
