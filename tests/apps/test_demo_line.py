"""The demo's line of visitors: everybody in turn, and the places that are shown are true."""

from __future__ import annotations

import random

from apps.demo.line import FairLine


def test_visitors_take_turns():
    line: FairLine[str] = FairLine()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        line.put(item[0], item)
    assert [line.take() for _ in range(len(line))] == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_who_comes_back_goes_to_the_end():
    line: FairLine[str] = FairLine()
    line.put("a", "a1"), line.put("b", "b1")
    assert line.take() == "a1"
    line.put("a", "a2")
    assert [line.take(), line.take()] == ["b1", "a2"]


def test_places_are_those_in_which_they_are_served():
    rng = random.Random(0)
    for _ in range(200):
        line: FairLine[tuple[int, int]] = FairLine()
        items = [(rng.randrange(4), number) for number in range(rng.randint(1, 9))]
        for item in items:
            line.put(item[0], item)
        for _ in range(rng.randint(0, 3)):
            if len(line):
                items.remove(line.take())
        if items and rng.random() < 0.5:
            gone = items.pop(rng.randrange(len(items)))
            assert line.remove(gone) and not line.remove(gone)
            assert line.ahead(gone) is None
        places = {item: line.ahead(item) for item in items}
        assert sorted(line) == sorted(items)
        served = [line.take() for _ in range(len(line))]
        assert places == {item: place for place, item in enumerate(served)}
