"""Parts of the demo page beside the first answer, clicked: lights, side by side, hands on, talk.

What they show is compared with what the same model says in this process.
"""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from mlx_hiermem import load
from mlx_hiermem.engine import MemoryLM
from tests.browser.pages import (
    CONTRAST,
    OTHER_PROMPT,
    PROMPT,
    answered,
    fill,
    send,
    tab,
    wait_for,
    words,
)  # fmt: skip

EVIL = "<img src=x onerror=alert(1)> <script>alert(2)</script> ${alert(3)} {{value}} <b>&amp;"

#: Writes down how many levels are lit, each time that changes.
WATCH = """element => {
  window.lit = [];
  const look = () => {
    const found = element.querySelector('.hm-tree')?.dataset.lit;
    if (found !== undefined && window.lit.at(-1) !== found) window.lit.push(found);
  };
  look();
  new MutationObserver(look).observe(element, {childList: true, subtree: true});
}"""


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


def test_the_path_lights_up_level_by_level(servers, lm, open_page):
    page = open_page(servers[1])
    picture = page.locator("#picture")
    picture.evaluate(WATCH)
    send(page, PROMPT, "Fetched", 200)
    expect(picture.locator(".hm-tree[data-lit='2']")).to_have_count(1)
    assert page.evaluate("window.lit") == ["0", "1", "2"]
    wait_for(page, "done", None)
    path = load(servers[1].model).route(PROMPT)
    lit = picture.locator(".hm-tree-node[data-path=true]")
    assert [int(node.get_attribute("data-cluster")) for node in lit.all()] == list(path.ids)
    rows = page.locator("#report tbody tr").all()
    for level, row in enumerate(rows, 1):
        head = picture.locator(f".hm-tree-level[data-level='{level}'] .hm-tree-fetch")
        size = row.locator("[data-bytes]").get_attribute("data-bytes")
        assert head.locator("[data-bytes]").get_attribute("data-bytes") == size
        *_, ms, source, _ = row.locator("th, td").all_text_contents()
        assert f"{ms} ms" in head.text_content() and source in head.text_content()


def test_side_by_side(servers, lm, open_page):
    page = open_page(servers[0])
    tab(page, "Side by side")
    answers = compared(page, PROMPT)
    expected = {
        memory: lm.generate(PROMPT, memory, 24) for memory in ("none", "generic", "fetched")
    }
    assert answers == expected
    assert len(set(expected.values())) == 3
    marks = page.locator("#lanes mark.hm-differs")
    assert marks.all_text_contents() == [expected["generic"].strip(), expected["fetched"].strip()]
    assert page.locator("#lanes [data-lane=none] mark").count() == 0
    style = marks.first.evaluate(
        "e => { const s = getComputedStyle(e); return [s.textDecorationLine, s.fontWeight] }"
    )
    assert style == ["underline", "800"]  # seen without colour
    path = words(lm.route(PROMPT).ids)
    assert page.locator("#compare-picture .hm-tree").get_attribute("data-path") == path


def test_side_by_side_is_written_together(servers, open_page):
    page = open_page(servers[1])
    tab(page, "Side by side")
    fill(page, "Prompt for all three", PROMPT, "compare-tokens", 4096)
    page.get_by_role("button", name="Compare").click()
    lanes = page.locator("#lanes [data-lane]")
    for i in range(3):
        expect(lanes.nth(i).locator(".hm-written")).to_have_text(re.compile(r"^.{4,}$", re.S))
        expect(lanes.nth(i)).to_have_attribute("data-state", "running")
    page.keyboard.press("Escape")  # as Stop
    for i in range(3):
        expect(lanes.nth(i)).to_have_attribute("data-state", "done")
        expect(lanes.nth(i).locator(".hm-status")).to_have_text("stopped")
    sizes = [len(lane.locator(".hm-written").text_content()) for lane in lanes.all()]
    assert max(sizes) - min(sizes) <= 8 and max(sizes) < 4096


def blocked_answers(lm: MemoryLM, prompt: str, *blocks: tuple[int, int]) -> str:
    """What the model says when blocks are off for everybody."""
    for block in blocks:
        lm.bank.block(*block)
    try:
        return lm.generate(prompt, max_tokens=24)
    finally:
        for block in blocks:
            lm.bank.unblock(*block)


def test_blocks_pins_and_the_change_they_make(servers, lm, open_page):
    page = open_page(servers[0])
    tab(page, "Hands on")
    path, other = lm.route(PROMPT).ids, lm.route(OTHER_PROMPT).ids
    plain = lm.generate(PROMPT, max_tokens=24)
    without = blocked_answers(lm, PROMPT, (2, path[1]))
    pinned = lm.generate(PROMPT, other, 24)
    assert len({plain, without, pinned}) == 3
    tried(page, PROMPT, plain)
    leaf = page.locator(f"#hands-picture [data-level='2'][data-cluster='{path[1]}']")
    leaf.focus()
    page.keyboard.press("Enter")
    shows(page, without)
    assert page.locator("#hands-answer [data-when=before] .hm-written").text_content() == plain
    expect(page.locator("#hands-answer mark")).to_have_text(without.strip())
    expect(leaf).to_have_attribute("aria-pressed", "true")
    expect(leaf).to_be_focused()  # though the picture was drawn anew
    expect(page.locator("#own [data-off]")).to_have_attribute("data-off", f"2,{path[1]}")
    leaf.click()
    shows(page, plain)
    expect(page.locator("#own [data-off]")).to_have_count(0)

    pin = page.get_by_role("button", name="Pin this path")
    page.get_by_label("Path to pin").fill("3,1000")
    pin.click()
    expect(page.locator("#own [role=alert]")).to_contain_text("cluster '1000' of level 2")
    page.get_by_label("Path to pin").fill(words(other))
    pin.click()
    shows(page, pinned)
    expect(page.locator("#own [data-pinned]")).to_have_attribute("data-pinned", words(other))
    tab(page, "Ask")
    assert answered(page, PROMPT, "Fetched", 24)["path"] == list(map(str, other))
    tab(page, "Hands on")
    page.get_by_role("button", name="All on, unpin").click()
    shows(page, plain)


def test_what_one_visitor_has_never_touches_another(servers, lm, open_page):
    first, second = open_page(servers[0]), open_page(servers[0])
    path, plain = lm.route(PROMPT).ids, lm.generate(PROMPT, max_tokens=24)
    off = lm.generate(PROMPT, "none", 24)
    assert off != plain
    for page in (first, second):
        tab(page, "Hands on")
        tried(page, PROMPT, plain)
    for level, cluster in enumerate(path, 1):
        first.locator(f"#hands-picture [data-level='{level}'][data-cluster='{cluster}']").click()
        expect(first.locator("#own [data-off]")).to_have_count(level)
    first.get_by_role("button", name="Pin this path").click()
    expect(first.locator("#own [data-pinned]")).to_have_attribute("data-pinned", words(path))
    shows(first, off)  # all its blocks are zeros
    other = lm.generate(OTHER_PROMPT, max_tokens=24)
    tried(second, OTHER_PROMPT, other)
    tried(second, PROMPT, plain)
    expect(second.locator("#own li")).to_have_count(0)
    expect(second.locator("#hands-picture [aria-pressed=true]")).to_have_count(0)


def test_a_conversation_shows_what_stays(servers, lm, open_page):
    page = open_page(servers[0])
    tab(page, "Conversation")
    same_topic = next(
        prompt
        for prompt in ("The chemical symbol of hafnium is", "Hafnium is", "hafnium")
        if lm.route(prompt).ids == lm.route(PROMPT).ids
    )
    assert [change for change, _ in says(page, PROMPT, 0)] == ["first", "first"]
    assert says(page, same_topic, 1) == [("stayed", "kept")] * 2
    assert [change for change, _ in says(page, OTHER_PROMPT, 2)] == ["changed"] * 2
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#talk li")).to_have_count(0)
    assert [change for change, _ in says(page, PROMPT, 0)] == ["first", "first"]


def test_meters(servers, lm, open_page):
    page = open_page(servers[0])
    answered(page, PROMPT, "Fetched", 24)
    config = lm.bank.config
    expect(page.locator("[data-meter=first]")).to_have_text(re.compile(r"^[\d,]+\.\d ms$"))
    expect(page.locator("[data-meter=hits]")).to_have_text(
        re.compile(r"^[12] of 2 blocks; since the start \d+%$")
    )
    sizes = {
        one.get_attribute("data-size"): int(one.get_attribute("data-bytes"))
        for one in page.locator("[data-size]").all()
    }
    assert sizes["fetched"] == sum(config.block_bytes(level) for level in config.memory_levels)
    assert sizes["cached"] == config.clusters(1) * config.block_bytes(1)  # its resident level
    assert sizes["cached"] + sizes["disk"] == sum(
        config.clusters(level) * config.block_bytes(level) for level in config.memory_levels
    )
    # To scale: the widths are in the proportion of the bytes.
    total = sum(sizes.values())
    bar = page.locator(".hm-parts").bounding_box()["width"]
    for name, size in sizes.items():
        width = page.locator(f".hm-parts [data-part={name}]").bounding_box()["width"]
        assert abs(width - bar * size / total) < 4


def test_markup_is_text_in_every_part(servers, open_page):
    page = open_page(servers[1])
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    assert answered(page, EVIL, "Off", 4)["prompt"] == EVIL
    tab(page, "Side by side")
    compared(page, EVIL, 4)
    assert page.locator("#lanes .hm-prompt").text_content() == EVIL
    tab(page, "Hands on")
    fill(page, "Prompt to try", EVIL, "hands-tokens", 4)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#hands-answer [data-state=done]")).to_have_count(1)
    assert page.locator("#hands-answer .hm-prompt").text_content() == EVIL
    page.get_by_label("Path to pin").fill(EVIL)
    page.get_by_role("button", name="Pin this path").click()
    expect(page.locator("#own [role=alert]")).to_have_count(1)
    tab(page, "Conversation")
    says(page, EVIL, 0)
    assert page.locator("#talk .hm-prompt").text_content() == EVIL
    # Names of clusters come from outside too: those of this model are markup (conftest.py).
    names = page.locator("#talk-picture .hm-tree-name").all_text_contents()
    assert "<img src=x onerror=alert(0)>" in names
    assert page.locator(".hm-lanes img, .hm-answer img, .hm-tree img, .hm-notes img").count() == 0
    assert page.locator("script", has_text="alert(").count() == 0
    assert dialogs == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_part_is_readable_on_a_phone(servers, open_page, scheme):
    page = open_page(servers[0], color_scheme=scheme, viewport={"width": 390, "height": 800})

    def check(*parts: str) -> None:
        for part in parts:
            contrast, ground = page.locator(part).first.evaluate(CONTRAST)
            assert contrast >= 4.5, part  # WCAG AA
            assert (ground < 0.4) == (scheme == "dark"), part
        assert page.evaluate("document.documentElement.scrollWidth") <= 390

    answered(page, PROMPT, "Fetched", 24)
    check(".hm-legend", ".hm-prompt", ".hm-written", "#report td", "#meters dt", ".hm-key li")
    tab(page, "Side by side")
    compared(page, PROMPT)
    check("#lanes mark", "#lanes .hm-notes li", "#lanes h2", "#compare-picture .hm-tree-name")
    tab(page, "Hands on")
    tried(page, PROMPT, "72.")
    page.locator("#hands-picture .hm-tree-node[data-path=true]").last.click()
    expect(page.locator("#own [data-off]")).to_have_count(1)
    expect(page.locator("#hands-answer [data-when=now][data-state=done]")).to_have_count(1)
    check("#own li", "#hands-report td", "#hands-picture .hm-tree-node[data-path=true]")
    tab(page, "Conversation")
    says(page, PROMPT, 0)
    check("#talk .hm-notes li", "#talk .hm-change")
    tab(page, "Bank")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_keyboard_alone(servers, open_page):
    page = open_page(servers[1])
    prompt = page.get_by_label("Prompt", exact=True)
    expect(prompt).to_be_focused()  # from the start
    page.keyboard.type("Oslo")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#examples') !== null")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    prompt.focus()
    page.locator("#max-tokens input[type=number]").fill("4096")
    prompt.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#answer .hm-written")).to_have_text(re.compile(r"^.{4,}$", re.S))
    page.keyboard.press("Escape")
    wait_for(page, "done", None)
    expect(page.locator("#answer .hm-status")).to_have_text("stopped")
