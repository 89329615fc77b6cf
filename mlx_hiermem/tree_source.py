"""Where a tree and its encoder come from: a corpus, or the bank of another model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .anchors import load_anchor
from .bank.blocked import BLOCKED
from .bank.checksums import CHECKSUMS
from .bank.files import find
from .bank.journal import check_finished
from .bank.layout import CONFIG, GENERIC, added_tree, level_of
from .bank.manifest import FileEntry, read_manifest
from .config import MemoryConfig
from .corpus.folder import file_sha256
from .corpus.info import INFO, CorpusInfo
from .errors import ConfigError, FormatError, InputError
from .routing.embeddings import embedding_table
from .routing.names import NAMES
from .routing.tree import ClusterTree

TREE = "tree.safetensors"


@dataclass(frozen=True)
class Routing:
    """A tree and its encoder, in some folder.

    Attributes:
        tree: the tree.
        encoder: the entry ``encoder`` of a memory's config.
        folder: where their files are.
        files: names of them; with their sha256 where a manifest vouches for it.
        embedding_sha256: of the anchor's table (float32) that the encoder is made of, if it is of
            the type ``embeddings`` and that can be known.
    """

    tree: ClusterTree
    encoder: dict[str, Any]
    folder: Path
    files: dict[str, FileEntry | None]
    embedding_sha256: str | None


def open_routing(folder: Path) -> Routing:
    """The tree and the encoder of a corpus, or of the bank of a memory or model folder.

    Raises:
        ConfigError: it is none of these, or has no tree.
        FormatError: a file is missing or damaged.
    """
    corpora = [place for place in (folder, folder.parent) if (place / INFO).is_file()]
    if corpora and (folder == corpora[0] or folder.name == "routing"):
        return _routing_of_corpus(corpora[0])
    memory = folder if (folder / CONFIG).is_file() and (folder / GENERIC).is_file() else None
    memory = folder / "memory" if (folder / "memory").is_dir() else memory
    if memory is None:
        raise ConfigError(
            f"{folder}: no corpus and no memory bank; give a folder that `mlx_hiermem cluster` has "
            "made, or a memory folder"
        )
    return _routing_of_bank(memory)


def _routing_of_corpus(corpus: Path) -> Routing:
    info = CorpusInfo.load(corpus)
    folder = corpus / "routing"
    if not (folder / TREE).is_file():
        raise FormatError(f"{folder / TREE}: no such file; copy the corpus again")
    found = file_sha256(folder / TREE)
    if found != info.tree_sha256:
        raise FormatError(
            f"{folder / TREE}: altered: sha256 is {found}, {INFO} says {info.tree_sha256}; copy "
            "the corpus again"
        )
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    files: dict[str, FileEntry | None] = {
        name.as_posix(): None
        for name in names
        if not any(part.startswith(".") for part in name.parts)
    }
    tree = ClusterTree.load(folder / TREE)
    return Routing(tree, dict(info.encoder), folder, files, info.embedding_sha256)


def _routing_of_bank(memory: Path) -> Routing:
    check_finished(memory)
    config = MemoryConfig.load(memory / CONFIG)
    own = {CONFIG, GENERIC, CHECKSUMS, BLOCKED}
    if config.added:  # which are no part of the tree; some of the names are theirs
        own |= {NAMES, *(added_tree(one.name) for one in config.added)}
    files: dict[str, FileEntry | None] = {
        name: entry
        for name, entry in read_manifest(memory).files.items()
        if name not in own and level_of(name) is None
    }
    if TREE not in files:
        raise ConfigError(f"{memory}: this bank has no tree; give one that has, or a corpus")
    tree = ClusterTree.load(find(memory, TREE))
    sha256 = None
    if config.encoder["type"] == "embeddings" and (memory.parent / "config.json").is_file():
        sha256 = _embedding_sha256(memory.parent)
    return Routing(tree, dict(config.encoder), memory, files, sha256)


def check_tree(routing: Routing, levels: int, branching: int | None) -> None:
    tree = routing.tree
    if tree.levels != levels:
        raise InputError(
            f"{routing.folder / TREE}: a tree of {tree.levels} levels, but --config has {levels} "
            "ranks; give one rank for each level"
        )
    if branching not in (None, tree.branching):
        raise InputError(
            f"{routing.folder / TREE}: a tree of branching {tree.branching}, but --branching is "
            f"{branching}; leave it out"
        )


def check_embeddings(routing: Routing, folder: Path) -> None:
    """Raise InputError where the encoder is made of the embeddings of another anchor.

    Args:
        folder: of the anchor that is to have the tree.
    """
    if routing.encoder["type"] != "embeddings":
        return
    if routing.embedding_sha256 not in (None, _embedding_sha256(folder)):
        raise InputError(
            f"{routing.folder}: its tree was grown with the token embeddings of another anchor; "
            "cluster the corpus with --model of this one, or with a BERT encoder"
        )


def _embedding_sha256(folder: Path) -> str:
    table = embedding_table(load_anchor(folder)[0])
    return hashlib.sha256(table.tobytes()).hexdigest()
