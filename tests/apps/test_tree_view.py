"""The picture of the tree: well-formed, bounded, and nothing that comes from outside is markup."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.demo.tree_view import SHOWN, SOURCES, listing, picture
from mlx_hiermem.bank.report import SOURCES as REPORTED
from mlx_hiermem.bank.report import BlockReport
from mlx_hiermem.routing.names import ClusterNames

PATH = (3, 50, 812, 13000)
BLOCKS = [
    BlockReport(1, 3, 1_234_567, 0.0104, "resident"),
    BlockReport(2, 50, 8_000, 0.5, "cached"),
    BlockReport(3, 812, 0, 0.0, "blocked", True),
    BlockReport(4, 13000, 8_000, 12.25, "disk"),
]
NAMES = ClusterNames([[f"word{i}" for i in range(16)]])
EVIL = "<script>alert('x')</script>\"'&]]>"


class Named:
    """Names that are whatever they are: those of a bank are checked, the picture must not rely."""

    def __init__(self, name: str) -> None:
        self.name = name

    def of(self, level: int, cluster: int) -> str:
        return self.name


def draw(path=PATH, blocks=BLOCKS, branching=16, levels=4, **more) -> ET.Element:
    return ET.fromstring(picture(path, blocks, branching=branching, levels=levels, **more))


def nodes(tree: ET.Element) -> list[ET.Element]:
    return [one for one in tree.iter() if one.get("class") == "hm-tree-node"]


def text(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def test_only_the_siblings_of_the_path_are_drawn():
    found = {(int(n.get("data-level")), int(n.get("data-cluster"))) for n in nodes(draw())}
    assert found == {
        (level, cluster)
        for level, mine in enumerate(PATH, 1)
        for cluster in range(mine - mine % 16, mine - mine % 16 + 16)
    }
    ids = [node.get("id") for node in nodes(draw(ident="left"))]
    assert len(set(ids)) == 64 and "left-2-50" in ids


@pytest.mark.parametrize("count", range(5))
def test_the_path_lights_up_level_by_level(count):
    tree = draw(blocks=BLOCKS[:count])
    lit = [int(n.get("data-cluster")) for n in nodes(tree) if n.get("data-path") == "true"]
    assert lit == list(PATH[:count]) and tree.get("data-lit") == str(count)
    assert tree.get("data-path") == ",".join(map(str, PATH[:count]))
    levels = [one for one in tree.iter() if one.get("class") == "hm-tree-level"]
    assert [one.get("data-lit") for one in levels] == ["true"] * count + ["false"] * (4 - count)
    curves = [one for one in tree.iter("path") if one.get("class") == "hm-tree-lit"]
    assert len(curves) == max(0, count - 1) and len(list(tree.iter("path"))) == 48
    # What has not arrived is not told either.
    words = text(tree.find("ol"))
    assert ("cluster 13000" in words) == (count == 4)
    assert len(tree.find("ol")) == max(1, count)


def test_the_lit_line_leads_from_parent_to_child():
    curves = [one.get("d") for one in draw().iter("path") if one.get("class") == "hm-tree-lit"]
    assert curves[0] == "M0 3.5C5 3.5 5 2.5 10 2.5"  # cluster 3 of 16 to cluster 50 % 16 = 2
    assert curves[1] == "M0 2.5C5 2.5 5 12.5 10 12.5"  # and on to 812 % 16 = 12


def test_sizes_times_and_sources_stand_in_words():
    tree = draw(names=NAMES)
    heads = [text(one) for one in tree.iter() if one.get("class") == "hm-tree-fetch"]
    assert heads[0] == "1.2 MB 0.010 ms resident" and heads[3] == "8.0 kB 12.250 ms disk"
    assert set(SOURCES) == set(REPORTED)
    sources = [one.get("data-source") for one in tree.iter() if one.get("class") == "hm-source"]
    assert sources == ["resident", "cached", "blocked", "disk"]
    label = next(n.get("aria-label") for n in nodes(tree) if n.get("id") == "tree-1-3")
    assert label == "Level 1, cluster 3: word3; on the path; 1.2 MB in 0.010 ms, resident"
    items = [text(one) for one in tree.find("ol")]
    assert items[3] == "Level 4, cluster 13000: cluster 13000; 8.0 kB in 12.250 ms, disk"
    assert items == [text(one) for one in ET.fromstring(listing(PATH, BLOCKS, NAMES))]


def test_blocked_clusters_are_crossed_out_and_said_to_be():
    by_id = {n.get("id"): n for n in nodes(draw(blocked={(1, 5)}))}
    for ident in ("tree-1-5", "tree-3-812"):
        node = by_id[ident]
        assert node.get("aria-pressed") == node.get("data-blocked") == "true"
        assert node.find(".//s") is not None and "blocked" in node.get("aria-label")
    assert by_id["tree-1-3"].get("aria-pressed") == "false"
    assert by_id["tree-1-3"].find(".//s") is None
    assert len([n for n in by_id.values() if n.get("aria-pressed") == "true"]) == 2


def test_without_a_path_level_1_is_there_to_be_clicked():
    tree = draw(None, [BlockReport(1, None, 96, 0.1, "disk")])  # the generic memory
    assert len(nodes(tree)) == 16 and tree.get("data-lit") == "0"
    assert "nothing is routed" in text(tree)


def test_a_level_without_memory_lights_up_with_the_others():
    some = [block for block in BLOCKS if block.level in (2, 3)]
    assert draw(blocks=[], memory_levels=(2, 3)).get("data-lit") == "0"
    assert draw(blocks=some[:1], memory_levels=(2, 3)).get("data-lit") == "2"
    tree = draw(blocks=some, memory_levels=(2, 3))
    assert tree.get("data-lit") == "4"
    heads = [text(one) for one in tree.iter() if one.get("class") == "hm-tree-fetch"]
    assert heads[0] == heads[3] == "no memory"


@pytest.mark.parametrize("mine", [0, 7, 5000, 65_535])
def test_wide_levels_show_what_is_next_to_the_path(mine):
    tree = draw((mine,), [BlockReport(1, mine, 8, 0.1, "disk")], 65_536, 1)
    shown = [int(n.get("data-cluster")) for n in nodes(tree)]
    assert len(shown) == SHOWN and mine in shown and 0 <= shown[0] and shown[-1] < 65_536
    assert "of 65,536" in text(tree)


@given(
    name=st.one_of(st.text(max_size=60), st.sampled_from([EVIL, "\x00\x1b[31m", "\ud800", "‮"])),
    ident=st.sampled_from(["tree", EVIL]),
    source=st.sampled_from([*SOURCES, EVIL]),
    shape=st.sampled_from([(2, 1), (3, 3), (16, 2), (16, 4), (70, 2)]),
    data=st.data(),
)
def test_whatever_comes_from_outside_is_text_and_the_picture_is_bounded(
    name, ident, source, shape, data
):
    k, p = shape
    leaf = data.draw(st.integers(0, k**p - 1))
    path = [leaf // k ** (p - level) for level in range(1, p + 1)]
    count = data.draw(st.integers(0, p))
    blocks = [BlockReport(i, c, 8, 0.5, source) for i, c in enumerate(path[:count], 1)]
    tree = draw(path, blocks, k, p, names=Named(name), blocked={(p, leaf)}, ident=ident)
    known = {"section", "ol", "li", "div", "p", "span", "svg", "path", "button", "s"}
    assert {one.tag for one in tree.iter()} <= known
    assert not any(key.startswith("on") for one in tree.iter() for key in one.keys())
    assert p * min(k, SHOWN) == len(nodes(tree)) <= p * k
    labels = {"".join(one.itertext()) for one in tree.iter() if one.get("class") == "hm-tree-name"}
    if name:
        assert labels == {"".join(one if one.isprintable() else " " for one in name)}


def test_added_memories_stand_behind_the_others_at_level_one():
    blocks = [BlockReport(1, 4, 8, 0.1, "disk"), BlockReport(2, 14, 8, 0.1, "disk")]
    tree = draw((4, 14), blocks, branching=3, levels=2, roots=5)
    found = [(int(n.get("data-level")), int(n.get("data-cluster"))) for n in nodes(tree)]
    assert found == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 12), (2, 13), (2, 14)]
    lit = [n.get("data-cluster") for n in nodes(tree) if n.get("data-path") == "true"]
    assert lit == ["4", "14"] and "of 15" in text(tree)
