"""``mlx_hiermem bank names``: name the clusters of a bank, or name them anew."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, InputError

if TYPE_CHECKING:
    from ...config import MemoryConfig
    from ...routing.names import ClusterNames

#: Names of level 1 that are printed.
_SHOWN = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="model folder whose bank is edited"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--corpus", metavar="FOLDER", help="take the names of a corpus of the bank's tree"
    )
    source.add_argument(
        "--text",
        metavar="FILE",
        help="make them of documents, each routed by its text: .jsonl with a text a line, or .txt "
        "with blank lines between them",
    )
    parser.set_defaults(revision=None, bank=None, levels=None, subtrees=None)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """``{"folder", "revision", "revision_before", "levels": names per level, "level1": names}``.

    Raises:
        InputError: the corpus has no names, or the documents cannot be read.
        ConfigError: the corpus is of another tree, or the bank has none.
        FormatError: something is damaged or cannot be written. Nothing has changed then.
    """
    from ...bank.edit import BankEdit
    from ..options import editable_folder

    folder = editable_folder(args)
    names = _of_corpus(args.corpus, folder) if args.text is None else _of_text(args)
    with BankEdit(folder) as edit:
        before = edit.revision
        if args.text is None and edit.config.added:
            names = _with_added(names, edit.config, folder)
        names.check(edit.config.branching, edit.config.levels, edit.config.roots)
        edit.set_names(names.to_bytes())
    return {
        "folder": str(folder),
        "revision": edit.revision,
        "revision_before": before,
        "levels": [len(level) for level in names.levels],
        "level1": list(names.levels[0]),
    }


def _of_corpus(corpus: str, memory: Path) -> ClusterNames:
    from ...bank.manifest import read_manifest
    from ...corpus.folder import TREE, Corpus
    from ...routing.names import ClusterNames

    found = Corpus.open(Path(corpus).expanduser())
    tree = read_manifest(memory).files.get(TREE)
    if tree is None or tree.sha256 != found.info.tree_sha256:
        raise ConfigError(
            f"--corpus {corpus}: was made with another tree than that of {memory}, so its names "
            "are of other clusters; give the corpus that the bank was trained on"
        )
    names = ClusterNames.load(found.routing_folder)
    if names is None:
        raise InputError(
            f"--corpus {corpus}: has no names; cluster it with --names, or give documents with "
            "--text"
        )
    return names


def _with_added(names: ClusterNames, config: MemoryConfig, memory: Path) -> ClusterNames:
    """Names of the tree's clusters, with those that the clusters of added memories have now."""
    from ...routing.names import ClusterNames, unnamed

    now, k = ClusterNames.load(memory), config.branching
    levels = [list(level) for level in names.levels]
    for level, found in enumerate(levels, 1):
        last = config.roots * k ** (level - 1)
        if now is None:
            found += map(unnamed, range(len(found), last))
        else:
            found += [now.of(level, cluster) for cluster in range(len(found), last)]
    return ClusterNames(levels)


def _of_text(args: argparse.Namespace) -> ClusterNames:
    from ...evaluation.perplexity import read_documents
    from ...loading import load
    from ...routing.names import name_tree, named_levels
    from .uses import leaves_of

    lm = load(args.model, tiers="disk")
    with lm.bank as bank:
        config: MemoryConfig = bank.config
        texts = read_documents(args.text)
        leaves = leaves_of(lm, texts, "documents")
    named = named_levels(config.branching, config.levels)
    if not named:
        raise ConfigError(f"{bank.folder}: {config.branching} clusters at level 1 are too many")
    members: dict[int, list[str]] = {}
    for text, leaf in zip(texts, leaves.tolist(), strict=True):
        members.setdefault(leaf // config.branching ** (config.levels - named), []).append(text)
    names = name_tree(
        lambda cluster: members.get(cluster, []), config.branching, named, roots=config.roots
    )
    assert names is not None  # there is a level to name
    return names


def to_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"  {cluster}  {name}" for cluster, name in enumerate(report["level1"][:_SHOWN])]
    counts = " + ".join(f"{count:,}" for count in report["levels"])
    return "\n".join(
        [
            f"{report['folder']}: {counts} clusters named, revision {report['revision'][:12]}",
            "level 1:",
            *lines,
        ]
    )
