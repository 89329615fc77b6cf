"""Plans: every piece once, whole, among its own; and sequences as full as can be hoped for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_hiermem.corpus.packing import best_fit, cut, next_fit

PLANNERS = (best_fit, next_fit)


@st.composite
def pieces(draw):
    length = draw(st.integers(2, 40))
    sizes = st.tuples(st.integers(1, length), st.integers(0, 4))
    drawn = draw(st.lists(sizes, max_size=60))
    lengths, leaves = np.array(drawn, np.int64).reshape(-1, 2).T
    return lengths, leaves, length


@given(windows=st.lists(st.integers(1, 50), max_size=20), length=st.integers(2, 16))
def test_a_window_is_cut_into_full_pieces_and_a_rest(windows, length):
    found = cut(np.array(windows, np.int64), length)
    expected = [
        (window, start, min(length, size - start))
        for window, size in enumerate(windows)
        for start in range(0, size, length)
    ]
    columns = (found.windows.tolist(), found.starts.tolist(), found.lengths.tolist())
    assert list(zip(*columns, strict=True)) == expected


@given(given_pieces=pieces())
def test_every_piece_is_placed_once_in_a_sequence_of_its_leaf(given_pieces):
    lengths, leaves, length = given_pieces
    for planner in PLANNERS:
        plan = planner(lengths, leaves, length)
        assert sorted(plan.pieces.tolist()) == list(range(len(lengths)))
        assert plan.starts[0] == 0 and plan.starts[-1] == len(lengths)
        assert (np.diff(plan.starts) > 0).all()  # no sequence is empty
        assert (np.diff(plan.leaves) >= 0).all()
        for i, leaf in enumerate(plan.leaves):
            inside = plan.pieces[plan.starts[i] : plan.starts[i + 1]]
            assert (leaves[inside] == leaf).all()
            assert lengths[inside].sum() <= length


@given(given_pieces=pieces())
def test_places_lie_one_behind_the_other_in_each_sequence(given_pieces):
    lengths, leaves, length = given_pieces
    for planner in PLANNERS:
        plan = planner(lengths, leaves, length)
        places = plan.places(lengths, length).tolist()
        expected = []
        for i in range(plan.sequences):
            at = i * length
            for piece in plan.pieces[plan.starts[i] : plan.starts[i + 1]]:
                expected.append(at)
                at += lengths[piece]
        assert places == expected


@given(given_pieces=pieces())
def test_best_fit_takes_the_longest_piece_first_into_the_smallest_room(given_pieces):
    lengths, leaves, length = given_pieces
    rooms: dict[int, list[int]] = {}
    for piece in np.lexsort((-lengths, leaves)):  # the definition, in quadratic time
        mine = rooms.setdefault(int(leaves[piece]), [])
        fitting = [i for i, room in enumerate(mine) if room >= lengths[piece]]
        if fitting:
            mine[min(fitting, key=mine.__getitem__)] -= lengths[piece]
        else:
            mine.append(length - lengths[piece])
    plan = best_fit(lengths, leaves, length)
    found: dict[int, list[int]] = {}
    for i, leaf in enumerate(plan.leaves.tolist()):
        inside = plan.pieces[plan.starts[i] : plan.starts[i + 1]]
        found.setdefault(leaf, []).append(length - lengths[inside].sum())
    assert {leaf: sorted(room) for leaf, room in found.items()} == {
        leaf: sorted(room) for leaf, room in rooms.items()
    }


@given(given_pieces=pieces())
def test_two_sequences_of_a_leaf_never_fit_into_one(given_pieces):
    lengths, leaves, length = given_pieces
    plan = best_fit(lengths, leaves, length)
    held = np.add.reduceat(lengths[plan.pieces], plan.starts[:-1]) if len(lengths) else []
    for leaf in np.unique(plan.leaves):
        emptiest = np.sort(np.asarray(held)[plan.leaves == leaf])[:2]
        assert len(emptiest) < 2 or emptiest.sum() > length


def test_sequences_are_fuller_than_with_next_fit():
    rng = np.random.default_rng(0)
    for median in (3, 5, 6):
        windows = np.minimum(rng.lognormal(median, 1.2, 20_000).astype(np.int64) + 1, 10_000)
        found = cut(windows, 512)
        leaves = rng.integers(0, 16, len(windows))[found.windows]
        dense, loose = (planner(found.lengths, leaves, 512) for planner in PLANNERS)
        assert windows.sum() / (512 * dense.sequences) > 0.98
        assert dense.sequences < 0.9 * loose.sequences


def test_the_same_pieces_give_the_same_plan_and_progress_reaches_the_end():
    rng = np.random.default_rng(1)
    lengths, leaves = rng.integers(1, 65, 5000), rng.integers(0, 8, 5000)
    calls = []
    first = best_fit(lengths, leaves, 64, lambda done, total: calls.append((done, total)))
    again = best_fit(lengths.copy(), leaves.copy(), 64)
    np.testing.assert_array_equal(first.pieces, again.pieces)
    np.testing.assert_array_equal(first.starts, again.starts)
    assert calls[-1] == (5000, 5000)
