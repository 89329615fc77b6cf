"""Take the pictures of the demo page that docs/images holds: ``make screenshots``.

The atlas model is asked; light, dark, and on a phone. They are pictures of a machine's browser, so
they differ from machine to machine, and no test compares them.
"""

from __future__ import annotations

import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from mlx_hiermem.training.curves import Curves
from tests.browser.pages import (
    FLAGS,
    MODEL,
    OTHER_PROMPT,
    PROMPT,
    answered,
    fill,
    start,
    tab,
)

FOLDER = Path(__file__).parents[2] / "docs" / "images"

#: Bytes that a picture may have, so that a clone stays small.
LARGEST = 300_000


def ask(page: Page) -> None:
    answered(page, PROMPT)


def compare(page: Page) -> None:
    tab(page, "Side by side")
    fill(page, "Prompt for all three", PROMPT, "compare-tokens", 48)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#lanes .hm-lanes")).to_have_attribute("data-state", "done")


def hands_on(page: Page) -> None:
    tab(page, "Hands on")
    fill(page, "Prompt to try", PROMPT, "hands-tokens", 48)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#hands-answer [data-state=done]")).to_have_count(1)
    page.locator("#hands-picture .hm-tree-node[data-path=true]").last.click()
    expect(page.locator("#hands-answer [data-when=now][data-state=done]")).to_have_count(1)


def talk(page: Page) -> None:
    tab(page, "Conversation")
    for turn, message in enumerate((PROMPT, PROMPT, OTHER_PROMPT)):
        fill(page, "Message", message, "talk-tokens", 48)
        page.get_by_role("button", name="Send").click()
        card = page.locator("#talk ol > li").nth(turn)
        expect(card).to_have_attribute("data-state", "done")
        expect(page.get_by_role("button", name="Send")).to_be_enabled()


def training(page: Page) -> None:
    tab(page, "Training")
    expect(page.get_by_alt_text("Learning curves")).to_be_visible()


def bank(page: Page) -> None:
    for prompt in (PROMPT, OTHER_PROMPT, PROMPT):
        answered(page, prompt, "Fetched", 4)
    tab(page, "Bank")
    page.get_by_role("button", name="Verify every byte").click()
    expect(page.locator("#bank-verified [data-phase=whole]")).to_have_count(1)


PARTS: dict[str, Callable[[Page], None]] = {
    "ask": ask, "compare": compare, "hands-on": hands_on, "conversation": talk,
    "training": training, "bank": bank,
}  # fmt: skip


def learn(run: Path) -> None:
    """Write a log as of a training, though there was none: what the tab looks like."""
    noise = random.Random(0)
    with Curves(run) as curves:
        for step in range(1, 401):
            loss = 2.4 + 5.6 * math.exp(-step / 70) + noise.gauss(0, 0.12)
            rate = 1e-3 * min(1, step / 40) * (1 + math.cos(math.pi * step / 400)) / 2
            curves.step({"step": step, "loss": loss, "learning_rate": rate})
            if step % 50 == 0:
                late = math.exp(-step / 90)
                losses = {
                    "none": 3.2 + 3 * late,
                    "generic": 2.9 + 3 * late,
                    "fetched": 2.4 + 3 * late,
                }
                curves.validation(step, losses)


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    expect.set_options(timeout=60_000)
    with tempfile.TemporaryDirectory() as logs, sync_playwright() as playwright:
        learn(Path(logs))
        server = start(MODEL, Path(logs) / "errors", run=Path(logs))
        try:
            server.wait()
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
            wanted = [(part, scheme, 900) for part in PARTS for scheme in ("light", "dark")]
            for part, scheme, width in [*wanted, ("ask", "phone", 390)]:
                page = browser.new_page(
                    color_scheme="dark" if scheme == "dark" else "light",
                    viewport={"width": width, "height": 900},
                )
                page.goto(server.url)
                expect(page.get_by_role("button", name="Send")).to_be_enabled()
                PARTS[part](page)
                page.mouse.move(0, 0)
                page.evaluate("document.activeElement.blur()")
                file = FOLDER / f"demo-{part}-{scheme}.png"
                page.screenshot(path=file, full_page=True, animations="disabled")
                page.close()
                print(f"{file.name}: {file.stat().st_size:,} bytes")
                if file.stat().st_size > LARGEST:
                    print(f"{file.name}: more than {LARGEST:,} bytes", file=sys.stderr)
                    return 1
            browser.close()
            server.interrupt()
            server.ended()
        finally:
            server.process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
