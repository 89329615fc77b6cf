"""Splits on disk: every token once under its leaf, the same bytes each time, nothing half-done."""

import hashlib
import resource
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hiermem.corpus.part import write_part
from mlx_hiermem.corpus.writer import Placed
from mlx_hiermem.errors import FormatError, TrainingError
from tests.corpus.splits import END, LENGTH, make_part, many, place, read, write


def pieces_of(row):
    """The pieces of a sequence: up to and with each end-of-text, or the whole row without one."""
    row = row.tolist()
    if END not in row:
        return [tuple(row)]
    pieces, piece = [], []
    for token in row:
        piece.append(token)
        if token == END:
            pieces.append(tuple(piece))
            piece = []
    assert not piece, "text after the last end-of-text of a sequence"
    return [p for p in pieces if len(p) > 1]  # an end-of-text alone is filling


DOCUMENTS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=40), max_size=12)


@settings(max_examples=40)
@given(drawn=st.lists(DOCUMENTS, min_size=1, max_size=4), views=st.booleans())
def test_every_piece_is_in_the_split_once_under_each_of_its_leaves(drawn, views, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    parts = [make_part(documents) for documents in drawn]
    placed = place(folder, parts)
    if views:  # each window once more, under another leaf
        placed = [
            Placed(p.path, np.tile(p.windows, 2), np.concatenate([p.leaves, p.leaves + 5]))
            for p in placed
        ]
    expected = Counter()
    for part, entry in zip(parts, placed, strict=True):
        for window, leaf in zip(entry.windows, entry.leaves, strict=True):
            text = part.tokens[part.starts[window] : part.starts[window + 1]].tolist()
            for start in range(0, len(text), LENGTH):
                piece = tuple(text[start : start + LENGTH])
                if piece != (END,):  # looks like filling; its count is in the tokens
                    expected[piece, int(leaf)] += 1
    if not any(drawn):
        with pytest.raises(TrainingError, match="no documents"):
            write(folder / "train", placed)
        return
    info = write(folder / "train", placed)
    tokens, leaves = read(folder / "train", info)
    found = Counter(
        (piece, leaf)
        for row, leaf in zip(tokens, leaves.tolist(), strict=True)
        for piece in pieces_of(row)
    )
    assert found == expected
    assert info.documents == sum(len(documents) for documents in drawn)
    assert info.tokens == sum(len(part.tokens) for part in parts)
    assert info.sequences == len(tokens) == len(leaves)
    assert info.fill == pytest.approx(info.tokens * (1 + views) / tokens.size)
    assert [shard.sequences for shard in info.shards[:-1]] == [4] * (len(info.shards) - 1)


def test_the_same_input_and_seed_give_the_same_bytes_and_another_seed_another_order(tmp_path):
    documents = many()
    placed = place(tmp_path, [make_part(documents[:120]), make_part(documents[120:])])
    infos = [write(tmp_path / name, placed, seed=seed) for name, seed in [("a", 0), ("b", 0)]]
    assert infos[0] == infos[1]
    for shard in infos[0].shards:
        for name, sha256 in (
            (shard.tokens, shard.tokens_sha256),
            (shard.leaves, shard.leaves_sha256),
        ):
            data = (tmp_path / "a" / name).read_bytes()
            assert data == (tmp_path / "b" / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == sha256
    other = write(tmp_path / "c", placed, seed=1)
    first, second = (
        read(tmp_path / name, info)[0] for name, info in [("a", infos[0]), ("c", other)]
    )
    assert first.tolist() != second.tolist()
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_leaves_and_parts_are_mixed_over_all_shards(tmp_path):
    placed = place(tmp_path, [make_part(many(seed=i)) for i in range(3)])
    info = write(tmp_path / "train", placed, shard_bytes=64 * LENGTH * 2)
    for shard in info.shards[:-1]:
        assert set(np.load(tmp_path / "train" / shard.leaves)) == set(range(5))


def test_only_the_windows_that_are_placed_are_packed(tmp_path):
    part = make_part([[1] * 20, [2] * 3, [3] * 3])
    write_part(tmp_path / "p", part)
    info = write(tmp_path / "train", [Placed(tmp_path / "p", np.array([2, 3]), np.array([4, 4]))])
    tokens, leaves = read(tmp_path / "train", info)
    assert tokens.tolist() == [[2, 2, 2, 0, 3, 3, 3, 0]] and leaves.tolist() == [4]
    assert (info.documents, info.tokens, info.sequences, info.fill) == (2, 8, 1, 1.0)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_tokens_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    documents = [[65535, 1], [vocab_size - 1]]
    placed = place(tmp_path, [make_part(documents, dtype)])
    info = write(tmp_path / "train", placed, vocab_size=vocab_size)
    tokens, _ = read(tmp_path / "train", info)
    assert tokens.dtype == dtype and {65535, vocab_size - 1} <= set(tokens.ravel().tolist())


def test_shards_of_an_earlier_run_are_replaced(tmp_path):
    placed = place(tmp_path, [make_part(many())])
    long = write(tmp_path / "train", placed)
    (tmp_path / "train" / "notes.txt").write_text("mine")
    short = write(tmp_path / "train", [Placed(placed[0].path, np.arange(9), np.zeros(9, int))])
    assert len(short.shards) < len(long.shards)
    expected = {name for shard in short.shards for name in (shard.tokens, shard.leaves)}
    assert {path.name for path in (tmp_path / "train").iterdir()} == expected | {"notes.txt"}


def test_progress_tells_what_is_done_of_how_much(tmp_path):
    placed = place(tmp_path, [make_part(many())])
    calls = []
    info = write(tmp_path / "train", placed, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("write", info.sequences, info.sequences)
    assert [call for call in calls if call[0] == "pack"][-1][1:] == (
        sum(-(-n // LENGTH) for n in make_part(many()).lengths.tolist()),
    ) * 2


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and "run cluster again" in text
    return text


def test_what_does_not_fit_is_one_line_that_names_the_part(tmp_path):
    good, part = make_part([[1, 2]]), make_part([[1, 2], [3] * 20])
    for change, options, message in (
        ({"tokens": part.tokens.astype(np.uint32)}, {}, "tokens are uint32, expected uint16"),
        ({"tokens": part.tokens + np.uint16(1)}, {}, "does not end with the end-of-text token 0"),
        ({}, {"length": 10}, "a window inside one is not a multiple of 10"),
        ({}, {"vocab_size": 3}, "holds token 3, but the tokenizer has 3 ids"),
    ):
        placed = place(tmp_path, [good, replace(part, **change)])
        with pytest.raises(FormatError, match=message) as error:
            write(tmp_path / "train", placed, **options)
        assert "1.part" in one_line(error)
    placed = place(tmp_path, [part])
    for windows in ([3], [-1], [0, 1]):
        with pytest.raises(FormatError, match="windows to pack are not those of the part") as error:
            write(tmp_path / "train", [replace(placed[0], windows=np.array(windows), leaves=[0])])
        one_line(error)
    with pytest.raises(TrainingError, match="sequence length 1"):
        write(tmp_path / "train", placed, length=1)


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_shard(tmp_path):
    placed = place(tmp_path, [make_part(many())])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(FormatError, match="00000.tokens.npy: cannot be written") as error:
            write(tmp_path / "train", placed, shard_bytes=1 << 14)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "train").iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    placed = place(tmp_path, [make_part(many(3))])
    (tmp_path / "train").write_text("a file")
    with pytest.raises(FormatError, match="train: cannot be made"):
        write(tmp_path / "train", placed)
