"""Packing: nothing lost, nothing doubled, nothing under the wrong leaf."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.corpus.packed import PackedCorpus, pack
from mlx_hiermem.errors import TrainingError

DOCUMENTS = st.lists(
    st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(0, 5)),
    min_size=1,
    max_size=40,
)


@given(documents=DOCUMENTS, length=st.integers(2, 16))
def test_every_token_is_packed_once_under_its_leaf(documents, length):
    corpus = pack(documents, length, end_of_text=0)
    assert corpus.tokens.shape == (len(corpus.leaves), length)
    packed = {leaf: [] for leaf in corpus.leaves.tolist()}
    for row, leaf in zip(corpus.tokens.tolist(), corpus.leaves.tolist(), strict=True):
        packed[leaf] += [token for token in row if token != 0]
    given_tokens = {}
    for tokens, leaf in documents:
        given_tokens.setdefault(leaf, []).extend(tokens)
    assert packed == given_tokens


@given(documents=DOCUMENTS, length=st.integers(2, 16))
def test_a_document_that_fits_is_never_cut(documents, length):
    corpus = pack(documents, length, end_of_text=0)
    whole = Counter()
    for row, leaf in zip(corpus.tokens.tolist(), corpus.leaves.tolist(), strict=True):
        text = []
        for token in row:
            if token:
                text.append(token)
            elif text:
                whole[tuple(text), leaf] += 1
                text = []
    fitting = Counter((tuple(tokens), leaf) for tokens, leaf in documents if len(tokens) < length)
    assert all(whole[key] >= count for key, count in fitting.items())


def test_each_pass_shows_each_sequence_once_and_passes_differ():
    tokens = np.arange(20, dtype=np.int32).reshape(10, 2)
    corpus = PackedCorpus(tokens, np.arange(10), end_of_text=0)
    batches = corpus.batches(4, seed=3)
    seen = np.concatenate([next(batches)[1] for _ in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    again = corpus.batches(4, seed=3)
    assert list(next(again)[1]) == list(seen[:4])


def test_nothing_to_pack_is_an_error():
    with pytest.raises(TrainingError, match="no documents"):
        pack([], 8, 0)
    with pytest.raises(TrainingError, match="sequence length 1"):
        pack([([1], 0)], 1, 0)
