"""Trees that are not what they were: read, with an added one, and asked for a path.

Also those of others, as ``convert --tree`` reads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import faiss
import numpy as np
import torch

from mlx_hiermem.convert.trees import read_tree
from mlx_hiermem.routing.embeddings import EmbeddingEncoder
from mlx_hiermem.routing.names import ClusterNames
from mlx_hiermem.routing.tree import AddedTree, ClusterTree
from tests.bank.mutations import split
from tests.reliability.fuzz_mutations import anywhere, as_json, as_safetensors, as_zip
from tests.reliability.fuzz_process import FolderTarget

K, P, WIDTH, ROOTS = 3, 3, 4, 2
_TREE, _ADDED = "tree.safetensors", "tree-acme.safetensors"
_NUMBERS = [
    0,
    1,
    2,
    3,
    -1,
    2**31,
    2**63,
    2**64,
    "3",
    "1e9",
    "NaN",
    "-inf",
    "inf",
    "0",
    "-1",
    "1e-400",
]


class Trees(FolderTarget):
    """A tree of three levels, an added tree of two roots, names and an encoder."""

    def make(self) -> None:
        """Write them."""
        rng = np.random.default_rng(0)
        levels = [rng.standard_normal((K**one, WIDTH), np.float32) for one in range(1, P + 1)]
        added = [rng.standard_normal((ROOTS * K**one, WIDTH), np.float32) for one in range(P)]
        tree = ClusterTree(levels, {"type": "embeddings"})
        tree.save(self.folder / _TREE)
        data = tree.with_added([AddedTree(added, 0.9)]).added_bytes(0)
        (self.folder / _ADDED).write_bytes(data)
        counts = [K + ROOTS, (K + ROOTS) * K]
        ClusterNames([[f"name {i}" for i in range(n)] for n in counts]).save(self.folder)
        _encoder(np.ones(6, np.float32), np.zeros((1, WIDTH), np.float32)).save(self.folder)
        self.vectors = rng.standard_normal((5, WIDTH)).astype(np.float32)
        self.convert = ""
        self.look(Random(0))
        nodes = {"root": levels[0], "0": levels[1][:K], "1": levels[1][K : 2 * K],
                 "2": levels[1][2 * K :]}  # fmt: skip
        np.savez(self.folder / "nodes.npz", **nodes)
        np.savez_compressed(self.folder / "levels.npz", *levels)
        np.save(self.folder / "all.npy", np.concatenate(levels))
        index = faiss.IndexFlatL2(WIDTH)
        index.add(np.concatenate(levels))
        faiss.write_index(index, str(self.folder / "flat.index"))
        torch.save({f"level{i}": torch.tensor(one) for i, one in enumerate(levels, 1)},
                   self.folder / "levels.pt")  # fmt: skip
        self.others = ["nodes.npz", "levels.npz", "all.npy", "flat.index", "levels.pt"]
        for name in self.others:
            read_tree(self.folder / name, K)

    def change(self, random: Random) -> str:
        """Change one of the files; its metadata is what most depends on."""
        own = [name for name in self.files if name not in self.others]
        name = random.choice([_TREE, _TREE, _ADDED, _ADDED, *own])
        self.convert = ""
        if random.random() < 0.4:
            name = self.convert = random.choice(self.others)
        data = self.files[name]
        if name.endswith((".npz", ".pt")):
            data = as_zip(random, data)
        elif name in self.others:
            data = anywhere(random, data)
        elif name.endswith(".json"):
            data = as_json(random, data)
        elif name in (_TREE, _ADDED) and random.random() < 0.3:
            data = _other_metadata(random, data)
        else:
            data = as_safetensors(random, data)
        self.put(name, data)
        return f"{name}: {data[:200]!r}"

    def look(self, random: Random) -> None:
        """Read all, and route."""
        if self.convert:
            read_tree(self.folder / self.convert, *random.choice([(None, None), (K, None)]))
            return
        tree = ClusterTree.load(self.folder / _TREE)
        tree = tree.load_added(self.folder / _ADDED, ROOTS)
        for path in tree.route(self.vectors):
            assert len(path.ids) == tree.levels
            for level, one in enumerate(path.ids[1:], 1):
                assert one // tree.branching == path.ids[level - 1]
        names = ClusterNames.load(self.folder)
        if names is not None:
            names.check(tree.branching, tree.levels, tree.roots)
            assert names.of(1, 0).isprintable()
        _load_encoder(self.folder)


def _other_metadata(random: Random, data: bytes) -> bytes:
    """A tree that says another thing of itself."""
    header, rest = split(data)
    table = json.loads(header)
    metadata = table["__metadata__"]
    for key in random.sample(list(metadata), 2):
        metadata[key] = random.choice([str(random.choice(_NUMBERS)), "", "{}", "[", "x" * 9000])
    if random.random() < 0.3:
        table["__metadata__"] = {key: random.choice(_NUMBERS) for key in metadata}
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + rest


def _encoder(weights: np.ndarray, components: np.ndarray) -> EmbeddingEncoder:
    return EmbeddingEncoder(np.ones((6, WIDTH), np.float32), None, weights, components)


def _load_encoder(folder: Path) -> None:
    EmbeddingEncoder.load(folder, np.ones((6, WIDTH), np.float32), None)
