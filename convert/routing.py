"""The tree of a converted bank, and the encoder that made its vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_hiermem.bank.files import check_name, find, hash_file
from mlx_hiermem.bank.layout import CONFIG, GENERIC
from mlx_hiermem.bank.manifest import FileEntry, check_sha256
from mlx_hiermem.config import ENCODER_TYPES
from mlx_hiermem.corpus.info import INFO
from mlx_hiermem.errors import InputError
from mlx_hiermem.folders import copy_file
from mlx_hiermem.routing.loading import load_encoder
from mlx_hiermem.routing.tree import ClusterTree
from mlx_hiermem.shapes import shown
from mlx_hiermem.tree_source import TREE, Routing, open_routing

from .sources import open_source
from .trees import read_tree

#: The encoder of a bank where nobody tells, the paper's, and how wide its vectors are.
DEFAULT_ENCODER: Mapping[str, Any] = {"type": "bert"}
DEFAULT_WIDTH = 384


@dataclass(frozen=True)
class BankRouting:
    """A tree, its encoder's entry in the bank's config, and where their files are.

    Attributes:
        path: of the tree, for people.
        tree: the tree.
        encoder: entry ``encoder`` of the bank's config.
        ours: the corpus or bank that files are copied from; what is not among them is written.
    """

    path: Path
    tree: ClusterTree
    encoder: Mapping[str, Any]
    ours: Routing | None = field(default=None)

    @property
    def nbytes(self) -> int:
        """Bytes of the centroids."""
        return sum(level.nbytes for level in self.tree.centroids)

    def write(self, memory: Path) -> dict[str, FileEntry]:
        """Write the files into a memory folder."""
        written = {}
        files = {} if self.ours is None else self.ours.files
        if TREE not in files:
            ClusterTree(self.tree.centroids, self.encoder).save(memory / TREE)
            written[TREE] = FileEntry(*hash_file(memory, TREE))
        if self.ours is None:
            return written
        for name, entry in files.items():
            copied = copy_file(find(self.ours.folder, name), memory, name)
            written[name] = FileEntry(copied.size, copied.sha256)
            if entry is not None:
                check_sha256(self.ours.folder / name, copied.sha256, entry)
        return written


def find_routing(
    path: Path,
    encoder: Mapping[str, Any] | None,
    branching: int | None = None,
    levels: int | None = None,
) -> BankRouting:
    """Read a tree.

    Args:
        path: tree file or folder (``trees.read_tree``), or a corpus or memory folder of ours.
        encoder: what routes a text; None: that of the folder, or the paper's.
        branching, levels: of the bank, where they are told.

    Raises:
        InputError: the tree's vectors are not those of the default encoder, and none is given.
        FormatError, ConfigError: the tree cannot be read, or is of another shape.
    """
    if path.is_dir() and _is_ours(path):
        ours = open_routing(path)
        return BankRouting(path, ours.tree, encoder or ours.encoder, ours)
    tree = read_tree(path, branching, levels)
    chosen = encoder or _named_encoder(path) or DEFAULT_ENCODER
    if chosen["type"] == "embeddings":
        name = chosen.get("file")
        if not isinstance(name, str) or not check_name(name) or not (path.parent / name).is_file():
            raise InputError(
                f"{path}: the encoder is of type embeddings, and its file {shown(name)} does not "
                "lie beside the tree; give a corpus or a memory folder as --tree"
            )
        routing = Routing(tree, dict(chosen), path.parent, {name: None}, None)
        return BankRouting(path, tree, chosen, routing)
    if dict(chosen) == dict(DEFAULT_ENCODER) and tree.width != DEFAULT_WIDTH:
        raise InputError(
            f"{path}: vectors of {tree.width} numbers, but all-MiniLM-L6-v2, the default encoder, "
            f'gives {DEFAULT_WIDTH}; name the encoder: --encoder \'{{"type": "bert", "model": '
            "FOLDER_OR_REPO}'"
        )
    _check_encoder(path, tree, chosen)
    return BankRouting(path, tree, chosen)


def _named_encoder(path: Path) -> Mapping[str, Any] | None:
    """The encoder that a tree file of ours names."""
    if path.suffix != ".safetensors":
        return None
    with open_source(path) as source:
        text = source.extras.get("encoder")
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    known = isinstance(found, dict) and found.get("type") in ENCODER_TYPES
    return found if known else None


def _check_encoder(path: Path, tree: ClusterTree, config: Mapping[str, Any]) -> None:
    """Raise where an encoder that is on this machine cannot be loaded, or gives other vectors."""
    name = config.get("model")
    if not isinstance(name, str) or not Path(name).is_dir():
        return  # of the Hub: whoever uses the model will fetch it
    width = load_encoder(config, folder=path.parent).width
    if width != tree.width:
        raise InputError(
            f"{path}: vectors of {tree.width} numbers, but the encoder {name} gives {width}; give "
            "the encoder that the tree was grown with"
        )


def _is_ours(folder: Path) -> bool:
    corpus = (folder / INFO).is_file() or (folder.parent / INFO).is_file()
    memory = (folder / CONFIG).is_file() and (folder / GENERIC).is_file()
    return corpus or memory or (folder / "memory").is_dir()
