"""Added memories in the tree: the nearest leaf wins, and everything else goes where it went."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_hiermem.errors import FormatError
from mlx_hiermem.routing.names import ClusterNames, name_tree
from mlx_hiermem.routing.tree import AddedTree, ClusterTree


def levels(roots: int, k: int, depth: int, width: int, rng) -> list[np.ndarray]:
    return [rng.normal(size=(roots * k**level, width)).astype(np.float32) for level in range(depth)]


def make(k, depth, width, added, seed, encoder=None) -> ClusterTree:
    rng = np.random.default_rng(seed)
    base = levels(k, k, depth, width, rng)
    parts = [AddedTree(levels(roots, k, depth, width, rng)) for roots in added]
    return ClusterTree(base, encoder, parts)


def greedy(tree: ClusterTree, first: int, roots: int, vector: np.ndarray):
    """The definition within the subtrees of some clusters of level 1, in float64."""
    ids, distances, children = [], [], range(first, first + roots)
    for centroids in tree.centroids:
        far = [np.linalg.norm(centroids[i].astype(np.float64) - vector) for i in children]
        node = children[int(np.argmin(far))]
        ids.append(node)
        distances.append(min(far))
        children = range(node * tree.branching, (node + 1) * tree.branching)
    return ids, distances


trees = st.builds(
    make,
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(1, 6),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(0, 2**32),
)


@settings(max_examples=50)
@given(trees, st.integers(0, 2**32), st.integers(1, 40))
def test_the_part_with_the_nearest_leaf_is_entered(tree, seed, count):
    vectors = np.random.default_rng(seed).normal(size=(count, tree.width)).astype(np.float32)
    ids, distances = tree.assign(vectors)
    k = tree.branching
    assert ids.max() < tree.roots * k ** (tree.levels - 1)
    for vector, found, far in zip(vectors, ids.tolist(), distances, strict=True):
        assert all(child // k == parent for parent, child in zip(found, found[1:], strict=False))
        firsts = np.cumsum([0, *(len(part[0]) for part in tree._parts)]).tolist()
        ways = [
            greedy(tree, first, last - first, vector)
            for first, last in zip(firsts, firsts[1:], strict=False)
        ]
        best = min(range(len(ways)), key=lambda part: ways[part][1][-1])
        assert far[-1] == pytest.approx(ways[best][1][-1], rel=1e-5)
        if found != ways[best][0]:  # a near tie, which float32 may see otherwise
            assert far == pytest.approx(ways[best][1], rel=1e-5) or tree.levels > 1


@settings(max_examples=30)
@given(trees, st.integers(0, 2**32))
def test_a_vector_gets_the_same_path_alone_or_in_any_batch(tree, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(33, tree.width)).astype(np.float32)
    ids, far = tree.assign(vectors)
    for row in (0, 7, 32):
        alone = tree.assign(vectors[row : row + 1])
        np.testing.assert_array_equal(alone[0][0], ids[row])
        np.testing.assert_array_equal(alone[1][0], far[row])
    order = rng.permutation(33)
    np.testing.assert_array_equal(tree.assign(vectors[order])[0], ids[order])


@settings(max_examples=30)
@given(trees, st.integers(0, 2**32))
def test_what_is_not_entered_is_as_it_was(tree, seed):
    vectors = np.random.default_rng(seed).normal(size=(40, tree.width)).astype(np.float32)
    base = ClusterTree(tree._base)
    ids, far = tree.assign(vectors)
    old, old_far = base.assign(vectors)
    stays = ids[:, 0] < tree.branching
    np.testing.assert_array_equal(ids[stays], old[stays])
    np.testing.assert_array_equal(far[stays], old_far[stays])
    assert (far[~stays, -1] < old_far[~stays, -1]).all()


def test_a_leaf_as_near_as_the_trees_own_is_not_entered():
    base = make(2, 2, 3, [], 0)
    tree = base.with_added([AddedTree(base.centroids)])
    vectors = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)
    np.testing.assert_array_equal(tree.assign(vectors)[0], base.assign(vectors)[0])


def test_what_is_beyond_the_radius_is_not_entered():
    rng = np.random.default_rng(0)
    base, part = make(3, 2, 4, [], 0), levels(2, 3, 2, 4, rng)
    vectors = rng.normal(size=(300, 4)).astype(np.float32)
    ids, far = base.with_added([AddedTree(part)]).assign(vectors)
    entered = ids[:, 0] >= 3
    radius = float(np.median(far[entered, -1]))
    found, _ = base.with_added([AddedTree(part, radius)]).assign(vectors)
    within = entered & (far[:, -1] <= radius)
    assert 0 < within.sum() < entered.sum()
    np.testing.assert_array_equal(found[within], ids[within])
    np.testing.assert_array_equal(found[~within], base.assign(vectors)[0][~within])


def test_the_file_of_an_added_memory_comes_back(tmp_path):
    tree = make(3, 2, 4, [2], 0, {"type": "bert"})
    rng = np.random.default_rng(9)
    tree = tree.with_added([AddedTree(levels(1, 3, 2, 4, rng), 0.1)])
    tree.save(tmp_path / "tree.safetensors")
    for number in (0, 1):
        (tmp_path / f"tree-{number}.safetensors").write_bytes(tree.added_bytes(number))
    found = ClusterTree.load(tmp_path / "tree.safetensors")
    assert found.roots == 3
    found = found.load_added(tmp_path / "tree-0.safetensors", 2)
    found = found.load_added(tmp_path / "tree-1.safetensors", 1)
    assert (found.roots, found.branching, found.levels) == (6, 3, 2)
    assert found._radii == tree._radii == (float("inf"), 0.1)
    for one, other in zip(found.centroids, tree.centroids, strict=True):
        np.testing.assert_array_equal(one, other)

    with pytest.raises(FormatError, match="roots is '2'"):
        tree.load_added(tmp_path / "tree-0.safetensors", 1)
    other = make(3, 2, 4, [], 0, {"type": "embeddings"})
    with pytest.raises(FormatError, match="another encoder"):
        other.load_added(tmp_path / "tree-0.safetensors", 2)
    with pytest.raises(FormatError, match="branching is '3'"):
        make(2, 2, 4, [], 0).load_added(tmp_path / "tree-0.safetensors", 2)
    with pytest.raises(FormatError, match="no such file"):
        tree.load_added(tmp_path / "tree-7.safetensors", 2)


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ([(1, 4)], "1 levels, the tree has 2"),
        ([(1, 4), (4, 4)], r"level2 has shape \(4, 4\); expected \(3, 4\)"),
        ([(1, 5), (3, 5)], r"expected \(1, 4\)"),
        ([(0, 4), (0, 4)], "levels"),
    ],
)
def test_what_is_no_part_of_the_tree_is_refused(part, found):
    with pytest.raises(FormatError, match=found):
        make(3, 2, 4, [], 0).with_added(
            [AddedTree([np.zeros(shape, np.float32) for shape in part])]
        )


def test_names_of_a_tree_with_added_memories():
    names = ClusterNames([["a", "b", "c"], ["d", "e", "f", "g", "h", "i"]])
    names.check(2, 2, 3)
    assert names.of_tree(2).levels == (("a", "b"), ("d", "e", "f", "g"))
    assert names.part(range(2, 3)) == [["c"], ["h", "i"]]
    for shape in ((2, 2, None), (3, 2, 3), (2, 1, 3), (2, 2, 4)):
        with pytest.raises(FormatError, match="names for 3 clusters"):
            names.check(*shape)
    for levels_ in ([["a"] * 3, ["b"] * 12], [["a"] * 3, ["b"] * 7], [["a"] * 3, ["b"] * 3]):
        with pytest.raises(FormatError, match="at level 2"):
            ClusterNames(levels_)
    made = name_tree(lambda cluster: [f"word{cluster}"], 2, 2, roots=3)
    made.check(2, 2, 3)
