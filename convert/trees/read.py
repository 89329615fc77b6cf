"""Reading a cluster tree from whatever its centroids were saved in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_hiermem.bank.files import check_name, find
from mlx_hiermem.errors import FormatError
from mlx_hiermem.routing.tree import ClusterTree
from mlx_hiermem.shapes import shown

from .faiss_files import read_faiss
from .forms import levels_of
from .limits import MAX_BYTES
from .numpy_files import read_npy, read_npz
from .torch_files import read_source, read_torch_tree

_READERS: dict[str, Callable[[Path], dict[str, np.ndarray] | np.ndarray]] = {
    ".npy": read_npy,
    ".npz": read_npz,
    ".pt": read_torch_tree,
    ".pth": read_torch_tree,
    ".safetensors": read_source,
    ".faiss": read_faiss,
    ".index": read_faiss,
}
# What scikit-learn's own pages save models as. All of them run code when they are loaded.
_PICKLES = (".pkl", ".pickle", ".joblib", ".sav", ".dill", ".skops")
_MOST_FILES = 1 << 17
_DCP = ".metadata"


def read_tree(
    path: str | Path, branching: int | None = None, levels: int | None = None
) -> ClusterTree:
    """Read the centroids of recursive k-means (docs/convert.md lists the forms).

    Args:
        path: a file (.npy, .npz, .pt, .pth, .safetensors, .faiss, .index), or a folder of them: one
            per level (``level1.npy``) or per node (``root.npy``, ``0.npy``, ``0_3.npy``); or a
            folder of torch.distributed.checkpoint.
        branching, levels: k and p of the bank, where they are known. Another tree is refused.

    Returns:
        The tree. It names no encoder: the caller knows which one it was grown with.

    Raises:
        FormatError: a file is missing, damaged, unsafe or of another format; its arrays are no
            tree, or one of another k or p; numbers are not finite.
    """
    path = Path(path)
    arrays = _read_folder(path) if path.is_dir() else _named(_read_file(path), path.stem)
    where = str(path)
    try:
        tree = ClusterTree(levels_of(arrays, where, branching, levels))
    except FormatError as error:
        text = str(error)
        raise FormatError(text if text.startswith(where) else f"{where}: {text}") from None
    for name, asked, found in (
        ("branching", branching, tree.branching),
        ("levels", levels, tree.levels),
    ):
        if asked not in (None, found):
            raise FormatError(
                f"{where}: a tree of {name} {found}, but the bank has {name} {asked}; give the "
                "tree that the bank was trained with"
            )
    return tree


def _read_file(path: Path) -> dict[str, np.ndarray] | np.ndarray:
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise FormatError(
            f"{path}: refused: {suffix} files run code when they are loaded; save the centroids "
            "with np.save(path, kmeans.cluster_centers_)"
        )
    if not path.is_file():
        raise FormatError(f"{path}: no such file; expected the centroids of a cluster tree")
    if suffix not in _READERS:
        raise FormatError(
            f"{path}: a file of an unknown kind; expected {', '.join(_READERS)}, or a folder of "
            "them"
        )
    return _READERS[suffix](path)


def _named(found: dict[str, np.ndarray] | np.ndarray, name: str) -> dict[str, np.ndarray]:
    return found if isinstance(found, dict) else {name: found}


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder, each by the name of its file."""
    if (folder / _DCP).exists():
        return read_source(folder)
    try:
        names = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
    except OSError as error:
        raise FormatError(f"{folder}: cannot be read ({error.strerror})") from None
    names = [name for name in names if Path(name).suffix.lower() in (*_READERS, *_PICKLES)]
    if not names or len(names) > _MOST_FILES:
        raise FormatError(
            f"{folder}: {len(names)} files of centroids; expected files such as level1.npy, or "
            f"root.npy and 0.npy, of {', '.join(_READERS)}"
        )
    arrays: dict[str, np.ndarray] = {}
    total = 0
    for name in names:
        if not check_name(name):
            raise FormatError(f"{folder}: has a file {shown(name)}; rename it")
        find(folder, name)  # no link out of the folder
        found = _read_file(folder / name)
        if len(names) == 1:
            return _named(found, Path(name).stem)
        if isinstance(found, dict):
            if len(found) != 1:
                raise FormatError(
                    f"{folder / name}: holds {len(found)} arrays; expected one in each file of a "
                    "folder"
                )
            found = next(iter(found.values()))
        if (stem := Path(name).stem) in arrays:
            raise FormatError(f"{folder / name}: another file is called {stem} too; leave one out")
        arrays[stem] = found
        total += found.nbytes
        if total > MAX_BYTES:
            raise FormatError(f"{folder}: more than {MAX_BYTES} bytes of centroids")
    return arrays
