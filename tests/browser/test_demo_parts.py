"""Parts of the demo page beside the first answer, clicked: lights, side by side, hands on, talk.

What they show is compared with what the same model says in this process.
"""

from __future__ import annotations

import re

from playwright.sync_api import expect

from mlx_hiermem import load
from mlx_hiermem.engine import MemoryLM
from mlx_hiermem.routing.names import ClusterNames
from tests.browser.pages import (
    OTHER_PROMPT,
    PROMPT,
    answered,
    compared,
    fill,
    says,
    send,
    shows,
    stopped,
    tab,
    tried,
    wait_for,
    words,
)  # fmt: skip

EVIL = "<img src=x onerror=alert(1)> <script>alert(2)</script> ${alert(3)} {{value}} <b>&amp;"


def test_the_path_lights_up_level_by_level(servers, open_page, gate):
    page = open_page(servers[1])
    picture = page.locator("#picture")
    send(page, gate.light, "Fetched", 8)
    tiny = load(servers[1].model)
    ids = tiny.route(gate.light).ids
    rows = page.locator("#report tbody tr")
    expect(rows).to_have_count(2)
    for lit in range(3):
        if lit:
            gate.open(lit)
        expect(picture.locator(f".hm-tree[data-lit='{lit}']")).to_have_count(1)
        nodes = picture.locator(".hm-tree-node[data-path=true]")
        assert [int(one.get_attribute("data-cluster")) for one in nodes.all()] == list(ids[:lit])
        heads = picture.locator(".hm-tree-fetch [data-bytes]")
        assert heads.count() == lit  # and no size before its level is lit
    wait_for(page, "done", None)
    names = ClusterNames.load(tiny.bank.folder)
    for level, (row, cluster) in enumerate(zip(rows.all(), ids, strict=True), 1):
        column = picture.locator(f".hm-tree-level[data-level='{level}']")
        head = column.locator(".hm-tree-fetch")
        expect(head).to_be_visible()
        *_, size, ms, source, _ = row.locator("th, td").all_text_contents()
        assert head.locator("[data-bytes]").get_attribute("data-bytes") == size.replace(",", "")
        assert f"{ms} ms" in head.text_content() and source in head.text_content()
        lit = column.locator("[data-path=true] .hm-tree-name")
        assert lit.text_content() == names.of(level, cluster)


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


def test_side_by_side_is_written_together(servers, open_page, gate):
    page = open_page(servers[1])
    tab(page, "Side by side")
    fill(page, "Prompt for all three", gate.pause, "compare-tokens", 4096)
    page.get_by_role("button", name="Compare").click()
    lanes = page.locator("#lanes [data-lane]")
    expect(lanes).to_have_count(3)
    for lane in lanes.all():
        expect(lane.locator(".hm-written")).to_have_text(re.compile(r"^\S{5}$"))
        expect(lane).to_have_attribute("data-state", "running")
    stopped(page, lambda: page.keyboard.press("Escape"))  # as Stop
    gate.open()
    for lane in lanes.all():
        expect(lane).to_have_attribute("data-state", "done")
        expect(lane.locator(".hm-status")).to_have_text("stopped")
        assert len(lane.locator(".hm-written").text_content()) == 5


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


def test_a_path_is_pinned_while_the_answer_is_on_its_way(servers, open_page, gate):
    page = open_page(servers[1])
    tiny = load(servers[1].model)
    path = tiny.route(gate.wait).ids
    tab(page, "Hands on")
    gate.open()
    tried(page, gate.wait, tiny.generate(gate.wait, max_tokens=4), 4)
    gate.shut()
    page.locator(f"#hands-picture [data-level='2'][data-cluster='{path[1]}']").click()
    expect(page.locator("#hands-answer [data-when=now]")).to_have_attribute("data-state", "running")
    page.get_by_role("button", name="Pin this path").click()
    expect(page.locator("#own [data-pinned]")).to_have_attribute("data-pinned", words(path))


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
