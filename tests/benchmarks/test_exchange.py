"""The arithmetic of what a step exchanges, and that the doc has what the command prints."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.exchange import distinct, measure

DOC = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_distinct_clusters_are_what_drawing_gives():
    rng = np.random.default_rng(0)
    drawn = [len(np.unique(rng.integers(0, 64, 40))) for _ in range(2000)]
    assert distinct(64, 40) == pytest.approx(np.mean(drawn), rel=0.01)


def test_the_doc_has_the_figures_that_are_printed():
    text = DOC.read_text()
    for row in measure(smoke=True):
        assert f"{row.value:.3f}" in text, row.id
        if "rows" in row.id:
            assert row.detail.split("rows ")[1] in text


def test_the_paper_sizes_by_hand():
    """160M: 3 * 35 * 512 numbers for a unit of rank."""
    rows = {row.id: row.value for row in measure(smoke=True)}
    unit = 3 * 35 * 512
    fetched = unit * (256 * 16 + 64 * distinct(256, 1024) + 16 * distinct(4096, 1024))
    assert rows["exchange.160M.fetched_rows_gb"] == pytest.approx(4 * fetched / 1e9, rel=1e-6)
    assert rows["exchange.160M.plain_gb"] == pytest.approx(4 * (163_510_016 + 4_624_220_160) / 1e9)
