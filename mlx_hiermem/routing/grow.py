"""Grow a cluster tree from a stream of vectors (Appendix C of the paper).

From the root down, each node runs k-means on the examples that reached it:

- vectors are normalised first;
- k-means++ on the node's first sample gives the first centroids;
- 20 steps of EM, each on 6,400 *new* examples (the first step takes the sample that the start
  was made from: 128,000 examples in all);
- after each assignment a cluster with more than 1.5/k of the examples is split evenly, at
  random, with the smallest one.

Notable: the vectors need not fit in memory. The stream is opened again and again; one pass feeds
all nodes of a level, or as many of them as the buffers have room for, and a node holds only its
own next 6,400 examples. What a node computes depends on the seed, its place and the order of its
own examples, not on how the stream is cut into chunks or how many nodes share a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..errors import InputError
from .tree import ClusterTree, check_vectors

Chunks = Callable[[], Iterable[np.ndarray]]

#: Rows that are worked on at a time.
_PIECE = 1 << 14


def grow(
    chunks: Chunks,
    branching: int = 16,
    levels: int = 4,
    *,
    seed: int = 0,
    steps: int = 20,
    samples_per_step: int = 6400,
    balance: float | None = 1.5,
    buffer_bytes: int = 4 << 30,
    progress: Callable[[int, int, int], None] | None = None,
) -> ClusterTree:
    """Grow a tree; the defaults are the paper's (Appendix C).

    A corpus that ends before a node has its steps is read again, so a small one is seen more
    than once; a node that fewer than ``samples_per_step`` examples reach uses all of them in
    each step. A node with fewer distinct examples than children repeats centroids (the first of
    equals is routed to), and one that no example reaches repeats its own.

    Args:
        chunks: opens the stream: each call gives the same arrays (n, c) again. Shuffle the
            corpus beforehand: a step sees consecutive examples.
        branching: k.
        levels: p.
        seed: same seed and same stream, same tree to the bit.
        steps: EM steps of each node.
        samples_per_step: new examples of each step.
        balance: a cluster may hold this many times its fair share 1/k of a step; ``None``
            switches the rule off.
        buffer_bytes: memory for the examples that nodes hold; a level that wants more is grown
            in several passes. One node is always allowed.
        progress: called as ``progress(level, steps_done, steps_of_the_level)``.

    Raises:
        InputError: the stream is empty, its vectors do not fit together, or one of them is zero
            or not finite; or an argument is out of range.
    """
    limits = (("branching", branching, 2), ("levels", levels, 1), ("steps", steps, 1))
    for name, value, low in (*limits, ("samples_per_step", samples_per_step, 1)):
        if value < low:
            raise InputError(f"grow a tree: {name} is {value}; expected at least {low}")
    if balance is not None and balance <= 1:
        raise InputError(f"grow a tree: balance is {balance}; expected more than 1, or None")

    tree: ClusterTree | None = None
    for level in range(1, levels + 1):
        nodes = [
            _Node(
                branching,
                np.random.default_rng([seed, level, node]),
                steps,
                samples_per_step,
                balance,
            )
            for node in range(branching ** (level - 1))
        ]
        width = _width(chunks) if tree is None else tree.width
        group = max(1, buffer_bytes // (samples_per_step * width * 4))
        for start in range(0, len(nodes), group):
            part = range(start, min(start + group, len(nodes)))

            def report(level: int = level, nodes: list[_Node] = nodes) -> None:
                if progress is not None:
                    done = sum(node.steps_done for node in nodes)
                    progress(level, done, steps * len(nodes))

            _grow_nodes(chunks, tree, width, nodes, part, report)
        parents = np.zeros((1, width), np.float32) if tree is None else tree.centroids[-1]
        grown = [
            # No example came by: nothing tells the children apart.
            np.repeat(parent[None], branching, axis=0) if node.centroids is None else node.centroids
            for parent, node in zip(parents, nodes, strict=True)
        ]
        above = () if tree is None else tree.centroids
        tree = ClusterTree([*above, np.concatenate(grown)])
    assert tree is not None, "levels is at least 1"
    return tree


def occupancy(tree: ClusterTree, chunks: Chunks) -> list[np.ndarray]:
    """How evenly a corpus fills a tree: examples in each cluster.

    Returns:
        One int64 array (k^l,) per level; ``a.max() / a.sum()`` is the share of the fullest.
    """
    leaves = np.zeros(tree.branching**tree.levels, np.int64)
    for vectors in _unit_chunks(chunks, tree.width):
        ids, _ = tree.assign(vectors)
        leaves += np.bincount(ids[:, -1], minlength=len(leaves))
    return [
        leaves.reshape(tree.branching**level, -1).sum(axis=1) for level in range(1, tree.levels + 1)
    ]


def _grow_nodes(
    chunks: Chunks,
    tree: ClusterTree | None,
    width: int,
    nodes: list[_Node],
    part: range,
    report: Callable[[], None],
) -> None:
    """Read the stream until all nodes of ``part`` have done their steps."""
    waiting = set(part)
    while waiting:
        fed = False
        for vectors in _unit_chunks(chunks, width):
            if tree is None:
                ids = np.zeros(len(vectors), np.int64)
            else:
                ids = tree.assign(vectors)[0][:, -1]
            # A stable sort keeps the order of the stream within each node.
            order = np.argsort(ids, kind="stable")
            here, first = np.unique(ids[order], return_index=True)
            for node, mine in zip(here.tolist(), np.split(order, first[1:]), strict=True):
                if node in waiting:
                    nodes[node].add(vectors[mine])
                    fed = True
                    if nodes[node].done:
                        waiting.discard(node)
            report()
            if not waiting:
                return
        if not fed and (tree is None or any(nodes[node].steps_done for node in waiting)):
            raise InputError(
                "grow a tree: the stream gave other vectors when it was opened again; chunks() "
                "must return the same arrays each time, not what is left of an iterator"
            )
        for node in sorted(waiting):
            nodes[node].end_of_stream()
            if nodes[node].done:
                waiting.discard(node)
        report()


class _Node:
    """k-means of one node, fed with the examples that reach it."""

    def __init__(
        self,
        k: int,
        rng: np.random.Generator,
        steps: int,
        samples: int,
        balance: float | None,
    ) -> None:
        self.k = k
        self.rng = rng
        self.steps = steps
        self.samples = samples
        self.balance = balance
        self.steps_done = 0
        self.centroids: np.ndarray | None = None  # (k, c)
        self._buffer: np.ndarray | None = None  # (samples, c), the first _held rows are filled
        self._held = 0

    @property
    def done(self) -> bool:
        return self.steps_done >= self.steps

    def add(self, vectors: np.ndarray) -> None:
        """Take examples (n, c) in the order of the stream; a full buffer is one step."""
        while len(vectors) and not self.done:
            if self._buffer is None:
                # Rows that are never written cost no memory.
                self._buffer = np.empty((self.samples, vectors.shape[1]), np.float32)
            taken = vectors[: self.samples - self._held]
            self._buffer[self._held : self._held + len(taken)] = taken
            self._held += len(taken)
            vectors = vectors[len(taken) :]
            if self._held == self.samples:
                self._step(self._buffer)
                self._held = 0
        if self.done:
            self._buffer = None

    def end_of_stream(self) -> None:
        """The stream is over. No step yet: the buffer is all there is, so it serves each step.

        Otherwise what is held waits for the next reading, and steps are cut at other places then.
        """
        if self.steps_done:
            return
        for _ in range(self.steps):
            if self._buffer is not None and self._held:
                self._step(self._buffer[: self._held])
            else:
                self.steps_done += 1
        self._buffer = None

    def _step(self, batch: np.ndarray) -> None:
        """One step of EM on (n, c), with the balance rule between E and M."""
        if self.centroids is None:
            self.centroids = _plus_plus(batch, self.k, self.rng)
        labels = _squared_distances(batch, self.centroids).argmin(axis=1)
        if self.balance is not None:
            _rebalance(labels, self.k, self.balance, self.rng)
        for cluster in range(self.k):
            members = batch[labels == cluster]
            if len(members):  # an empty cluster stays where it is
                self.centroids[cluster] = members.mean(axis=0, dtype=np.float64)
        self.steps_done += 1


def _rebalance(labels: np.ndarray, k: int, balance: float, rng: np.random.Generator) -> None:
    """The balance rule, in place: no cluster keeps more than balance/k of the examples.

    The largest cluster hands random examples to the smallest until both hold the same number,
    and so on while one is too large (0.094 = 1.5/16 in Appendix C). Each turn shrinks the sum
    of squared sizes, so it ends; sizes that differ by one cannot be split further.
    """
    sizes = np.bincount(labels, minlength=k)
    limit = balance * len(labels) / k
    while True:
        large, small = int(sizes.argmax()), int(sizes.argmin())
        moved = (sizes[large] - sizes[small]) // 2
        if sizes[large] <= limit or not moved:
            return
        members = np.flatnonzero(labels == large)
        labels[rng.choice(members, moved, replace=False)] = small
        sizes[large] -= moved
        sizes[small] += moved


def _plus_plus(batch: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ start (Arthur and Vassilvitskii 2007): (k, c) rows of ``batch`` (n, c).

    Each next centroid is drawn with a chance in proportion to the squared distance to the
    nearest one so far; when all distances are zero, any row.
    """
    chosen = np.empty((k, batch.shape[1]), np.float32)
    nearest = np.full(len(batch), np.inf)
    for i in range(k):
        total = nearest.sum() if i else 0.0
        chance = nearest / total if total > 0 else None
        chosen[i] = batch[rng.choice(len(batch), p=chance)]
        away = np.square(batch - chosen[i]).sum(axis=1, dtype=np.float64)
        nearest = np.minimum(nearest, away)
    return chosen


def _squared_distances(batch: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(n, c), (k, c) -> (n, k), short of |x|^2, which is the same for each centroid."""
    return np.square(centroids).sum(axis=1) - 2 * (batch @ centroids.T)


def _unit_chunks(chunks: Chunks, width: int | None) -> Iterator[np.ndarray]:
    """The chunks of one reading, checked and normalised."""
    for chunk in chunks():
        # In pieces: a chunk may be a whole corpus, mapped from disk.
        for start in range(0, len(chunk), _PIECE):
            vectors = check_vectors(chunk[start : start + _PIECE], width)
            # In float64, so that no finite float32 overflows or vanishes in the square.
            length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
            if not length.all():
                row = start + int((length[:, 0] == 0).argmax())
                raise InputError(f"vectors: row {row} of a chunk is zero and has no direction")
            yield (vectors / length).astype(np.float32)


def _width(chunks: Chunks) -> int:
    """Width of the vectors, from the first chunk that is not empty."""
    for vectors in chunks():
        if len(vectors):
            return check_vectors(vectors[:1]).shape[1]
    raise InputError("grow a tree: the stream holds no vectors; give a corpus that is not empty")
