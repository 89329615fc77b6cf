"""What the training benchmark compares is what it says."""

import json

import numpy as np
import pytest

from benchmarks import train_step
from benchmarks.harness import main
from benchmarks.made_up import RANKS, RANKS_100X, flops_per_token, make_anchor, make_corpus, sizes
from mlx_hiermem.anchors import openlm
from mlx_hiermem.config import MemoryConfig

ANCHOR = openlm.ModelArgs(512, 8, 2048, 12, 32, vocab_size=8192, tie_word_embeddings=True)


def test_the_large_bank_is_100_times_as_large_with_the_same_fetch_size():
    small, large = (MemoryConfig(ranks=ranks) for ranks in (RANKS, RANKS_100X))
    assert small.fetch_size(ANCHOR) == large.fetch_size(ANCHOR)
    assert large.bank_size(ANCHOR) > 100 * small.bank_size(ANCHOR)
    smoke = sizes(smoke=True)
    assert sum(smoke.ranks) == sum(smoke.ranks_100x)


def test_operations_of_a_token_are_counted_as_the_layers_do_them():
    size = sizes(smoke=True)
    d, f, vocabulary, layers, width = 32, 64, 64, 2, 32  # 2 heads of 16
    matrices = layers * (4 * d * width + 3 * d * f) + d * vocabulary
    attention = layers * 2 * width * (size.length / 2)  # products with keys and with values
    assert flops_per_token(make_anchor(size), size.length) == 3 * 2 * (matrices + attention)


def test_the_step_without_a_bank_is_the_step_with_one_on_the_same_rows(tmp_path):
    size = sizes(smoke=True)
    fixed = train_step.make_trainer(size, "cotrain", size.ranks)
    bank = train_step.make_trainer(size, "cotrain", size.ranks, tmp_path, 1 << 30)
    bank.rows.ids = fixed.rows.ids  # the rows 0 and 1 of each level
    first, second = fixed.step(), bank.step()
    assert first.loss == second.loss and first.gradient_norm == second.gradient_norm
    bank.rows.close()


def test_leaves_are_spread_over_the_whole_tree():
    size = sizes(smoke=True)
    corpus = make_corpus(size, levels=4)
    clusters = size.branching**4
    assert corpus.leaves.min() < 0.01 * clusters and corpus.leaves.max() > 0.99 * clusters
    assert np.unique(corpus.leaves // size.branching**3).size == size.branching
    assert 0 < (corpus.tokens == 0).mean() < 0.01


@pytest.mark.slow
def test_a_smoke_run_has_every_row(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert main(train_step.NAME, train_step.measure, ["--smoke", "--json", str(path)]) == 0
    rows = {row["id"]: row for row in json.loads(path.read_text())["rows"]}
    goals = {id: row["goal"] for id, row in rows.items() if row["goal"]}
    assert goals == {
        "train.frozen_vs_anchor": "<= 1.7",
        "train.cotrain_vs_anchor": "<= 1.7",
        "train.bank100x_vs_bank1x": "<= 1.1",
        "train.rss_vs_floor": "<= 1.2",
        "cluster.throughput_vs_encoder": ">= 0.9",
    }
    assert all(row["value"] > 0 and row["detail"] for row in rows.values())
