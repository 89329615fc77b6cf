"""Use counts of a tree, and what is drawn of them: as text, and as cells of a picture."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.commands.bank.picture import draw_text, figure
from mlx_hiermem.commands.bank.uses import Uses


def made(branching: int, levels: int, leaves) -> Uses:
    return Uses.of(branching, levels, leaves, "documents", "made.jsonl")


def as_report(uses: Uses, blocked=()) -> dict:
    """What the picture needs of ``MemoryBank.inspect``."""
    levels = [
        {"level": level, "clusters": uses.branching**level, "tier": "disk"}
        for level in range(1, uses.levels + 1)
    ]
    return {"levels": levels, "blocked": [list(pair) for pair in blocked]}


trees = st.tuples(st.integers(2, 5), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(
        st.just(shape), st.lists(st.integers(0, shape[0] ** shape[1] - 1), min_size=1, max_size=99)
    )
)


@given(trees)
def test_counts_roll_up(tree):
    (branching, levels), leaves = tree
    report = made(branching, levels, leaves).to_dict()
    assert report["total"] == len(leaves) and list(report["levels"]) == [
        str(level) for level in range(1, levels + 1)
    ]
    for level in range(1, levels + 1):
        expected = Counter(str(leaf // branching ** (levels - level)) for leaf in leaves)
        assert report["levels"][str(level)] == dict(expected)
    json.dumps(report)


def test_ids_up_to_the_largest_tree():
    uses = made(2, 61, [2**61 - 1, 0, 2**60])
    assert uses.to_dict()["levels"]["1"] == {"0": 1, "1": 2}
    assert len(draw_text(uses, [(61, 5)])) == 5
    figure(uses, as_report(uses, [(61, 5)]))


def test_text_of_a_known_tree():
    uses = made(2, 3, [0] * 8 + [1] + [3] * 8 + [7])
    assert draw_text(uses, [(1, 1), (3, 5)]) == [
        " level 1  uses   share                        its 4 leaves",
        "       0    17   94.4%  ████████████████████  █▄ █",
        "×      1     1    5.6%  █▏                     × ▄",
        "uses of a column, at most:  ▄ 1   ▆ 3   ▇ 5   █ 8",
        "× before a line: its block of level 1 is blocked; in a strip: a block there is",
    ]
    assert draw_text(uses, [], "ascii") == [
        " level 1  uses   share                        its 4 leaves",
        "       0    17   94.4%  ####################  @= @",
        "       1     1    5.6%  #                        =",
        "uses of a column, at most:  = 1   * 3   # 5   @ 8",
    ]


@given(trees, st.sampled_from(["utf-8", "ascii"]), st.data())
def test_text_is_made_of_all_counts(tree, encoding, data):
    (branching, levels), leaves = tree
    uses = made(branching, levels, leaves)
    level = data.draw(st.integers(1, levels))
    blocked = [(level, data.draw(st.integers(0, branching**level - 1)))]
    lines = draw_text(uses, blocked, encoding)
    assert all(len(line) <= 100 for line in lines)
    "".join(lines).encode(encoding)
    mark = "×" if encoding == "utf-8" else "x"
    below = branching ** (levels - 1)
    marked = [number for number, line in enumerate(lines[1 : branching + 1]) if mark in line]
    assert marked == [blocked[0][1] // branching ** (level - 1)]
    for number, line in enumerate(lines[1 : branching + 1]):
        cluster, count = line.lstrip(mark).split()[:2]
        assert int(cluster) == number and int(count) == sum(
            leaf // below == number for leaf in leaves
        )
        # As many columns, or, where they are leaves, exactly those that are used.
        strip = line[lines[0].find("its ") :] if levels > 1 else ""
        if 1 < below <= 64 and not marked == [number]:
            used = {leaf % below for leaf in leaves if leaf // below == number}
            assert [place for place, sign in enumerate(strip) if sign != " "] == sorted(used)
    if level > 1 and below <= 64:
        first = blocked[0][1] * branching ** (levels - level) % below
        strip = lines[1 + marked[0]][lines[0].find("its ") :]
        places = [place for place, sign in enumerate(strip) if sign == mark]
        assert places == list(range(first, first + branching ** (levels - level)))


def test_text_of_the_papers_tree():
    rng = np.random.default_rng(0)
    uses = made(16, 4, rng.integers(0, 65_536, 500_000) ** 2 // 65_536)
    lines = draw_text(uses, [(2, 18), (4, 65_535)])
    assert len(lines) == 19 and all(60 < len(line) <= 100 for line in lines[:17])
    assert lines[0].endswith("its 4,096 leaves, 64 a column")
    strips = [line[lines[0].find("its ") :] for line in lines[1:17]]
    assert {len(strip) for strip in strips} == {64}
    assert strips[1].count("×") == 4 and strips[1][8:12] == "××××"  # a 16th of the strip
    assert strips[15].endswith("×") and strips[15].count("×") == 1
    assert not any("×" in strip for strip in (strips[0], *strips[2:15]))


def test_text_makes_room_for_large_numbers():
    rng = np.random.default_rng(0)
    leaves, counts = np.arange(65_536), rng.integers(1, 10**6, 65_536)
    lines = draw_text(Uses(16, 4, leaves, counts, "documents", "x"), [])
    start = lines[0].find("its ")
    assert len(lines[1].split()[1]) == len("2,000,000,000")
    assert {len(line) - start for line in lines[1:17]} == {32}  # 64 do not fit, 128 leaves in each
    assert all(len(line) <= 100 for line in lines)


def test_text_of_a_wide_tree_shows_the_busiest():
    leaves = [cluster * 1000 for cluster in range(1000) for _ in range(cluster // 100)]
    lines = draw_text(made(1000, 2, leaves), [])
    assert len(lines) == 1 + 64 + 2 and all(len(line) <= 100 for line in lines)
    assert [int(line.split()[0]) for line in lines[1:65]] == list(range(900, 964))
    rest = sum(cluster // 100 for cluster in range(1000)) - 64 * 9
    assert lines[65] == f"and 936 more clusters of level 1: {rest:,} uses in all"


def test_columns_of_a_width_that_does_not_divide():
    lines = draw_text(made(67, 2, [66, 65 * 67]), [])  # leaf 66 of line 0, leaf 0 of line 65
    assert "67 leaves, 2 a column, the last of fewer" in lines[0]
    start = lines[0].find("its ")
    assert lines[1][start:] == " " * 33 + "█"


def test_cells_of_the_picture(tmp_path):
    uses = made(16, 4, [0] * 50 + [1] * 9 + [65_535] * 3)
    axes = figure(uses, as_report(uses)).axes[0]
    rows = [np.ma.filled(image.get_array(), 0)[0] for image in axes.images]
    assert [len(row) for row in rows] == [16, 256, 1100, 1100]
    # Leaves 0 and 1 share a cell: the busier one is shown.
    assert [(row[0], row[-1]) for row in rows] == [(59, 3), (59, 3), (59, 3), (50, 3)]
    assert all(row[1:-1].max() == 0 for row in rows)
    assert {(image.norm.vmin, image.norm.vmax) for image in axes.images} == {(1, 59)}
    # Left to right over the whole width, level 1 on top.
    extents = [image.get_extent() for image in axes.images]
    assert all(extent[:2] == [0, 1] for extent in extents)
    assert axes.get_ylim() == (4, 0)
    assert [(round(top + 0.04), round(bottom)) for *_, bottom, top in extents] == [
        (0, 1), (1, 2), (2, 3), (3, 4)
    ]  # fmt: skip


@given(st.integers(1, 2**62), st.lists(st.floats(0, 1, exclude_max=True), min_size=1))
def test_cells_keep_the_order(total, places):
    from mlx_hiermem.commands.bank.picture import _place

    clusters = np.sort(np.array([int(place * total) for place in places], np.int64))
    cells = _place(clusters, total)
    assert (np.diff(cells) >= 0).all() and 0 <= cells.min() <= cells.max() < min(total, 1100)


def test_blocked_blocks_are_hatched_where_they_are():
    uses = made(16, 4, [0, 0, 1])
    blocked = [(1, 2), (2, 32), (2, 33), (2, 40), (4, 65_535)]
    plain, marked = (figure(uses, as_report(uses, pairs)) for pairs in ([], blocked))
    hatched = [c for c in marked.axes[0].collections if c.get_hatch()]
    assert not any(c.get_hatch() for c in plain.axes[0].collections)
    boxes = [
        sorted(
            (*path.get_extents().intervalx, path.get_extents().y0 // 1) for path in c.get_paths()
        )
        for c in hatched
    ]
    expected = [
        [(2 / 16, 3 / 16, 0)],
        [(32 / 256, 34 / 256, 1), (40 / 256, 41 / 256, 1)],
        [(0.996, 1, 3)],  # as wide as can be seen
    ]
    for found, wanted in zip(boxes, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert "5 blocks blocked" in marked.get_suptitle()
    assert "blocked" not in plain.get_suptitle()
