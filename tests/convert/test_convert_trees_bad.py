"""Trees that are refused, each with one line: damaged, unsafe, incomplete, or of another shape."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import faiss
import joblib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from mlx_hiermem.convert.trees import read_tree
from mlx_hiermem.convert.trees.limits import MAX_BYTES
from mlx_hiermem.errors import HierMemError
from tests.convert.trees import named, nodes_of, refused, tree_of


class Attack:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return open, (str(self.path), "w")


# ---- another tree ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "parts"),
    [
        ((4, 2), ("branching 3", "branching 4")),
        ((3, 3), ("levels 2", "levels 3")),
        ((2, None), ("branching 3", "branching 2")),
    ],
)
def test_a_tree_of_another_shape(
    tmp_path: Path, told: tuple[int, int | None], parts: tuple[str, ...]
) -> None:
    np.savez(tmp_path / "tree.npz", **named(tree_of()))
    refused(tmp_path / "tree.npz", *parts, branching=told[0], levels=told[1])


@pytest.mark.parametrize(
    ("rows", "told", "part"),
    [
        (9, (3, 2), "are the leaves only of a tree of branching 3 and 2 levels"),
        (9, (3, None), "are the leaves only"),
        (9, (None, 2), "are the leaves only"),
        (9, (None, None), "or the leaves only of branching 3"),
        (12, (None, None), "may be branching 12 with 1 levels, branching 3 with 2 levels"),
        (13, (3, 2), "13 rows are not all levels of a tree of branching 3 and 2 levels"),
        (39, (3, 2), "39 rows are not all levels"),
    ],
)
def test_one_array_that_is_no_tree(
    tmp_path: Path, rows: int, told: tuple[int | None, int | None], part: str
) -> None:
    np.save(tmp_path / "tree.npy", np.ones((rows, 4), np.float32))
    refused(tmp_path / "tree.npy", part, branching=told[0], levels=told[1])


T = tree_of()
N = nodes_of(T)
NAMES = {
    "level 1 missing": ({"level2": T[1]}, "level1 is missing"),
    "level 2 missing": ({"level1": T[0], "level3": np.ones((27, 4))}, "level2 is missing"),
    "level 0": ({"level0": T[0], "level1": T[1]}, "levels count from 1"),
    "level twice": ({**named(T), "level_2": T[1]}, "level 2 is there twice"),
    "level of other size": ({"level1": T[0], "level2": T[1][:8]}, "level2 has shape (8, 4)"),
    "level of other width": ({"level1": T[0], "level2": T[1][:, :3]}, "level2 has shape (9, 3)"),
    "level of other order": ({"level1": T[0], "level2": T[1].reshape(9, 2, 2)}, "level2 has shape"),
    "a vector": ({"level1": T[0][0]}, "level1 has shape (4,)"),
    "a vector alone": ({"centroids": T[0][0]}, "one array of shape (4,)"),
    "one cluster": ({"level1": T[0][:1]}, "at least 2 clusters"),
    "surplus": ({**named(T), "labels": np.ones(9)}, "'labels' beside a tree"),
    "levels and nodes": ({**named(T), "root": T[0]}, "'root' beside a tree"),
    "no names": ({"a": T[0], "b": T[1]}, "its arrays are 'a, b'"),
    "nothing": ({}, "holds no arrays"),
    "no root": ({key: N[key] for key in "012"}, "the node root is missing"),
    "node missing": ({key: N[key] for key in ("root", "0", "2")}, "the node 1 is missing"),
    "node below missing": ({**N, "1.2": T[0]}, "the node 0.0 is missing"),
    "node twice": ({**N, "02": T[0]}, "node 2 is there twice"),
    "node of other size": ({**N, "1": T[0][:2]}, "the node 1 has shape (2, 4)"),
    "child too many": ({**N, "3": T[0]}, "there is a node 3, but each has 3 children"),
    "root is a vector": ({**N, "root": T[0][0]}, "the node root has shape (4,)"),
    "NaN": ({"level1": T[0], "level2": np.where(T[1] > 1, np.nan, T[1])}, "level2 holds a value"),
    "too large": ({"level1": T[0].astype(np.float64) * 1e300}, "level1 holds a value"),
    "integers": ({"level1": np.ones((3, 4), np.int64)}, "has dtype 'int64'"),
    "complex": ({"level1": np.ones((3, 4), np.complex64)}, "has dtype 'complex64'"),
    "empty": ({"level1": np.ones((3, 0), np.float32)}, "sizes of at least 1"),
    "text": ({"level1": np.array(["a", "b"])}, "has dtype"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_that_are_no_tree(tmp_path: Path, name: str) -> None:
    arrays, part = NAMES[name]
    np.savez(tmp_path / "tree.npz", **arrays)
    refused(tmp_path / "tree.npz", part)


# ---- unsafe ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".joblib"])
def test_models_of_scikit_learn_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"kmeans{suffix}"
    joblib.dump(KMeans(2, n_init=1).fit(np.eye(4)), path)
    refused(path, "run code when they are loaded", "np.save(path, kmeans.cluster_centers_)")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".faiss", ".safetensors"])
def test_pickles_are_not_run_under_any_name(tmp_path: Path, suffix: str) -> None:
    path, made = tmp_path / f"tree{suffix}", tmp_path / "made"
    path.write_bytes(pickle.dumps(Attack(made)))
    refused(path)
    assert not made.exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_object_arrays_are_not_loaded(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    path, made = tmp_path / f"tree{suffix}", tmp_path / "made"
    array = np.empty(shape, object)
    array[...] = Attack(made)
    if suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, level1=array)
    made.unlink(missing_ok=True)
    refused(path, "holds Python objects")
    assert not made.exists()


def test_pickles_in_pt_files_are_not_run(tmp_path: Path) -> None:
    torch.save({"level1": torch.ones(3, 4), "x": Attack(tmp_path / "made")}, tmp_path / "tree.pt")
    refused(tmp_path / "tree.pt", "refused")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("whole", [torch.tensor(1.0), {"k": 3}, [1, 2], [], {"levels": []}])
def test_pt_files_without_centroids(tmp_path: Path, whole: object) -> None:
    torch.save(whole, tmp_path / "tree.pt")
    refused(tmp_path / "tree.pt")


def test_links_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    np.save(tmp_path / "level1.npy", T[0])
    (tmp_path / "tree" / "level1.npy").symlink_to(tmp_path / "level1.npy")
    refused(tmp_path / "tree", "outside of the folder")


# ---- damaged ---------------------------------------------------------------------------


def header(shape: str, descr: str = "'<f4'", version: int = 1) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return np.lib.format.magic(version, 0) + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (header("(3, 4000000)"), "asks for 48000000"),
        (header("(3, 3)"), "asks for 36"),
        (header(f"(3, {MAX_BYTES})"), f"a tree has at most {MAX_BYTES}"),
        (header(f"({2**70}, {2**70})"), f"a tree has at most {MAX_BYTES}"),
        (header(f"({10**4000}, {10**4000})"), "which is too large"),
        (header(f"({'9' * 5000}, 4)"), "not a readable .npy array"),
        (header("(-3, -4)"), "expected sizes of at least 1"),
        (header("(0, 4)"), "expected sizes of at least 1"),
        (header("(3, True)"), "expected sizes of at least 1"),
        (header("(3, 4)", "'|O'"), "holds Python objects"),
        (header("(3, 4)", "'<c8'"), "has dtype 'complex64'"),
        (header("(3, 4)", "[('a', '<f4')]"), "has dtype 'void32'"),
        (header("(3, 4)", "__import__('os')"), "not a readable .npy array"),
        (header("(3, 4)", "(" * 5000), "not a readable .npy array"),
        (header("(3, 4)", version=3), "version 3.0 of the format"),
        (header("(3, 4)", version=9), "version 9.0 of the format"),
        (np.lib.format.magic(2, 0) + struct.pack("<I", 2**32 - 1), "not a readable .npy array"),
        (b"", "not a readable .npy array"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_headers_that_lie(tmp_path: Path, head: bytes, part: str, packed: bool) -> None:
    """Nothing is read, and no memory taken, for what a header only says."""
    path = tmp_path / ("tree.npz" if packed else "tree.npy")
    if packed:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("level1.npy", head + bytes(48))
    else:
        path.write_bytes(head + bytes(48))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of headers that Python 2 may have written
        refused(path, part)


def test_more_numbers_than_the_header_says(tmp_path: Path) -> None:
    with open(tmp_path / "tree.npy", "wb") as file:
        np.save(file, T[0])
        np.save(file, T[1])
    refused(tmp_path / "tree.npy", "asks for 48")


def test_archives_that_unpack_to_too_much(tmp_path: Path) -> None:
    """The directory says more than a tree may have; nothing of it is read."""
    path = tmp_path / "tree.npz"
    np.savez_compressed(path, **named(T))
    data = bytearray(path.read_bytes())
    entry = -1
    for _ in T:
        entry = data.index(b"PK\1\2", entry + 1)
        data[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(data)
    refused(path, f"unpack to {2 * (2**32 - 2)} bytes; a tree has at most {MAX_BYTES}")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_whose_numbers_have_changed(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "tree.npz"
    save(path, level1=T[0])
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") - 20] ^= 1  # in the last numbers
    path.write_bytes(data)
    refused(path, "not a readable .npz file")


def test_archives_with_one_name_twice(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, T[0])
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "tree.npz", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("level1.npy", buffer.getvalue())
        archive.writestr("level1.npy", buffer.getvalue())
    refused(tmp_path / "tree.npz", "is there twice")


@pytest.mark.parametrize("packing", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_archives_that_numpy_does_not_write(tmp_path: Path, packing: int) -> None:
    with zipfile.ZipFile(tmp_path / "tree.npz", "w", packing) as archive:
        archive.writestr("level1.npy", b"x")
    refused(tmp_path / "tree.npz", "not as np.savez writes it")
    with zipfile.ZipFile(tmp_path / "tree.npz", "w") as archive:
        archive.writestr("level1.txt", b"x")
    refused(tmp_path / "tree.npz", "not as np.savez writes it")


def faiss_file(folder: Path) -> Path:
    index = faiss.IndexFlatL2(4)
    index.add(T[0])
    faiss.write_index(index, str(folder / "tree.faiss"))
    return folder / "tree.faiss"


@pytest.mark.parametrize(
    ("at", "new", "part"),
    [
        (4, struct.pack("<i", 5), "3 vectors of 5, and then 12 numbers"),
        (4, struct.pack("<i", -4), "vectors of -4"),
        (8, struct.pack("<q", 2), "2 vectors of 4"),
        (8, struct.pack("<q", 2**62), "vectors of 4"),
        (8, struct.pack("<q", -3), "-3 vectors of 4"),
        (33, struct.pack("<i", 7), "metric 7"),
        (37, struct.pack("<Q", 2**63), "and then 9223372036854775808 numbers"),
        (0, b"IxF9", "'IxF9'"),
        (0, b"\0\n\xff\x1b", "first letters"),
        (93, b"more", "has 97 bytes, expected 93"),
    ],
)
def test_damaged_indexes_of_faiss(tmp_path: Path, at: int, new: bytes, part: str) -> None:
    path = faiss_file(tmp_path)
    data = bytearray(path.read_bytes())
    assert len(data) == 93
    data[at : at + len(new)] = new
    path.write_bytes(data)
    refused(path, part)


def test_indexes_of_faiss_that_agree_on_too_much(tmp_path: Path) -> None:
    head = struct.pack("<4siqqq?iQ", b"IxF2", 2**30, 2**30, 0, 0, True, 1, 2**60)
    (tmp_path / "tree.faiss").write_bytes(head)
    refused(tmp_path / "tree.faiss", f"a tree has at most {MAX_BYTES}")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    suffix=st.sampled_from([".npy", ".npz", ".faiss", ".pt"]),
    cut=st.floats(0, 1, exclude_max=True),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3),
    short=st.booleans(),
)
def test_any_damage_is_one_line_or_a_tree(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, cut: float,
    flips: list[tuple[float, int]], short: bool,
) -> None:  # fmt: skip
    """No other error gets out, whatever is flipped; what is cut off is always found."""
    path = tmp_path_factory.mktemp("tree") / f"tree{suffix}"
    if suffix == ".npy":
        np.save(path, T[0])
    elif suffix == ".npz":
        np.savez_compressed(path, **named(T))
    elif suffix == ".pt":
        torch.save(torch.from_numpy(T[0]), path)
    else:
        faiss_file(path.parent)
    data = bytearray(path.read_bytes())
    for place, change in flips:
        data[int(place * len(data))] ^= change
    path.write_bytes(data[: int(cut * len(data))] if short else data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read_tree(path)
        except HierMemError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert not short


# ---- places ----------------------------------------------------------------------------


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    refused(tmp_path / "tree.npy", "no such file")
    (tmp_path / "tree.csv").write_text("1,2")
    refused(tmp_path / "tree.csv", "unknown kind", ".npy")
    refused(tmp_path, "0 files of centroids")


def test_folders_that_say_two_things(tmp_path: Path) -> None:
    np.save(tmp_path / "level1.npy", T[0])
    torch.save(torch.from_numpy(T[0]), tmp_path / "level1.pt")
    refused(tmp_path, "another file is called level1 too")
    (tmp_path / "level1.pt").unlink()
    np.savez(tmp_path / "level2.npz", **named(T))
    refused(tmp_path, "holds 2 arrays")
    (tmp_path / "level2.npz").rename(tmp_path / "level2.pkl")
    refused(tmp_path, "run code when they are loaded")
