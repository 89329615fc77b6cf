"""The demo page for everybody: by keyboard, for screen readers, on a phone, light and dark."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from apps.demo import tree_view
from mlx_hiermem import load
from mlx_hiermem.bank.report import BlockReport
from tests.browser.pages import (
    CONTRAST,
    PROMPT,
    answered,
    compared,
    says,
    stopped,
    tab,
    tried,
    wait_for,
)  # fmt: skip

TABS = ("Ask", "Side by side", "Hands on", "Conversation", "Training", "Bank")

#: Roles of what visitors use; each has to have a name.
USED = {"button", "textbox", "radio", "slider", "spinbutton", "tab", "link", "combobox", "checkbox"}

#: What stands over something else: pairs of texts, of the visible elements of a selector.
OVERLAPS = """(root, selector) => {
  const seen = [...root.querySelectorAll(selector)].filter(e => e.offsetParent && e.textContent);
  const boxes = seen.map(e => e.getBoundingClientRect());
  const found = [];
  for (let i = 0; i < seen.length; i++) for (let j = i + 1; j < seen.length; j++) {
    const [a, b] = [boxes[i], boxes[j]];
    const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (width > 1 && height > 1) found.push([seen[i].textContent, seen[j].textContent]);
  }
  return found;
}"""

CUT = "e => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1"


def width(page: Page) -> int:
    return page.evaluate("document.documentElement.scrollWidth")


def press_until(page: Page, key: str, wanted: Locator) -> None:
    """Press a key until ``wanted`` has the focus; what has it on the way can be seen to."""
    for _ in range(80):
        page.keyboard.press(key)
        assert page.evaluate(
            "(e => e === document.body || getComputedStyle(e).outlineStyle !== 'none' || "
            "getComputedStyle(e).boxShadow !== 'none' || e.matches('input, textarea'))"
            "(document.activeElement)"
        )
        if wanted.evaluate("e => e === document.activeElement"):
            return
    raise AssertionError(f"{wanted} is not reached by {key}")


def test_the_keyboard_alone(servers, open_page, gate):
    page = open_page(servers[1])
    keys = page.keyboard
    prompt = page.get_by_label("Prompt", exact=True)
    expect(prompt).to_be_focused()  # from the start
    press_until(page, "Tab", page.locator("#max-tokens input[type=number]"))
    keys.press("Control+a")
    keys.type("4096")
    press_until(page, "Shift+Tab", prompt)
    keys.type(gate.pause)
    keys.press("Enter")
    expect(page.locator("#answer .hm-written")).to_have_text(re.compile(r"^\S{5}$"))
    stopped(page, lambda: keys.press("Escape"))
    gate.open()
    wait_for(page, "done", None)
    expect(page.locator("#answer .hm-status")).to_have_text("stopped")
    # The memory, a tab, and a cluster of its picture.
    press_until(page, "Tab", page.get_by_label("Generic", exact=True))
    keys.press("Space")
    expect(page.get_by_label("Generic", exact=True)).to_be_checked()
    press_until(page, "Shift+Tab", page.get_by_role("tab", name="Hands on"))
    keys.press("Enter")
    expect(page.get_by_role("tab", name="Hands on")).to_have_attribute("aria-selected", "true")
    press_until(page, "Tab", page.get_by_label("Prompt to try", exact=True))
    keys.type("Oslo")
    press_until(page, "Tab", page.locator("#hands-tokens input[type=number]"))
    keys.press("Control+a")
    keys.type("4")
    press_until(page, "Shift+Tab", page.get_by_label("Prompt to try", exact=True))
    keys.press("Enter")
    expect(page.locator("#hands-answer [data-state=done]")).to_have_count(1)
    top = load(servers[1].model).route("Oslo").ids[0]
    cluster = page.locator(f"#hands-picture [data-level='1'][data-cluster='{top}']")
    press_until(page, "Tab", cluster)
    keys.press("Space")
    expect(page.locator("#own [data-off]")).to_have_attribute("data-off", f"1,{top}")
    expect(page.locator("#hands-answer [data-when=now][data-state=done]")).to_have_count(1)
    expect(cluster).to_have_attribute("aria-pressed", "true")
    expect(cluster).to_be_focused()


def test_names_for_screen_readers(servers, open_page):
    page = open_page(servers[0])
    answered(page, PROMPT, "Fetched", 4)
    devices = page.context.new_cdp_session(page)
    wanted = {
        "Ask": {"textbox Prompt", "radio Fetched", "radio Generic", "radio Off", "button Send",
                "button Stop", f"button {PROMPT}", "tab Ask", "tab Hands on"},
        "Side by side": {"textbox Prompt for all three", "button Compare", "button Stop"},
        "Hands on": {"textbox Prompt to try", "textbox Path to pin", "button Pin this path",
                     "button All on, unpin"},
        "Conversation": {"textbox Message", "button New conversation"},
        "Training": {"image Learning curves: training loss, learning rate and validation losses "
                     "by step"},
        "Bank": {"button Verify every byte"},
    }  # fmt: skip
    for name in TABS:
        tab(page, name)
        if name == "Training":
            expect(page.get_by_alt_text("Learning curves")).to_be_visible()
        found = set()
        for node in devices.send("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            if node["ignored"] or role not in USED | {"image", "progressbar"}:
                continue
            called = node.get("name", {}).get("value", "").strip()
            assert called, (name, node)
            found.add(f"{role} {called}")
        assert wanted[name] <= found, (name, wanted[name] - found)
        if name in ("Ask", "Side by side", "Hands on", "Conversation"):
            assert any(one.startswith("button Level 1, cluster ") for one in found)
            assert any(one.startswith("slider") and "Max tokens" in one for one in found)
            assert any(one.startswith("spinbutton") and "Max tokens" in one for one in found)
    tab(page, "Ask")
    # What changes is told, and what the picture shows is there in words.
    expect(page.locator("#answer .hm-status")).to_have_attribute("role", "status")
    words = page.locator("#picture").get_by_role("list", name="Path through the tree")
    assert words.get_by_role("listitem").count() == 2
    expect(page.get_by_role("table", name="Fetched blocks")).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_part_is_readable_on_a_phone(servers, open_page, scheme):
    page = open_page(servers[0], scheme, 390)

    def check(*parts: str) -> None:
        for part in parts:
            contrast, ground = page.locator(part).first.evaluate(CONTRAST)
            assert contrast >= 4.5, part  # WCAG AA
            assert (ground < 0.4) == (scheme == "dark"), part
        assert width(page) <= 390

    answered(page, PROMPT, "Fetched", 24)
    # As the words of Gradio's own parts.
    check("[role=tab][aria-selected=true]", "[data-testid=block-info]", "#examples button")
    table = page.locator("#report .hm-scroll")
    assert table.evaluate("e => e.scrollWidth <= e.clientWidth")  # nothing is out of sight
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
    tab(page, "Training")
    expect(page.get_by_alt_text("Learning curves")).to_be_visible()
    check("#training-figures dt")
    tab(page, "Bank")
    expect(page.locator("#bank-used table")).to_have_count(2)
    check("#bank-inspect td", "#bank-verified p", "#bank-used td")


@pytest.mark.parametrize(("wide", "levels"), [(900, 4), (390, 4), (900, 1), (390, 1)])
def test_a_tree_with_65_536_leaves_is_readable(servers, open_page, wide, levels):
    """16^4 leaves, or all of them below one root."""
    page = open_page(servers[0], "light", wide)
    leaf, branching = 45_678, round(65_536 ** (1 / levels))
    path = [leaf // branching ** (levels - level) for level in range(1, levels + 1)]
    blocks = [BlockReport(i, one, 123_456, 12.345, "disk") for i, one in enumerate(path, 1)]
    html = tree_view.picture(path, blocks, branching=branching, levels=levels, ident="big")
    picture = page.locator("#picture")
    picture.evaluate("(e, html) => { e.innerHTML = html }", html)
    expect(picture.locator(f".hm-tree[data-lit='{levels}']")).to_have_count(1)
    for what in (".hm-tree-node", ".hm-tree-title, .hm-tree-more, .hm-tree-fetch > span"):
        assert picture.evaluate(OVERLAPS, what) == []
    lit = picture.locator("[data-path=true]")
    assert [int(one.get_attribute("data-cluster")) for one in lit.all()] == path
    for one in lit.all():
        assert not one.locator(".hm-tree-name").evaluate(CUT)
        assert one.evaluate("e => e.getBoundingClientRect().height") >= 24  # WCAG 2.2 AA
    heads = picture.locator(".hm-tree-fetch")
    assert heads.all_text_contents() == ["123.5 kB 12.345 ms disk"] * levels
    assert picture.locator(".hm-tree-node").count() == (64 if levels == 4 else tree_view.SHOWN)
    assert width(page) <= wide
