"""Packing in memory, and sequences taken from memory and from files alike."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.corpus.packed import PackedCorpus, ShardedTokens, TokenShard, pack
from mlx_hiermem.errors import FormatError, TrainingError

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


def test_the_order_that_the_atlas_was_trained_on():
    documents = [([1, 2], 1), ([3], 0), ([4, 5, 6, 7, 8], 1), ([9], 1), ([10, 11, 12], 1), ([], 0)]
    corpus = pack(documents, 4, end_of_text=0)
    assert corpus.leaves.tolist() == [0, 1, 1, 1, 1]
    assert corpus.tokens.tolist() == [
        [3, 0, 0, 0],
        [1, 2, 0, 0],
        [4, 5, 6, 7],
        [8, 0, 9, 0],
        [10, 11, 12, 0],
    ]
    assert corpus.tokens.dtype == np.int32 and corpus.leaves.dtype == np.int64


def test_nothing_to_pack_is_an_error():
    with pytest.raises(TrainingError, match="no documents"):
        pack([], 8, 0)
    with pytest.raises(TrainingError, match="sequence length 1"):
        pack([([1], 0)], 1, 0)


def sharded(folder, tokens, counts):
    """The rows of ``tokens`` in files of ``counts`` rows, each after some bytes of another kind."""
    shards, first = [], 0
    for number, count in enumerate(counts):
        path = folder / f"{number}.bin"
        path.write_bytes(b"h" * (8 + number) + tokens[first : first + count].tobytes())
        shards.append(TokenShard(path, 8 + number, count))
        first += count
    return ShardedTokens(shards, tokens.shape[1], tokens.dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_rows_in_files_are_taken_as_from_an_array(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, np.iinfo(dtype).max, (20, 3), dtype, endpoint=True)
    files = sharded(tmp_path, tokens, (7, 1, 12))
    assert files.shape == tokens.shape and len(files) == 20
    for indices in (
        np.array([19, 0, 7, 7, 6, 8]),
        np.array([], np.int64),
        np.array([-1, -20]),
        np.arange(20, dtype=np.uint8),
        slice(5, 9),
        slice(None),
        13,
    ):
        found = files[indices]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, tokens[indices])
    for bad in (20, -21, np.array([0, 20])):
        with pytest.raises(IndexError, match="the corpus has 20"):
            files[bad]
    with pytest.raises(IndexError, match="by integers"):
        files[np.array([True, False])]


def test_a_file_that_shrinks_or_goes_is_named(tmp_path):
    tokens = np.ones((4, 2), np.uint16)
    files = sharded(tmp_path, tokens, (2, 2))
    (tmp_path / "1.bin").write_bytes(b"h" * 9 + b"\0" * 7)
    assert files[np.array([0, 1, 2])].shape == (3, 2)
    with pytest.raises(FormatError, match="1.bin: truncated"):
        files[np.array([3])]
    (tmp_path / "1.bin").unlink()
    with pytest.raises(FormatError, match="1.bin: cannot be read"):
        files[np.array([2])]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_selection_takes_its_own_sequences(tmp_path, on_disk):
    tokens = np.arange(40, dtype=np.uint16).reshape(20, 2)
    leaves = np.arange(20) % 4
    stored = sharded(tmp_path, tokens, (9, 11)) if on_disk else tokens
    corpus = PackedCorpus(stored, leaves, 0)
    assert corpus.sequence_length == 2 and len(corpus) == 20
    taken, of = corpus.take(np.array([3, 18]))
    assert taken.tolist() == [[6, 7], [36, 37]] and of.tolist() == [3, 2]
    assert taken.dtype == np.int32 and of.dtype == np.int64

    threes = corpus.select(leaves == 3)
    assert len(threes) == 5 and threes.tokens.shape == (5, 2)
    taken, of = threes.take(np.array([4, 0]))
    assert taken.tolist() == [[38, 39], [6, 7]] and of.tolist() == [3, 3]
    again = threes.select(np.array([2, 1]))
    taken, _ = again.take(np.arange(2))
    assert taken.tolist() == [[22, 23], [14, 15]]
    assert again.sequence_length == 2
