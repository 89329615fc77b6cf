"""Where ``bank inspect`` gets use counts from: how often each cluster is on a path.

Counted are leaves; every cluster above follows from them, since the parent of i is i // k. Only
clusters that are used are held, so the size of the tree does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError

if TYPE_CHECKING:
    from ...config import MemoryConfig
    from ...engine import MemoryLM

#: Texts that are routed at a time.
_BATCH = 256


@dataclass(frozen=True)
class Uses:
    """Use counts of the clusters of a tree.

    Attributes:
        branching: k of the tree.
        levels: p of the tree.
        leaves: (n,) int64, ascending: the leaf clusters that are used.
        counts: (n,) int64, how often each of them is; at least 1.
        what: what was counted, such as "documents".
        source: where it came from, a file or folder.
        added: clusters of level 1 that added memories have, behind the k of the tree.
    """

    branching: int
    levels: int
    leaves: np.ndarray
    counts: np.ndarray
    what: str
    source: str
    added: int = 0

    @classmethod
    def of(
        cls, branching: int, levels: int, leaves: Any, what: str, source: str, added: int = 0
    ) -> Uses:
        """From the leaf of each thing that was counted, in any order."""
        found, counts = np.unique(np.asarray(leaves, np.int64), return_counts=True)
        return cls(branching, levels, found, counts.astype(np.int64), what, source, added)

    @property
    def roots(self) -> int:
        """Clusters of level 1."""
        return self.branching + self.added

    def clusters(self, level: int) -> int:
        """Clusters of ``level``."""
        return self.roots * self.branching ** (level - 1)

    @property
    def total(self) -> int:
        """How many things were counted: the sum of the counts of any one level."""
        return int(self.counts.sum())

    def at(self, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Clusters of ``level`` that are used, ascending, and their counts: (m,) int64 both."""
        clusters = self.leaves // self.branching ** (self.levels - level)
        found, places = np.unique(clusters, return_inverse=True)
        counts = np.zeros(len(found), np.int64)
        np.add.at(counts, places, self.counts)
        return found, counts

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON: ``{"what", "source", "total", "levels": {level: {cluster: count}}}``.

        Levels and clusters are strings, as keys of JSON are; clusters without uses are left out.
        """
        levels = {}
        for level in range(1, self.levels + 1):
            clusters, counts = self.at(level)
            pairs = zip(clusters.tolist(), counts.tolist(), strict=True)
            levels[str(level)] = {str(cluster): count for cluster, count in pairs}
        return {"what": self.what, "source": self.source, "total": self.total, "levels": levels}


def of_text(lm: MemoryLM, path: str | Path) -> Uses:
    """The documents of a .jsonl or .txt file, each routed by its whole text.

    Raises:
        InputError: the file cannot be read, or holds no documents.
    """
    from ...evaluation.perplexity import read_documents

    return of_texts(lm, read_documents(path), "documents", str(path))


def of_questions(lm: MemoryLM, model: Path) -> Uses:
    """The held-out questions of a model folder, each routed by its prompt.

    Raises:
        FormatError: the model has none, or the file is damaged.
    """
    from ...evaluation.facts import QUESTIONS_FILE, read_questions

    config = lm.bank.config
    path = model / QUESTIONS_FILE
    questions, _ = read_questions(path, config.clusters(config.levels))
    return of_texts(lm, [question.prompt for question in questions], "questions", str(path))


def of_texts(lm: MemoryLM, texts: Sequence[str], what: str, source: str) -> Uses:
    """Texts, each routed through the model's encoder and tree; shows a progress bar."""
    config = lm.bank.config
    leaves = leaves_of(lm, texts, what)
    added = config.roots - config.branching
    return Uses.of(config.branching, config.levels, leaves, what, source, added)


def leaves_of(lm: MemoryLM, texts: Sequence[str], what: str) -> np.ndarray:
    """(n,) int64: the leaf that each text is routed to; shows a progress bar."""
    from tqdm import tqdm

    leaves = np.empty(len(texts), np.int64)
    # disable=None: no bar where stderr is no terminal.
    with tqdm(total=len(texts), unit=what.removesuffix("s"), leave=False, disable=None) as bar:
        bar.set_description("route")
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            leaves[start : start + len(batch)] = lm.assign(batch)[:, -1]
            bar.update(len(batch))
    return leaves


def of_corpus(folder: str | Path, config: MemoryConfig, memory: Path) -> Uses:
    """The training sequences of a corpus, each under the leaf that ``cluster`` gave it.

    Args:
        folder: the corpus; its tokens are not read.
        config, memory: the bank's config and folder; both have to be of the corpus's tree.

    Raises:
        FormatError: the corpus is not whole.
        ConfigError: it was made with another tree than the bank's, so its leaves mean nothing here.
    """
    from ...bank.manifest import read_manifest
    from ...corpus.folder import TREE, Corpus

    corpus = Corpus.open(Path(folder).expanduser())
    info = corpus.info
    if (info.branching, info.levels) != (config.branching, config.levels):
        raise ConfigError(
            f"{corpus.folder}: its tree has branching {info.branching} and {info.levels} levels, "
            f"that of {memory} has {config.branching} and {config.levels}; give the corpus that "
            "the bank was trained on"
        )
    tree = read_manifest(memory).files.get(TREE)
    if tree is not None and tree.sha256 != info.tree_sha256:
        raise ConfigError(
            f"{corpus.folder}: was made with another tree than {memory / TREE}, so its clusters "
            "are others; give the corpus that the bank was trained on"
        )
    leaves = corpus.train.leaves
    what, added = "training sequences", config.roots - config.branching
    return Uses.of(info.branching, info.levels, leaves, what, str(corpus.folder), added)
