"""Names of clusters: two or three telling words of the documents in each of them.

A word is scored by pointwise Kullback-Leibler divergence (Tomokiyo and Hurst 2003, "A language
model approach to keyphrase extraction"): p log(p / q), with p the share of the cluster's documents
that hold it and q the share in the cluster and its siblings together. As in BERTopic's
``reduce_frequent_words`` (Grootendorst 2022, arXiv 2203.05794) the square root of p stands for p,
so that rarer words get their turn. What is everywhere, such as "the", scores about zero, so no
list of stop words is needed, in any language.

Notable: the tree is walked depth first, and of each cluster at most ``WORDS`` words are kept, so
memory does not follow the number of clusters. What comes out depends on the documents alone.
"""

from __future__ import annotations

import heapq
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FormatError
from ..files import AtomicFile

#: The file, beside the tree.
NAMES = "names.json"

#: Most characters of a name, and most words.
LONGEST, MOST = 40, 3

#: Most clusters of a level that gets names; deeper levels have none.
CLUSTERS = 1 << 17

#: Most words that are kept of a cluster while the tree is walked, shared by its siblings if many.
WORDS, _SHARED = 4096, 1 << 21

_BYTES = 1 << 25

# Letters and digits of any script, with the marks that stand within words, and hyphens.
_WORD = re.compile("[^\\W_](?:[^\\W_]|[\u0300-\u036f\u0900-\u0dff\u0e30-\u0e4e'\u2019-])*")
_ENDINGS = re.compile("(?:['\u2019]s)?['\u2019-]*$")
# Scripts without spaces: pairs of signs stand for words.
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


class ClusterNames:
    """Names of the clusters of a tree.

    Args:
        levels: a list of names for each level from 1 on, maybe not down to the deepest.

    Raises:
        FormatError: these are not names for a tree: wrong numbers of them, or one that is empty, is
            longer than 40 characters, or holds what cannot be printed.
    """

    def __init__(self, levels: Sequence[Sequence[str]]) -> None:
        self.levels = tuple(tuple(names) for names in levels)
        roots = len(self.levels[0]) if self.levels else 0
        if roots < 2:
            raise FormatError(f"{NAMES}: {roots} names at level 1; expected at least 2")
        # Fewer than the roots where memories were added to the bank.
        branching = len(self.levels[1]) // roots if len(self.levels) > 1 else roots
        for level, names in enumerate(self.levels, 1):
            expected = roots * min(roots, max(2, branching)) ** (level - 1)
            if len(names) != expected:
                raise FormatError(
                    f"{NAMES}: {len(names)} names at level {level}; expected {expected} for "
                    f"{roots} clusters at level 1"
                )
            for cluster, name in enumerate(names):
                if not _is_name(name):
                    raise FormatError(
                        f"{NAMES}: the name of cluster {cluster} of level {level} is "
                        f"{ascii(name)[:60]}; expected 1 to {LONGEST} characters that can be "
                        "printed"
                    )

    def of(self, level: int, cluster: int) -> str:
        """The name of a cluster; ``cluster 5`` where it has none. It is text, not markup."""
        if 1 <= level <= len(self.levels) and 0 <= cluster < len(self.levels[level - 1]):
            return self.levels[level - 1][cluster]
        return unnamed(cluster)

    def check(self, branching: int, levels: int, roots: int | None = None) -> None:
        """Raise FormatError where these cannot be names for a tree of this shape.

        Args:
            roots: clusters of level 1; by default the branching.
        """
        roots = branching if roots is None else roots
        found = len(self.levels[0])
        children = len(self.levels[1]) // found if len(self.levels) > 1 else branching
        if found != roots or children != branching or len(self.levels) > levels:
            raise FormatError(
                f"{NAMES}: names for {found} clusters at level 1, branching {children} and "
                f"{len(self.levels)} levels, but the tree has {roots}, {branching} and {levels}; "
                "get the file again, or remove it and write the manifest anew"
            )

    def of_tree(self, branching: int) -> ClusterNames:
        """The names of the tree's own clusters, without those of added memories."""
        if len(self.levels[0]) <= branching:
            return self
        return ClusterNames(self.part(range(branching)))

    def part(self, roots: range) -> list[list[str]]:
        """The names below some clusters of level 1, level by level."""
        total = len(self.levels[0])
        below = [len(names) // total for names in self.levels]
        return [
            list(names[roots.start * size : roots.stop * size])
            for names, size in zip(self.levels, below, strict=True)
        ]

    @classmethod
    def load(cls, folder: str | Path, name: str = NAMES) -> ClusterNames | None:
        """The names beside a tree, in ``folder``; None where there are none.

        Args:
            name: that the file has now (``MemoryBank.file_name``).

        Raises:
            FormatError: the file cannot be read, or is not what docs/format.md says.
        """
        path = Path(folder) / name
        if not path.exists():
            return None

        if not path.is_file():  # a pipe would be waited for
            raise _wrong(path, "not a regular file")
        try:
            with open(path, "rb") as file:
                data = file.read(_BYTES + 1)
        except OSError as error:
            raise _wrong(path, f"cannot be read ({error.strerror})") from None
        return cls.parse(data, path)

    @classmethod
    def parse(cls, data: bytes, path: Path) -> ClusterNames:
        """The names that the file ``path`` holds, given its bytes.

        Raises:
            FormatError: they are not what docs/format.md says.
        """
        if len(data) > _BYTES:
            raise _wrong(path, f"more than {_BYTES} bytes")
        try:
            table = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _wrong(path, f"not valid JSON ({ascii(str(error))[:80]})") from None
        if not isinstance(table, dict) or not all(isinstance(one, list) for one in table.values()):
            raise _wrong(path, "expected an object of lists")
        wanted = [f"level{level}" for level in range(1, len(table) + 1)]
        if sorted(table) != sorted(wanted):
            raise _wrong(path, "expected the keys level1, level2 and so on, and no other")
        try:
            return cls([table[key] for key in wanted])
        except FormatError as error:
            raise _wrong(path, str(error).removeprefix(f"{NAMES}: ")) from None

    def to_bytes(self) -> bytes:
        """The file."""
        table = {f"level{level}": names for level, names in enumerate(self.levels, 1)}
        return (json.dumps(table, ensure_ascii=False, indent=0) + "\n").encode()

    def save(self, folder: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            FormatError: it cannot be written.
        """
        with AtomicFile(Path(folder), NAMES) as file:
            file.write(self.to_bytes())


def _wrong(path: Path, found: str) -> FormatError:
    return FormatError(f"{path}: {found}; get it again, or make the names anew")


def unnamed(cluster: int) -> str:
    """What a cluster is called that has no name."""
    return f"cluster {cluster}"


def _is_name(name: object) -> bool:
    # Not printable are control characters, lone surrogates, and those that turn the direction.
    return (
        isinstance(name, str)
        and 0 < len(name) <= LONGEST
        and name.isprintable()
        and bool(name.strip())
    )


# ---- making names ----------------------------------------------------------------------


def named_levels(branching: int, levels: int) -> int:
    """How many levels of a tree get names; at least 1 wherever k <= ``CLUSTERS``."""
    return sum(branching**level <= CLUSTERS for level in range(1, levels + 1))


@dataclass
class _Words:
    """How many of ``documents`` hold each word."""

    documents: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: _Words) -> None:
        self.documents += other.documents
        self.counts.update(other.counts)

    def trim(self, most: int) -> None:
        """Keep the words of the most documents."""
        if len(self.counts) > most:
            kept = heapq.nsmallest(most, self.counts.items(), key=lambda one: (-one[1], one[0]))
            self.counts = Counter(dict(kept))


def name_tree(
    texts: Callable[[int], Iterable[str]],
    branching: int,
    levels: int,
    progress: Callable[[int], None] | None = None,
    roots: int | None = None,
) -> ClusterNames | None:
    """Name the clusters of a tree by the documents in them.

    Args:
        texts: the documents, or some of them, of a cluster of level ``levels``; asked once for each
            in ascending order.
        branching: k of the tree.
        levels: how many levels get names, from :func:`named_levels`.
        progress: called with the number of clusters of the deepest level that are done.
        roots: clusters of level 1; by default the branching.

    Returns:
        The names; a cluster without any word is called ``cluster 5``. None for 0 levels.
    """
    if levels < 1:
        return None
    roots = branching if roots is None else roots
    names = [[""] * (roots * branching ** (level - 1)) for level in range(1, levels + 1)]
    most = min(WORDS, max(64, _SHARED // branching))

    def visit(level: int, cluster: int) -> _Words:
        words = _Words()
        if level == levels:
            for text in texts(cluster):
                words.documents += 1
                words.counts.update(set(split_words(text)))
            if progress is not None:
                progress(cluster + 1)
        else:
            first = cluster * branching
            count = branching if level else roots
            children = [visit(level + 1, first + child) for child in range(count)]
            for child in children:
                words.add(child)
            for number, child in enumerate(children, first):
                names[level][number] = _name(child, words) or unnamed(number)
        words.trim(most)
        return words

    visit(0, 0)
    return ClusterNames(names)


def split_words(text: str) -> Iterator[str]:
    """The words of a text, in lower case; of scripts without spaces, pairs of signs."""
    for found in _WORD.findall(unicodedata.normalize("NFC", text).lower()):
        word = _ENDINGS.sub("", found)
        runs = _UNSPACED.findall(word)
        if runs:
            for run in runs:
                yield from (run[i : i + 2] for i in range(max(1, len(run) - 1)))
        elif len(word) > 1:
            yield word


def _name(mine: _Words, all_: _Words) -> str:
    """The telling words of a cluster, given those of it and its siblings together."""
    ranked = _ranked(mine, all_)
    chosen: list[str] = []
    for word in ranked:
        # One of "metal" and "metals" says it.
        same = any(a.startswith(b) for one in chosen for a, b in ((one, word), (word, one)))
        if not same and len(", ".join([*chosen, word])) <= LONGEST:
            chosen.append(word)
        if len(chosen) == MOST:
            break
    name = ", ".join(chosen) if chosen else "".join(ranked[:1])[:LONGEST]
    return name if _is_name(name) else ""


def _ranked(mine: _Words, all_: _Words) -> list[str]:
    """Some words of a cluster, the most telling first."""
    least = 2 if mine.documents >= 8 else 1
    words = {word: count for word, count in mine.counts.items() if not word.isdigit()}
    telling = {
        word: _score(count / mine.documents, all_.counts[word] / all_.documents)
        for word, count in words.items()
        if count >= least and count * all_.documents > all_.counts[word] * mine.documents
    }
    # Where nothing sets a cluster apart, what it is full of has to do; numbers if that is all.
    ranks: Mapping[str, float] = telling or words or mine.counts
    return heapq.nsmallest(4 * MOST, ranks, key=lambda word: (-ranks[word], word))


def _score(share: float, share_of_all: float) -> float:
    """How telling a word is, from its share of the cluster's documents and of the siblings' too."""
    return math.sqrt(share) * math.log(share / share_of_all)
