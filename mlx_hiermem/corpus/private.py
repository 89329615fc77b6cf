"""A small corpus for a memory that is added to a bank: read whole, routed and packed in memory.

A document with prompts (field ``prompt``: a text, or a list of them) is routed as questions about
it would be, by its prompts; another one by views of its text. The subtree that it goes to is grown
on these texts, each once, so that clusters hold about as much to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..routing.encoder import Encoder
from ..routing.grow import grow
from .packed import PackedCorpus, pack_windows
from .sources import find_files, find_units, read_unit
from .views import view_texts
from .windows import Windower, find_end_of_text, load_tokenizer

#: The field with the prompts of a document, and the views of one that has none.
PROMPT = "prompt"
DEFAULT_VIEWS = ("text", "prefix")

#: Most tokens of a corpus: it is held in memory, and trained on in one sitting.
MOST_TOKENS = 1 << 24

#: Share of the texts that documents are routed by which lie within the radius of a memory.
WITHIN = 0.99

#: Numbers of the centroids that texts are compared with at a time: 64 MB.
_NUMBERS = 1 << 24

_UNIT, _BATCH = 1 << 40, 256


@dataclass(frozen=True)
class PrivateCorpus:
    """Documents, cut into windows.

    Attributes:
        windows: token ids of each; a document's last one ends with end-of-text.
        texts: what windows are routed by, each text once.
        pairs: (window, text) for each way that a window is routed, in the order of the windows.
        documents: how many there are.
        length: tokens of a sequence that every window fits into.
        end_of_text: the token's id.
    """

    windows: list[np.ndarray]
    texts: list[str]
    pairs: list[tuple[int, int]]
    documents: int
    length: int
    end_of_text: int

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(map(len, self.windows))

    def pack(self, leaves: np.ndarray) -> PackedCorpus:
        """Each window under every leaf that one of its texts was routed to.

        Args:
            leaves: (texts,) leaf of each text.
        """
        places = dict.fromkeys((window, int(leaves[text])) for window, text in self.pairs)
        windows = [self.windows[window] for window, _ in places]
        found = [leaf for _, leaf in places]
        return pack_windows(windows, found, self.length, self.end_of_text)


def read_private(
    data: Sequence[str],
    tokenizer: Path,
    most: int,
    text_field: str = "text",
    views: Sequence[str] = DEFAULT_VIEWS,
    progress: Callable[[int], object] | None = None,
) -> PrivateCorpus:
    """Read documents, as ``cluster`` does.

    Args:
        data: files, folders or patterns.
        tokenizer: its folder.
        most: tokens of a window at most; a longer document is cut.
        text_field: the field that holds the text.
        views: of documents without prompts (``views``).
        progress: called with the number of documents read since the call before.

    Raises:
        InputError: there is no document, or one cannot be read; they are too many.
    """
    end_of_text = find_end_of_text(tokenizer, load_tokenizer(tokenizer))
    windower = Windower(tokenizer, most, end_of_text)
    windows: list[np.ndarray] = []
    texts: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    documents = total = 0
    for unit in find_units(find_files(data), _UNIT):
        for document in read_unit(unit, text_field, [PROMPT]):
            found = windower([document.text])[0]
            if progress is not None:
                progress(1)
            if found is None:
                continue
            documents += 1
            total += len(found.tokens)
            if (found.tokens[:-1] == end_of_text).any():
                raise InputError(
                    f"{document.where()}: the tokenizer makes its end-of-text token of what the "
                    "text spells out; take that out of the text"
                )
            if total > MOST_TOKENS:
                raise InputError(
                    f"{document.where()}: more than {MOST_TOKENS:,} tokens up to here, too many to "
                    "add; cluster the corpus and train a bank of its own"
                )
            prompts = [text for text in document.fields.get(PROMPT, ()) if text.strip()]
            for number, text in enumerate(found.texts):
                mine = prompts or view_texts(views, text, document.fields)
                start = number * most
                pairs += [(len(windows), texts.setdefault(one, len(texts))) for one in mine]
                windows.append(found.tokens[start : start + most].astype(np.int32))
    if not windows:
        raise InputError(
            f"{', '.join(data)[:200]}: holds no text ({documents} documents); check --text-field"
        )
    longest = max(map(len, windows))
    length = min(most, max(32, 1 << (longest - 1).bit_length()))
    return PrivateCorpus(windows, list(texts), pairs, documents, length, end_of_text)


def encode(
    encoder: Encoder, texts: Sequence[str], progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """(n, c) float32: the vectors of texts, in batches; ``progress`` gets the texts of each."""
    vectors = np.empty((len(texts), encoder.width), np.float32)
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        vectors[start : start + len(batch)] = encoder.encode(batch)
        if progress is not None:
            progress(len(batch))
    return vectors


def grow_subtree(
    vectors: np.ndarray, roots: int, branching: int, levels: int, seed: int = 0
) -> tuple[list[np.ndarray], np.ndarray]:
    """The subtrees of an added memory, by k-means as the tree's (Appendix C of the paper).

    Args:
        vectors: (n, c) float32, of unit length.
        roots: clusters at level 1.
        branching, levels: k and p of the tree that they are added to.

    Returns:
        Centroids, (roots * k^(l-1), c) for each level l, and for each vector its leaf, (n,) int64,
        counted from the memory's first.
    """
    order = np.random.default_rng(seed).permutation(len(vectors))
    if roots == 1:
        top = vectors.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)
        of = np.zeros(len(vectors), np.int64)
    else:
        tree = grow(lambda: [vectors[order]], roots, 1, seed=seed)
        top, of = tree.centroids[0], tree.assign(vectors)[0][:, 0]
    found = [[root] for root in top[:, None]]
    leaves = np.zeros(len(vectors), np.int64)
    below = branching ** (levels - 1)
    for root in range(roots if levels > 1 else 0):
        mine = of == root
        # A root that nothing reached: nothing tells what is below it apart.
        members = vectors[order][mine[order]] if mine.any() else top[root][None]

        def stream(members: np.ndarray = members) -> list[np.ndarray]:
            return [members]

        tree = grow(stream, branching, levels - 1, seed=seed + root)
        found[root] += tree.centroids
        if mine.any():
            leaves[mine] = tree.assign(vectors[mine])[0][:, -1]
    centroids = [np.concatenate(arrays) for arrays in zip(*found, strict=True)]
    return centroids, of * below + leaves


def find_radius(
    vectors: np.ndarray,
    roots: int,
    branching: int,
    levels: int,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> float:
    """How far from its leaf (L2) a text that is about the documents may be expected to lie.

    Each half of the texts is routed in a subtree that is grown on the other half, since a text that
    a leaf was grown on may be its centroid.

    Args:
        progress: called with 1 after each half.

    Returns:
        What ``WITHIN`` of them stay below; infinite for fewer than two texts.
    """
    if len(vectors) < 2:
        return math.inf
    order = np.random.default_rng([seed, 1]).permutation(len(vectors))
    far = []
    for known, asked in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        centroids, _ = grow_subtree(vectors[known], roots, branching, levels, seed)
        # Each text has all children of its cluster beside it: gigabytes for all texts at once.
        step = max(1, _NUMBERS // (max(roots, branching) * vectors.shape[1]))
        for start in range(0, len(asked), step):
            mine = vectors[asked[start : start + step]]
            far.append(_leaf_distances(mine, centroids, roots, branching))
        if progress is not None:
            progress(1)
    return float(np.quantile(np.concatenate(far), WITHIN)) or math.inf


def _leaf_distances(
    vectors: np.ndarray, centroids: Sequence[np.ndarray], roots: int, branching: int
) -> np.ndarray:
    """(n,): how far from its leaf (L2) each vector lies, greedily from level to level."""
    node, fan = np.zeros(len(vectors), np.int64), roots
    for level in centroids:
        children = level.reshape(-1, fan, level.shape[1])[node]  # (n, fan, c)
        distances = np.linalg.norm(children - vectors[:, None], axis=2)
        node, fan = node * fan + distances.argmin(axis=1), branching
    nearest: np.ndarray = distances.min(axis=1)
    return nearest
