"""Take the pictures of the demo page that docs/images holds: ``make screenshots``.

The atlas model is asked; light, dark, and on a phone. They are pictures of a machine's browser, so
they differ from machine to machine, and no test compares them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.pages import FLAGS, MODEL, OTHER_PROMPT, PROMPT, answered, fill, start, tab

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


PARTS: dict[str, Callable[[Page], None]] = {
    "ask": ask, "compare": compare, "hands-on": hands_on, "conversation": talk,
}  # fmt: skip


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    expect.set_options(timeout=60_000)
    with tempfile.TemporaryDirectory() as logs, sync_playwright() as playwright:
        server = start(MODEL, Path(logs) / "log")
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
            server.stop()
        finally:
            server.process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
