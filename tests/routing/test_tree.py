"""The tree routes greedily, keeps its promises about ids, and refuses what is not a tree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mlx_hiermem.errors import FormatError, InputError
from mlx_hiermem.routing import ClusterPath, ClusterTree


def make_tree(k: int, levels: int, width: int, seed: int, encoder=None) -> ClusterTree:
    rng = np.random.default_rng(seed)
    return ClusterTree(
        [rng.normal(size=(k**level, width)).astype(np.float32) for level in range(1, levels + 1)],
        encoder,
    )


def greedy(tree: ClusterTree, vector: np.ndarray) -> ClusterPath:
    """The definition, one child at a time, in float64."""
    node, ids, distances = 0, [], []
    for centroids in tree.centroids:
        children = range(node * tree.branching, (node + 1) * tree.branching)
        far = [np.linalg.norm(centroids[i].astype(np.float64) - vector) for i in children]
        node = children[int(np.argmin(far))]
        ids.append(node)
        distances.append(min(far))
    return ClusterPath(tuple(ids), tuple(distances))


trees = st.builds(
    make_tree, st.integers(2, 5), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32)
)


@settings(deadline=None, max_examples=50)
@given(trees, st.integers(1, 40), st.integers(0, 2**32))
def test_route_is_the_greedy_definition_and_nests(tree, n, seed):
    vectors = np.random.default_rng(seed).normal(size=(n, tree.width)).astype(np.float32)
    for path, vector in zip(tree.route(vectors), vectors, strict=True):
        expected = greedy(tree, vector)
        assert path.ids == expected.ids
        np.testing.assert_allclose(path.distances, expected.distances, rtol=1e-5)
        assert all(
            child // tree.branching == parent
            for parent, child in zip(path.ids, path.ids[1:], strict=False)
        )
        assert all(0 <= i < tree.branching**level for level, i in enumerate(path.ids, 1))


@settings(deadline=None, max_examples=30)
@given(trees, st.integers(1, 40), st.integers(0, 2**32))
def test_a_batch_gives_what_single_vectors_give(tree, n, seed):
    vectors = np.random.default_rng(seed).normal(size=(n, tree.width)).astype(np.float32)
    assert tree.route(vectors) == [path for vector in vectors for path in tree.route(vector)]


def test_a_batch_larger_than_one_slice_gives_what_single_vectors_give(monkeypatch):
    tree = make_tree(16, 2, 48, seed=0)
    vectors = np.random.default_rng(1).normal(size=(200, 48)).astype(np.float32)
    whole = tree.assign(vectors)
    monkeypatch.setattr("mlx_hiermem.routing.tree._SLICE", 16 * 48 * 7)
    for a, b in zip(whole, tree.assign(vectors), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_equal_distances_take_the_first_child():
    level1 = np.array([[1, 0], [1, 0]], np.float32)
    tree = ClusterTree([level1, np.repeat(level1, 2, axis=0)])
    (path,) = tree.route(np.array([0, 1], np.float32))
    assert path.ids == (0, 0)
    assert path.distances == pytest.approx((2**0.5, 2**0.5))


def test_no_vectors_no_paths():
    tree = make_tree(2, 2, 3, seed=0)
    assert tree.route(np.empty((0, 3), np.float32)) == []
    ids, distances = tree.assign(np.empty((0, 3), np.float32))
    assert ids.shape == distances.shape == (0, 2)


@settings(deadline=None, max_examples=10)
@given(tree=trees)
def test_save_and_load_keep_every_bit(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "tree.safetensors"
    tree.save(path)
    again = ClusterTree.load(path)
    assert (again.branching, again.levels, again.width) == (tree.branching, tree.levels, tree.width)
    for a, b in zip(tree.centroids, again.centroids, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["tree.safetensors"]


def test_the_file_is_as_documented(tmp_path):
    encoder = {"type": "bert", "model": "some/model"}
    make_tree(3, 2, 4, seed=0, encoder=encoder).save(tmp_path / "tree.safetensors")
    tensors = load_file(tmp_path / "tree.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "level1": (3, 4),
        "level2": (9, 4),
    }
    assert ClusterTree.load(tmp_path / "tree.safetensors").encoder == encoder


@pytest.mark.parametrize(
    "vectors, says",
    [
        (np.zeros((2, 5)), r"\(2, 5\).*\(n, 4\)"),
        (np.zeros(5), r"\(1, 5\)"),
        (np.zeros((1, 2, 4)), r"\(1, 2, 4\)"),
        (np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]]), "row 1 .* not finite"),
        (np.array([[0, 0, np.inf, 0]]), "row 0 .* not finite"),
        (np.full((1, 4), 1e38), "overflow"),
        (np.array([["a", "b", "c", "d"]]), "numbers"),
    ],
)
def test_bad_vectors_are_refused(vectors, says):
    with pytest.raises(InputError, match=says):
        make_tree(2, 2, 4, seed=0).route(vectors)


META = {"branching": "2", "levels": "2"}


def good() -> dict[str, np.ndarray]:
    return {"level1": np.ones((2, 4), np.float32), "level2": np.ones((4, 4), np.float32)}


@pytest.mark.parametrize(
    "change, metadata, says",
    [
        ({"level2": np.ones((5, 4), np.float32)}, META, r"level2 has shape \(5, 4\).*\(4, 4\)"),
        ({"level2": np.ones((4, 3), np.float32)}, META, r"level2 has shape \(4, 3\).*\(4, 4\)"),
        ({"level2": np.ones((4, 4), np.float16)}, META, "level2 has dtype F16.*F32"),
        ({"level1": np.full((2, 4), np.nan, np.float32)}, META, "level1 .* not finite"),
        ({"level1": np.ones(2, np.float32)}, META, "level1"),
        ({"level1": np.ones((1, 4), np.float32)}, META, r"level1 has shape \(1, 4\)"),
        ({"other": np.ones((2, 4), np.float32)}, META, "tensors are level1, level2, other"),
        ({}, {"branching": "3", "levels": "2"}, "branching is '3' .* make 2"),
        ({}, {"branching": "2"}, "levels is None"),
        ({}, {**META, "encoder": "{"}, "encoder is not valid JSON"),
    ],
)
def test_a_file_that_is_not_a_tree_is_refused_by_name(tmp_path, change, metadata, says):
    path = tmp_path / "tree.safetensors"
    save_file({**good(), **change}, path, metadata)
    with pytest.raises(FormatError, match=says) as error:
        ClusterTree.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_truncated_files_are_refused(tmp_path):
    path = tmp_path / "tree.safetensors"
    with pytest.raises(FormatError, match="no such file"):
        ClusterTree.load(path)
    save_file(good(), path, META)
    ClusterTree.load(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        ClusterTree.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tree.safetensors"
    make_tree(2, 1, 3, seed=0).save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FormatError, match="No space left on device"):
        make_tree(2, 1, 3, seed=1).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tree.safetensors"]
