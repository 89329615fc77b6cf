"""Names of clusters: telling, bounded, the same each time; and hostile files are refused."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.errors import FormatError
from mlx_hiermem.routing import names as module
from mlx_hiermem.routing.names import (
    LONGEST,
    NAMES,
    ClusterNames,
    name_tree,
    named_levels,
    split_words,
)

COMMON = "the of and a in to is that it for"
TOPICS = (
    ("metals", ("iron ore", "copper wire")),
    ("music", ("violin strings", "piano keys")),
    ("oceans", ("coral reef", "deep trench")),
)


def topic_texts(leaf: int) -> list[str]:
    """Documents of 2 leaves in each of 3 topics; every one is full of common words."""
    topic, leaves = TOPICS[leaf // 3]
    extra = (*leaves, "else")[leaf % 3]
    return [f"{COMMON} {topic} {extra} {COMMON} nr{leaf}{number}." for number in range(12)]


# ---- what they say ---------------------------------------------------------------------


def test_clusters_are_named_by_what_sets_them_apart_from_their_siblings():
    names = name_tree(topic_texts, 3, 2)
    assert [names.of(1, cluster).split(", ")[0] for cluster in range(3)] == [
        "metals", "music", "oceans",
    ]  # fmt: skip
    assert names.of(2, 0) == "iron, ore" and names.of(2, 4) == "keys, piano"
    # What all siblings share does not tell them apart, however frequent it is.
    words = {word for level in names.levels for name in level for word in name.split(", ")}
    assert not words & set(COMMON.split()) and "metals" not in names.of(2, 0)


@pytest.mark.parametrize("k", [2, 16])
def test_words_that_are_everywhere_fall_behind_whatever_the_branching(k):
    names = name_tree(lambda c: [f"the of {'topic' + chr(97 + c)} x{i}" for i in range(20)], k, 1)
    assert [names.of(1, c) for c in range(k)] == [f"topic{chr(97 + c)}" for c in range(k)]


def test_a_common_word_that_is_somewhat_more_common_falls_behind_too():
    texts = [[f"the {'boat' * (i % 2)}" for i in range(20)], ["the"] * 17 + ["else"] * 3]
    names = name_tree(lambda c: texts[c], 2, 1)
    assert names.levels[0] == ("boat, the", "else")


def test_a_word_counts_once_per_document():
    shouted = ["boat " * 500 + "sail"] + ["sail wind"] * 9
    names = name_tree(lambda c: shouted if c == 0 else ["rail train"] * 10, 2, 1)
    assert names.of(1, 0) == "sail, wind"


def test_no_cluster_is_without_a_name():
    texts = {0: [], 1: ["", " \n"], 2: ["12 34", "12"], 3: ["?!", "…"], 4: ["same"], 5: ["same"]}
    names = name_tree(lambda c: texts.get(c, []), 6, 1)
    assert names.levels[0] == ("cluster 0", "cluster 1", "12, 34", "cluster 3", "same", "same")


def test_names_are_short():
    long = "pneumonoultramicroscopicsilicovolcanoconiosis"
    names = name_tree(lambda c: [f"{long}{c} {'w' * 24}{c} {'v' * 24}{c}"] * 3, 2, 1)
    for name in names.levels[0]:
        assert 0 < len(name) <= LONGEST
    names = name_tree(lambda c: [f"{long}{c}" * 3] * 3, 2, 1)
    assert names.of(1, 0) == long[:LONGEST]


def test_one_of_two_words_with_the_same_beginning_is_enough():
    names = name_tree(lambda c: ["metal metals alloy" if c else "tree trees wood"] * 5, 2, 1)
    assert names.of(1, 1) == "alloy, metal" and names.of(1, 0) == "tree, wood"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Jersey's state-of-the-art, don’t 1984!", "the jersey state-of-the-art don’t 1984"),
        ("x <script>alert(1)</script>\x00\x1b[31m", "script alert script 31m"),
        ("東京都に", "東京 京都 都に"),
        ("हिन्दी é Ünïcode", "हिन्दी ünïcode"),
        ("snake_case a_b", "snake case"),
    ],
)
def test_words(text, words):
    assert list(split_words(text)) == words.split(" ")


# ---- bounds ----------------------------------------------------------------------------


def test_of_a_cluster_only_so_many_words_are_kept(monkeypatch):
    monkeypatch.setattr(module, "WORDS", 70)
    held = []
    trim = module._Words.trim

    def watched(self, most):
        trim(self, most)
        held.append(len(self.counts))

    monkeypatch.setattr(module._Words, "trim", watched)
    name_tree(lambda c: [f"w{c}x{i} v{c}x{i} common" for i in range(300)], 3, 2)
    assert max(held) == 70 and len(held) == 13
    # With many siblings fewer of each.
    monkeypatch.setattr(module, "_SHARED", 0)
    held.clear()
    name_tree(lambda c: [f"w{c}x{i}" for i in range(300)], 2, 1)
    assert max(held) == 64


def test_leaves_are_asked_for_one_after_the_other_and_reported():
    asked, told = [], []
    name_tree(lambda c: asked.append(c) or ["text here"], 3, 3, told.append)
    assert asked == list(range(27)) and told == list(range(1, 28))


def test_65536_leaves_get_names_and_deeper_ones_none():
    assert named_levels(16, 4) == 4 and named_levels(16, 6) == 4 and named_levels(2, 30) == 17
    assert named_levels(1 << 18, 1) == 0 and name_tree(topic_texts, 1 << 18, 0) is None


@given(st.lists(st.lists(st.text(max_size=40), max_size=5), min_size=4, max_size=4))
def test_whatever_the_documents_are_the_names_can_be_stored(texts):
    names = name_tree(lambda c: texts[c], 2, 2)
    assert ClusterNames(names.levels).levels == names.levels
    again = name_tree(lambda c: list(reversed(texts[c])), 2, 2)
    assert again.to_bytes() == names.to_bytes()  # the order of documents makes no difference


# ---- the file --------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    assert ClusterNames.load(tmp_path) is None
    names = ClusterNames([["é, über", "<b>"], ["a", "b", "c", "東京"]])
    names.save(tmp_path)
    found = ClusterNames.load(tmp_path)
    assert found.levels == names.levels and found.of(2, 3) == "東京"
    assert json.loads((tmp_path / NAMES).read_text()) == {
        "level1": ["é, über", "<b>"],
        "level2": ["a", "b", "c", "東京"],
    }
    # Where there is no name, and where there is no such cluster.
    assert found.of(3, 5) == "cluster 5" and found.of(1, 2) == "cluster 2"
    assert found.of(0, 0) == "cluster 0" and found.of(1, -1) == "cluster -1"
    found.check(2, 3)
    for shape in ((2, 1), (4, 2)):
        with pytest.raises(FormatError, match="the tree has"):
            found.check(*shape)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"level1": "ab"}', "expected an object of lists"),
        ('{"level2": ["a", "b"]}', "expected the keys"),
        ('{"level1": ["a", "b"], "more": []}', "expected the keys"),
        ("{}", "0 names at level 1"),
        ('{"level1": ["a"]}', "1 names at level 1"),
        ('{"level1": ["a", "b"], "level2": ["a", "b", "c"]}', "3 names at level 2; expected 4"),
        ('{"level1": ["a", ""]}', "cluster 1 of level 1"),
        ('{"level1": ["a", 7]}', "cluster 1 of level 1"),
        ('{"level1": ["a", null]}', "cluster 1 of level 1"),
        ('{"level1": ["a", "   "]}', "cluster 1 of level 1"),
        (json.dumps({"level1": ["a", "b" * 41]}), "1 to 40 characters"),
        ('{"level1": ["a", "b\\u0000"]}', "can be printed"),
        ('{"level1": ["a", "\\ud800"]}', "can be printed"),
        ('{"level1": ["a", "\\u202etxt.exe"]}', "can be printed"),
        ('{"level1": ["a", "b\\nc"]}', "can be printed"),
        ("[" * 100_000, "not valid JSON"),
        ('{"level1": ' + "9" * 5000 + "}", "not valid JSON|object of lists"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_damaged_and_hostile_files_are_refused_in_one_line(tmp_path, text, words):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / NAMES).write_bytes(data)
    with pytest.raises(FormatError, match=words) as caught:
        ClusterNames.load(tmp_path)
    line = str(caught.value)
    assert line.startswith(str(tmp_path / NAMES)) and len(line.splitlines()) == 1
    assert line.isprintable() and len(line) < len(str(tmp_path)) + 250


def test_what_is_too_large_or_no_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BYTES", 100)
    (tmp_path / NAMES).write_text(json.dumps({"level1": ["a" * 40] * 4}))
    with pytest.raises(FormatError, match="more than 100 bytes"):
        ClusterNames.load(tmp_path)
    (tmp_path / NAMES).unlink()
    os.mkfifo(tmp_path / NAMES)  # opening it would wait for ever
    with pytest.raises(FormatError, match="not a regular file"):
        ClusterNames.load(tmp_path)
