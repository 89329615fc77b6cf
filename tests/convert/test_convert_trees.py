"""Trees of real k-means: scikit-learn's, faiss's and any other, in all forms and files."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from sklearn.cluster import KMeans

from mlx_hiermem.convert.trees import read_tree
from mlx_hiermem.routing.tree import ClusterTree
from tests.convert.checkpoints import Job, make_numbers, save_dcp, write_stacked
from tests.convert.trees import named, nodes_of, refused, same, tree_of


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


# ---- real k-means ----------------------------------------------------------------------


def test_routes_as_recursive_kmeans_of_scikit_learn_does(tmp_path: Path) -> None:
    """Nodes saved as people do; a path is what the models predict, one below the other."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((600, 6))
    models: dict[tuple[int, ...], KMeans] = {}

    def split(points: np.ndarray, path: tuple[int, ...]) -> None:
        models[path] = KMeans(3, n_init=1, random_state=0).fit(points)
        np.save(
            tmp_path / f"{'_'.join(map(str, path)) or 'root'}.npy", models[path].cluster_centers_
        )
        if len(path) < 2:
            for child in range(3):
                split(points[models[path].labels_ == child], (*path, child))

    split(vectors, ())
    tree = read_tree(tmp_path, 3, 3)
    asked = rng.standard_normal((200, 6))
    for vector, found in zip(asked, tree.route(asked), strict=True):
        path: tuple[int, ...] = ()
        ids = []
        for _ in range(3):
            path += (int(models[path].predict(vector[None])[0]),)
            ids.append(sum(child * 3**place for place, child in enumerate(reversed(path))))
        assert found.ids == tuple(ids)


def test_routes_as_recursive_kmeans_of_faiss_does(tmp_path: Path) -> None:
    """One flat index per node, written by faiss; a path is what searching them gives."""
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((600, 5)).astype(np.float32)
    indexes: dict[str, faiss.Index] = {}

    def split(points: np.ndarray, name: str) -> None:
        kmeans = faiss.Kmeans(5, 4, niter=5, seed=1, min_points_per_centroid=1)
        kmeans.train(points)
        index = faiss.IndexFlatL2(5)
        index.add(kmeans.centroids)
        faiss.write_index(index, str(tmp_path / f"{name}.faiss"))
        indexes[name] = index
        if name == "root":
            labels = index.search(points, 1)[1][:, 0]
            for child in range(4):
                split(points[labels == child], str(child))

    split(vectors, "root")
    tree = read_tree(tmp_path)
    assert (tree.branching, tree.levels, tree.encoder) == (4, 2, None)
    for vector, found in zip(vectors[:100], tree.route(vectors[:100]), strict=True):
        first = int(indexes["root"].search(vector[None], 1)[1][0, 0])
        second = int(indexes[str(first)].search(vector[None], 1)[1][0, 0])
        assert found.ids == (first, 4 * first + second)


@pytest.mark.parametrize("kind", ["IndexFlatL2", "IndexFlatIP", "IndexFlat"])
@pytest.mark.parametrize("suffix", [".faiss", ".index"])
def test_flat_indexes_of_faiss_hold_all_levels(tmp_path: Path, kind: str, suffix: str) -> None:
    tree = tree_of()
    tree = [level / np.linalg.norm(level, axis=1, keepdims=True) for level in tree]
    index = getattr(faiss, kind)(4)
    index.add(np.concatenate(tree))
    path = tmp_path / f"centroids{suffix}"
    faiss.write_index(index, str(path))
    assert same(read_tree(path, 3, 2), tree)


def test_inner_products_are_refused_where_they_are_no_distances(tmp_path: Path) -> None:
    index = faiss.IndexFlatIP(4)
    index.add(np.concatenate(tree_of()))
    faiss.write_index(index, str(tmp_path / "tree.faiss"))
    refused(tmp_path / "tree.faiss", "compares by inner product", branching=3)


@pytest.mark.parametrize(
    ("factory", "letters"),
    [("IVF2,Flat", "IwFl"), ("IDMap,Flat", "IxMp"), ("HNSW4", "IHNf"), ("SQ8", "IxSQ")],
)
def test_other_indexes_of_faiss_are_refused_by_name(
    tmp_path: Path, factory: str, letters: str
) -> None:
    vectors = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    index = faiss.index_factory(4, factory)
    index.train(vectors)
    if factory.startswith("IDMap"):
        index.add_with_ids(vectors, np.arange(100))
    else:
        index.add(vectors)
    faiss.write_index(index, str(tmp_path / "tree.index"))
    refused(tmp_path / "tree.index", letters, "faiss.IndexFlatL2")


def test_metrics_that_are_no_distances_are_refused(tmp_path: Path) -> None:
    index = faiss.IndexFlat(4, faiss.METRIC_L1)
    index.add(tree_of()[0])
    faiss.write_index(index, str(tmp_path / "tree.faiss"))
    refused(tmp_path / "tree.faiss", "metric 2", "L2 distance")


# ---- files and forms -------------------------------------------------------------------


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    branching=st.integers(2, 4),
    levels=st.integers(1, 3),
    width=st.integers(1, 5),
    form=st.sampled_from(["levels", "nodes", "nodes_", "positions", "whole", "deep", "children"]),
    file=st.sampled_from(
        ["npz", "npz packed", "pt", "safetensors", "folder of npy", "folder of pt"]
    ),
    dtype=st.sampled_from(["float16", "float32", "float64", ">f4"]),
    order=st.sampled_from("CF"),
    seed=st.integers(0, 99),
)
def test_every_form_comes_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, branching: int, levels: int, width: int, form: str,
    file: str, dtype: str, order: str, seed: int,
) -> None:  # fmt: skip
    """Whatever the file, the form, the dtype: the centroids are those that went in."""
    if dtype == ">f4" and "npy" not in file and "npz" not in file:
        dtype = "float32"
    tree = tree_of(branching, levels, width, seed)
    tree = [level.astype(np.float16).astype(np.float32) for level in tree]  # exact in all dtypes
    told: tuple[int, int] | tuple[()] = ()
    if form.startswith("nodes"):
        arrays = nodes_of(tree, "_" if form == "nodes_" else ".")
    elif form == "positions" and file.startswith("npz") and levels > 1:
        arrays = {f"arr_{level}": array for level, array in enumerate(tree)}
    elif form == "whole":
        arrays, told = {"anything": np.concatenate(tree)}, (branching, levels)
    elif form == "deep":
        arrays = {
            f"Level-{n}": level.reshape(*(branching,) * n, width) for n, level in enumerate(tree, 1)
        }
    elif form == "children":
        arrays = {
            f"level_{n}.weight": level.reshape(-1, branching, width)
            for n, level in enumerate(tree, 1)
        }
    else:
        arrays = named(tree)
    arrays = {name: np.array(array, dtype, order=order) for name, array in arrays.items()}
    folder = tmp_path_factory.mktemp("tree")
    path = folder / "centroids"
    if file.startswith("npz"):
        path = path.with_suffix(".npz")
        (np.savez if file == "npz" else np.savez_compressed)(path, **arrays)
    elif file == "pt":
        path = path.with_suffix(".pt")
        plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        torch.save({"k": branching, **tensors(plain)}, path)
    elif file == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    else:
        path.mkdir()
        (path / "README.md").write_text("not a part of it")
        for name, array in arrays.items():
            if file == "folder of npy":
                np.save(path / f"{name}.npy", array)
            else:
                torch.save(torch.from_numpy(np.ascontiguousarray(array)), path / f"{name}.pt")
    assert same(read_tree(path, *told), tree)


@pytest.mark.parametrize("around", ["list", "tuple", "centroids", "levels", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lists_and_dictionaries_of_pytorch(tmp_path: Path, around: str, dtype: torch.dtype) -> None:
    tree = [torch.from_numpy(level).to(dtype) for level in tree_of()]
    whole = {
        "list": list(tree),
        "tuple": tuple(tree),
        "centroids": {"centroids": tree, "k": 3},
        "levels": {"levels": {"level1": tree[0], "level2": tree[1]}, "note": "x"},
        "state_dict": {"state_dict": {"level1": tree[0], "level2": torch.nn.Parameter(tree[1])}},
    }[around]
    torch.save(whole, tmp_path / "tree.pth")
    assert same(read_tree(tmp_path / "tree.pth"), [level.float().numpy() for level in tree])


def test_one_tensor_of_pytorch_holds_all_levels(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(np.concatenate(tree_of(2, 3))), tmp_path / "tree.pt")
    assert same(read_tree(tmp_path / "tree.pt", branching=2), tree_of(2, 3))


def test_dcp_folders(tmp_path: Path) -> None:
    """In float64, cut along the columns: the parts lie in two files."""
    state = tensors({name: array.astype(np.float64) for name, array in named(tree_of()).items()})
    save_dcp([Job(tmp_path / "tree", state, axis=1)])
    assert same(read_tree(tmp_path / "tree"), tree_of())


def test_reads_our_own_trees_and_those_of_the_examples(tmp_path: Path) -> None:
    ClusterTree(tree_of(), {"type": "bert"}).save(tmp_path / "tree.safetensors")
    assert same(read_tree(tmp_path / "tree.safetensors", 3, 2), tree_of())
    example = make_numbers()
    assert same(read_tree(write_stacked(example, tmp_path / "run").tree, 3, 2), example.tree)


@pytest.mark.parametrize("told", [(3, 2), (3, None), (None, 2)])
def test_one_array_is_cut_as_the_bank_asks(
    tmp_path: Path, told: tuple[int | None, int | None]
) -> None:
    np.save(tmp_path / "tree.npy", np.concatenate(tree_of()))
    assert same(read_tree(tmp_path / "tree.npy", *told), tree_of())


def test_flat_kmeans_is_a_tree_of_one_level(tmp_path: Path) -> None:
    np.save(tmp_path / "tree.npy", tree_of(7, 1)[0])
    assert same(read_tree(tmp_path / "tree.npy"), tree_of(7, 1))


def test_single_values_beside_the_levels_are_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "tree.npz", **named(tree_of()), branching=3, encoder="bert")
    assert same(read_tree(tmp_path / "tree.npz"), tree_of())
