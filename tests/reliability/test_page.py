"""docs/reliability.md takes the figures of long runs."""

from __future__ import annotations

import json
import re

import pytest

from tests.reliability import page

RUN = {
    "share": 1.0, "commit": "abc", "machine": {
        "cores": 2, "python": "3.11.7", "mlx": "0.32.4", "backend": "cpu",
    },
    "rows": [
        {"name": "kills.merge.wrong", "value": 0, "detail": "of 50 kills"},
        {"name": "answers", "value": 10000, "detail": "alike"},
        {"name": "answers.memory", "value": "+0.1 %", "detail": "resident"},
    ],
}  # fmt: skip


def test_each_table_stands_between_its_marks():
    empty = (
        "a\n<!-- figures: kills -->\nold\n<!-- end -->\nb\n<!-- figures: fuzz -->\n<!-- end -->\n"
    )
    text = page.filled(empty, [RUN])
    assert "| merge.wrong | 0 | of 50 kills |\n\n<!-- end -->\nb" in text and "old" not in text
    assert "2 cores, Python 3.11.7, MLX 0.32.4 (cpu), commit abc, in full length:" in text
    assert text.endswith("<!-- figures: fuzz -->\n<!-- end -->\n")
    assert page.filled(text, [RUN]) == text
    assert "at 0.02 of the full length" in page.filled(text, [{**RUN, "share": 0.02}])


def test_rows_of_several_files_stand_together_where_they_are_of_one_commit():
    empty = "<!-- figures: kills -->\n<!-- end -->\n"
    other = {**RUN, "rows": [{"name": "kills.add.wrong", "value": 0, "detail": "of 40 kills"}]}
    text = page.filled(empty, [RUN, other])
    assert "| of 50 kills |\n| add.wrong | 0 | of 40 kills |\n" in text
    assert text.count("commit abc") == 1
    text = page.filled(empty, [RUN, {**other, "commit": "def"}])
    assert text.count("full length:\n\n| | | |") == 2 and "commit def" in text


def test_files_fill_the_page(tmp_path, monkeypatch):
    copy = tmp_path / "reliability.md"
    copy.write_text(page.PAGE.read_text())
    monkeypatch.setattr(page, "PAGE", copy)
    (tmp_path / "soak.json").write_text(json.dumps(RUN))
    assert page.main([str(tmp_path / "soak.json")]) == 0
    assert "| answers | 10000 | alike |\n| memory | +0.1 % | resident |" in copy.read_text()


@pytest.mark.parametrize("tests", sorted(page.PAGE.parents[1].glob("tests/reliability/test_*.py")))
def test_the_page_has_room_for_every_figure(tests):
    marks = set(re.findall(r"<!-- figures: (\w+) -->", page.PAGE.read_text()))
    if tests.name != "test_page.py":
        groups = set(
            re.findall(r'(?:figure|tell)\(\s*(?:figure, )?f?"(\w+)[."]', tests.read_text())
        )
        assert groups <= marks, groups - marks
