"""The tabs about training and the bank, clicked."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from mlx_hiermem import load
from mlx_hiermem.training.curves import LOG, read_log
from tests.browser.conftest import EVIL_NAMES
from tests.browser.pages import CONTRAST, answered, learn, send, tab

BASQUE = "The language code of Basque is"


def inks(picture: Locator) -> tuple[float, float]:
    """(brightness of the ground, strongest contrast to it) of what is seen, both in 0..1."""
    image = Image.open(io.BytesIO(picture.screenshot())).convert("L")
    counts = image.histogram()
    ground = max(range(256), key=counts.__getitem__)
    return ground / 255, max(abs(i - ground) for i in range(256) if counts[i]) / 255


def verify(page: Page, phase: str) -> str:
    """Clicks Verify; what the page says of it then."""
    page.get_by_role("button", name="Verify every byte").click()
    expect(page.locator("#bank-verified .hm-verified")).to_have_attribute("data-phase", phase)
    expect(page.get_by_role("button", name="Verify every byte")).to_be_enabled()
    return page.locator("#bank-verified").get_by_role(
        "status" if phase == "whole" else "alert"
    ).text_content()  # fmt: skip


@contextmanager
def altered(file: Path) -> Iterator[None]:
    """One bit is another one, for a while."""
    place, byte = file.stat().st_size - 3, file.read_bytes()[-3]

    def put(byte: int) -> None:
        with open(file, "r+b") as opened:
            opened.seek(place)
            opened.write(bytes([byte]))

    put(byte ^ 1)
    try:
        yield
    finally:
        put(byte)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_curves_of_a_run_live(servers, open_page, scheme):
    run = servers[0].run
    page = open_page(servers[0], scheme)
    tab(page, "Training")
    last = read_log(run / LOG).steps[-1]["step"]
    figures, picture = page.locator("#training-figures"), page.get_by_alt_text("Learning curves")
    expect(figures.locator("dd").first).to_have_text(f"{last}")
    expect(figures).to_contain_text(f"Validation, fetched{4 - last / 100:.4f} at step {last}")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300
    ground, contrast = inks(picture)
    assert (ground < 0.4) == (scheme == "dark") and contrast > 0.75
    # The run goes on, and nobody clicks.
    before = picture.get_attribute("src")
    learn(run, last + 1, last + 10)
    expect(figures.locator("dd").first).to_have_text(f"{last + 10}")
    expect(figures).to_contain_text(f"Training loss{8 / (last + 10):.4f}")
    expect(picture).not_to_have_attribute("src", before)
    front, _ = figures.locator("dt").first.evaluate(CONTRAST)
    assert front >= 4.5  # WCAG AA


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_the_bank_holds(servers, lm, open_page, scheme):
    page = open_page(servers[0], scheme)
    tab(page, "Bank")
    report = lm.bank.inspect()
    held = page.locator("#bank-inspect")
    expect(held).to_contain_text(report["revision"][:12])
    rows = held.locator("tbody tr")
    expect(rows).to_have_count(len(report["levels"]))
    for row, level in zip(rows.all(), report["levels"], strict=True):
        cells = row.locator("th, td").all_text_contents()
        assert cells[:2] == [str(level["level"]), f"{level['clusters']:,}"]
        assert cells[4:] == [level["tier"], "0"]
    assert verify(page, "whole").startswith("Whole: all ")
    # Each answer counts, for each cluster of its path; the most used are first.
    used = page.locator("#bank-used")
    before = total(used)
    tab(page, "Ask")
    path = [int(i) for i in answered(page, BASQUE, "Fetched", 2)["path"]]
    for _ in range(2):
        answered(page, BASQUE, "Fetched", 2)
    tab(page, "Bank")
    expect(used.locator("caption").first).to_contain_text(f"used by {before + 3:,} answers")
    for table, cluster in zip(used.locator("table").all(), path, strict=True):
        counts = [
            int(text.split()[0].replace(",", ""))
            for text in table.locator("td:last-child").all_text_contents()
        ]
        assert counts == sorted(counts, reverse=True)
        mine = table.get_by_role("row").filter(has=page.get_by_role("rowheader", name=f"{cluster}"))
        assert int(mine.first.locator("td").last.text_content().split()[0]) >= 3
    for part in ("#bank-inspect td", "#bank-verified p", "#bank-used td", "#bank-used caption"):
        contrast, ground = page.locator(part).first.evaluate(CONTRAST)
        assert contrast >= 4.5 and (ground < 0.4) == (scheme == "dark"), part


def total(used: Locator) -> int:
    """How many answers have used clusters so far."""
    found = used.locator("caption")
    if not found.count():
        return 0
    text = re.search(r"used by ([\d,]+) answers", found.first.text_content())[1]
    return int(text.replace(",", ""))


def test_a_damaged_bank_is_named_and_the_page_goes_on(servers, open_page):
    server = servers[1]
    memory = Path(server.model) / "memory"
    file = next(memory.glob("level-2-*"))
    page = open_page(server)
    tab(page, "Bank")
    with altered(file):
        said = verify(page, "damaged")
        assert said.startswith("Not whole: ") and file.name in said
        assert str(memory) not in page.content()
        tab(page, "Ask")
        assert answered(page, "Oslo", "Fetched", 4)["memory"] == "fetched"
        tab(page, "Bank")
    assert verify(page, "whole").startswith("Whole: all ")


def test_names_of_used_clusters_are_text(servers, open_page):
    page = open_page(servers[1])
    send(page, "Oslo", "Fetched", 2)
    expect(page.locator("#answer .hm-answer")).to_have_attribute("data-state", "done")
    cluster = load(servers[1].model).route("Oslo").ids[0]
    tab(page, "Bank")
    row = page.locator("#bank-used table").first.locator("tbody tr", has_text=EVIL_NAMES[cluster])
    expect(row.locator("th")).to_have_text(str(cluster))
    assert page.locator("#bank-used img, #bank-used script").count() == 0
